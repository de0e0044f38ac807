// New rows of a quantised cache: codes, split into planes, written where they are kept.
#pragma once

#include "decode/decode.hpp"

namespace sparseloom {

struct Store {
  int64_t batch, heads, rows, dim;
  Cached from;    // f32, bf16 or f16
  Factors scale;  // the same along rows and dimensions
  int bits, low_bits;
  Cached high, low;  // i8 or i16; nibbles, data null where low_bits is 0
};

// Codes are round(x / scale), as many bits wide as both planes. Returns false where a number is not
// finite or has no code: what was written until then means nothing.
bool store(const Store& call);

}  // namespace sparseloom
