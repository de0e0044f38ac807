// Gradients of sparse attention: what Python passes, what one worker does, the table of kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "attention/dropout.hpp"
#include "attention/forward.hpp"

namespace sparseloom {

struct BackwardTensor {
  View view;
  Type type;
};

static inline int64_t element_bytes(Type type) { return type == Type::fp32 ? 4 : 2; }

struct BackwardCall {
  BackwardTensor query, key, value, out, grad_out;
  const float* lse;                  // (batch, heads, q_len), -inf: a row without keys
  const float* grad_lse;             // the same shape, or null
  const float* grad_key_importance;  // (batch, heads, kv_len), or null
  void *grad_query, *grad_key, *grad_value;  // contiguous, of the type of the inputs
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  const int32_t* indices;
  const int64_t* offsets;  // null: all pairs are kept, and block_q only cuts the rows
  int64_t mask_batch, mask_heads, block_q, block_k;
  const uint8_t* key_padding;  // (batch, kv_len), 1 = attend, or null
  bool causal, dropped;
  float scale;
  Dropout drop;

  // What the driver adds.
  int64_t q_blocks;
  int64_t key_width, value_width;  // dims rounded up to whole vectors
  int64_t keys_at_once;            // keys whose records stay in the L2 cache
};

// Query blocks [first, last) of the heads that share one key head, counted head by head.
struct BackwardItem {
  int64_t b, kv_head, first, last;
  float *grad_key, *grad_value;  // (kv_len, width), fp32
};

// Of one worker; 64-byte aligned, null where it is not needed.
struct BackwardScratch {
  float* records;              // of keys_at_once keys
  float* grad_query;           // (q_len, key_width)
  float *lse2, *delta;         // (q_len)
  int64_t* cursor;             // (q_blocks)
  float* tile;                 // backward_tile_floats
};

constexpr int BACKWARD_CHUNK = 64;  // keys whose scores are held at once
constexpr int BACKWARD_ROWS = 16;   // most query rows of a tile

static inline int64_t backward_record_floats(const BackwardCall& c) {
  return 2 * (c.key_width + c.value_width) + 16;
}

static inline int64_t backward_tile_floats(const BackwardCall& c) {
  return BACKWARD_ROWS * (3 * c.key_width + 2 * c.value_width + 4 * BACKWARD_CHUNK) +
         2 * BACKWARD_CHUNK + 4 * BACKWARD_ROWS;
}

struct BackwardKernels {
  int lanes;
  void (*run)(const BackwardCall&, const BackwardItem&, const BackwardScratch&);
  // Adds `parts` arrays (rows, width), `distance` floats apart, and rounds them to (rows, dim).
  void (*finish)(const float* parts, int64_t count, int64_t distance, int64_t rows, int64_t width,
                 int64_t dim, Type type, void* out);
};
SL_TABLE(BackwardKernels, backward_kernels)

void backward(BackwardCall call, int threads);

}  // namespace sparseloom
