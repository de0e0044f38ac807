// Prediction and selection: codes of q and k from the hidden states, their products, one score per
// block, the best keys of each query block.
#pragma once

#include <stdint.h>

#include "../dispatch.hpp"

namespace sparseloom {

// Codes that a product reads are packed in panels of 16 columns: in each panel, depth / 4 groups of
// four consecutive codes per column, [depth / 4][16][4]. `sums` holds 128 times the sum of each
// column, which products of codes biased by 128 (those of VNNI) take off again. Small codes of keys are
// packed otherwise with AVX2 (`pairs.hpp`).
constexpr long PANEL = 16;
constexpr long ROWS = 16;  // rows that are multiplied at once
// Where scores go by 16 bits (`fast.hpp`), keys come in whole slabs of 8 panels, after 4 that may be
// read, and a row of codes takes 4 times its depth.
constexpr long PANELS_TOGETHER = 8, PANELS_BEFORE = 4, ROW_PARTS = 4;

inline long round_up(long n, long step) { return (n + step - 1) / step * step; }

// Depth that products need: whole groups of 4, in equal parts of at most 64 (one AMX tile each).
inline long padded_depth(long depth) {
  const long parts = (depth + 63) / 64;
  return parts ? round_up((depth + parts - 1) / parts, 4) * parts : 0;
}

struct EncodeArgs {
  const void* hidden;  // (batch, length, hidden_size), fp32, bf16 or fp16
  int dtype;           // 0, 1, 2
  long batch, length, hidden_size, batch_stride, row_stride;
  float input_scale;
  float most;              // largest code
  const int8_t* weights;   // packed, depth x columns
  const int32_t* sums;     // columns
  const float* scale;      // columns: input scale times column scale
  long depth, columns;     // padded
  const float *cos, *sin;  // null: no rotation
  long rotary_batch_stride, rotary_row_stride;
  const int64_t* chosen;   // which frequencies, `pairs` of them
  long pairs;
  const float* key_scale;  // heads
  long heads, width;
  int bits;
  float unit;              // factor of the scale of q
  int8_t *q, *k;           // (batch, heads, length, width)
  float* q_scale;          // (batch, heads, length)
};

enum class Pooling : int { none = 0, mass = 1, max = 2, mean = 3 };

struct SelectArgs {
  const int8_t *q, *k;   // (batch, heads, q_len | kv_len, width)
  const float* q_scale;  // (batch, heads, q_len)
  const float* k_scale;  // heads
  long batch, heads, q_len, kv_len, width;
  long bq, bk;
  bool causal;
  Pooling pooling;
  const uint8_t* key_padding;  // (1 or batch, kv_len), null: no padding
  long key_padding_stride;     // 0 if shared
  const uint8_t* voters;       // (1 or batch, q_len), null: all
  long voters_stride;
  const int64_t *visible, *budget;  // (1 or batch, q_blocks)
  long visible_stride, budget_stride;
  const int64_t* diagonal;  // (q_blocks, 2)
  const int64_t* offsets;   // (batch, heads, q_blocks + 1); null: count only
  const float* thresholds;  // heads; null: top-k
  int64_t* counts;          // (batch, heads, q_blocks), where thresholds only count
  int32_t* out;
  float* pooled;  // (batch, heads, q_blocks, kv_blocks): write the block scores and select nothing
};

// Keys that are attended, in order: padding is left out before anything is multiplied.
struct KeyMap {
  long count;            // attended keys
  const int32_t* place;  // their places among all keys; null: all keys are attended
  const int32_t* before;  // (kv_len + 1) attended keys before each key; null likewise
};

struct Keys {  // of one batch entry and head
  const int8_t* codes;  // packed
  const int32_t* sums;
  long depth;
  bool small;  // their scores fit in 16 bits
  int largest, largest_q;  // largest codes of keys and of queries
  KeyMap map;
};

// Where the last search for a level ended: rows that follow each other end nearby.
struct Guess {
  int level = 0;
  float slope = 0.1f;  // numbers per step of level
};

// What one thread works in. Rows are `stride` numbers apart.
struct Room {
  int32_t* scores;    // (ROWS + 1) rows
  int32_t* candidates;  // stride
  int8_t* rows;       // (ROWS, ROW_PARTS · depth)
  Guess* guess;
  long stride;
};

struct PredictKernels {
  // Products use registers that the thread has to set up first (AMX).
  void (*begin)(long depth);
  void (*end)();
  // Rows first ... first + count - 1 (count <= ROWS) of batch entry b; false: a number is not finite.
  bool (*encode)(const EncodeArgs& args, long b, long first, long count, int8_t* codes,
                 int32_t* products, float* low);
  int (*largest)(const int8_t* codes, long count);
  // Whether scores of such largest codes are to go by 16 bits (`fast.hpp`).
  bool (*small)(long width, int largest, int largest_q);
  void (*pack)(const int8_t* codes, long width, const Keys& keys, long first_panel,
               long last_panel, int8_t* packed, int32_t* sums);
  // The query blocks first ... last - 1; at most max(1, ROWS / bq) of them.
  void (*select)(const SelectArgs& args, const Keys& keys, long b, long h, long first, long last,
                 const Room& room);
};
SL_TABLE(PredictKernels, predict_kernels)

// Drivers; both return the bytes that they worked in.
long encode(const EncodeArgs& args, int threads, bool* finite);
long select(const SelectArgs& args, int threads);

}  // namespace sparseloom
