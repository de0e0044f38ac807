// One step of decoding: up to 16 new queries per head against a cache.
#pragma once

#include <stdint.h>

#include "dispatch.hpp"

namespace sparseloom {

// `nibbles`: two 4-bit numbers per byte, byte j holding dimensions j (low half) and j + dim / 2.
enum class Element : int { f32, bf16, f16, i8, i16, nibbles };
constexpr int KEY_ELEMENTS = 6, VALUE_ELEMENTS = 4;  // values: the first four

// A (batch, heads, length, dim) tensor; strides in bytes, the last dimension contiguous.
struct Cached {
  const char* data = nullptr;
  Element element = Element::f32;
  int64_t batch = 0, head = 0, row = 0;
};

// fp32 factors of a tensor of codes, strides in elements, 0 where shared; at most one of `row`
// and `dim` differs from 0.
struct Factors {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, dim = 0;
};

struct Decode {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  Cached query, key, key_low, value;  // key_low.data null: keys of one plane
  Factors key_scale, value_scale;     // data null: 1
  const void* keep;                   // contiguous (batch, keep_heads, kept)
  bool keep_is_64;
  int64_t keep_heads, kept;  // keep_heads 0: no list, all keys
  const uint8_t* padding;  // (batch, kv_len), rows `padding_stride` apart; null: attend to all
  int64_t padding_stride;
  float scale;
  int low_bits;        // a key is high * 2^low_bits + low
  float fill;          // what the low bits count as where they are not read
  double value_keep;   // negative: read all values
  double progressive;  // negative: read both planes at once
  bool renormalise, causal;
  void* out;  // contiguous, element type of the query
  float *key_importance, *head_importance;  // null where not asked for; the first one zeroed
  int64_t *keys_read, *values_read;
  uint8_t* refetched;
  int threads;
};

// Returns -1, or the flat index of the first entry of `keep` that is not in [-1, kv_len).
int64_t decode(const Decode& call);

// ---------------------------------------------------------------- kernels

// Rows `first` to `first + count - 1` of a cache, or those that `list` names; entries up to
// `list[ahead - 1]` may be looked at to prefetch their rows.
struct Rows {
  const char* data;
  int64_t stride;  // bytes
  const int32_t* list;
  int64_t first, ahead;
  int count;
};

// scores[r][i] = dot(query[r], key i). Queries are padded with zeros to multiples of 16, for
// nibbles each half on its own.
struct ScoreTile {
  Rows keys;
  int dim, rows;
  const float* const* query;
  float* const* scores;
};

// out[r] += sum over i of weights[r][i] * value i
struct ValueTile {
  Rows values;
  int dim, rows;
  const float* const* weights;
  float* const* out;
};

struct TileKernels {
  void (*scores[KEY_ELEMENTS])(const ScoreTile&);
  void (*values[VALUE_ELEMENTS])(const ValueTile&);
};
SL_TABLE(TileKernels, decode_tiles)

struct RowKernels {
  // Moves the keys of a list that are to be read to the front of `list`, in order; entries of -1
  // and padding are not. Returns how many, or sets *wrong to the first place of another number.
  int64_t (*compact)(const void* keep, bool is_64, int64_t n, int64_t kv_len,
                     const uint8_t* padding, int32_t* list, int64_t* wrong);
  // Brings the running maximum and sum of 2^(score - maximum) up to date.
  void (*accumulate)(const float* scores, int64_t n, float* maximum, float* sum);
  // weights = 2^(scores - maximum) * factor
  void (*weigh)(const float* scores, int64_t n, float maximum, float factor, float* weights);
  // scores = (add ? scores : 0) + (dots + offset) * factors[position * stride]
  void (*finish)(float* scores, const float* dots, int64_t n, bool add, float offset,
                 const float* factors, int64_t stride, const int32_t* list, int64_t first);
  // Keeps the `budget` largest of n scores, the first among equal ones: moves them to the front
  // and writes their positions. Returns how many (fewer only if there are NaNs).
  int64_t (*select)(float* scores, int64_t n, int64_t budget, const int32_t* list,
                    int32_t* positions, float* scratch);
  void (*widen)(Element element, const void* from, int64_t n, float* to);
  void (*narrow)(Element element, const float* from, int64_t n, void* to);
};
SL_TABLE(RowKernels, decode_rows)

}  // namespace sparseloom
