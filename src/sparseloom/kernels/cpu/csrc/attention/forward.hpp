// Sparse attention, forward: what one call is, and the work on one group of query rows.
#pragma once

#include <cstdint>

#include "attention/dropout.hpp"
#include "dispatch.hpp"

namespace sparseloom {

enum class Type : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// (batch, heads, length, dim) with neighbouring dims adjacent; strides in elements.
struct View {
  void* data;
  int64_t batch, head, row;
};

struct ForwardArgs {
  Type type;
  View query, key, value, out;
  int batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  // A SparseMask: head h of `heads` uses mask head h * mask_heads / heads.
  const int32_t* indices;
  const int64_t* offsets;  // (mask_batch, mask_heads, q_blocks + 1)
  int mask_batch, mask_heads, bq, bk;
  const uint8_t* key_padding;  // (batch, kv_len), or null
  bool causal;
  float scale;
  float* lse;             // (batch, heads, q_len), or null
  float* key_importance;  // (batch, heads, kv_len), or null
  float* head_importance; // (batch, heads), or null
  Dropout dropout;        // threshold 0 drops nothing
  // Filled in by the driver.
  int segment;  // keys that stay in the cache together, a multiple of bk
};

// Some query blocks of one head: what one thread takes at a time.
struct ForwardItem {
  int batch, head, first_block, end_block;
};

constexpr int GROUP_TILES = 32;  // row tiles whose state is kept at once

// Numbers that the scratch of one thread holds, in floats.
struct ForwardScratch {
  int64_t queries, sums, keys, values, scores, list, weights, total;
};

// What one thread adds up for one head; flushed when the head changes.
struct Importance {
  float* keys;  // (kv_len)
  float head;
};

struct ForwardKernels {
  int lanes;
  ForwardScratch (*scratch)(const ForwardArgs& args);
  void (*run)(const ForwardArgs& args, const ForwardItem& item, float* scratch,
              Importance* importance);
};

SL_TABLE(ForwardKernels, forward_kernels)

}  // namespace sparseloom
