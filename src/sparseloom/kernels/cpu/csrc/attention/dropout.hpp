// Which probabilities survive dropout: the counting bits of kernels/common.py, dropout_rows.
#pragma once

#include <stdint.h>

namespace sparseloom {

// What Python passes: threshold is round(p * 2^24), factor 1 / (1 - p), or 0 where p is 1.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float factor = 1.0f;
};

}  // namespace sparseloom

#if defined(SL_TIER)  // drivers only hand the struct on

#include "tier.hpp"

namespace sparseloom::SL_TIER {

// The number of pair (b, h, i, 0); key j is that number plus j. All of it wraps, as in int64.
SL_INLINE uint64_t dropout_row(uint64_t b, uint64_t h, uint64_t heads, uint64_t i, uint64_t q_len,
                               uint64_t kv_len) {
  return ((b * heads + h) * q_len + i) * kv_len;
}

// What the probability of a pair is multiplied by: the factor, or 0.
SL_INLINE float dropout_factor(const Dropout& drop, uint64_t pair) {
  uint64_t bits = pair * 0x9E3779B97F4A7C15u + drop.seed;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(bits >> 40) >= drop.threshold ? drop.factor : 0.0f;
}

// The factors of R adjoining rows and n keys: factors[k * R + r] for key keys[k], where `row` is the
// number of the first row's first pair.
template <int R>
SL_INLINE void dropout_tile(const Dropout& drop, uint64_t row, uint64_t kv_len, const int32_t* keys,
                            int n, float* factors) {
  for (int k = 0; k < n; ++k) {
    const uint64_t pair = row + static_cast<uint64_t>(keys[k]);
    for (int r = 0; r < R; ++r)
      factors[k * R + r] = dropout_factor(drop, pair + static_cast<uint64_t>(r) * kv_len);
  }
}

}  // namespace sparseloom::SL_TIER

#endif
