// Dense attention: one item is a block of queries that share a key head, against all keys, or under a
// mask of tiles against those of the keys that some query of the block keeps.
//
// Scores are computed transposed, a row per key and a lane per query, so that maxima, sums and
// masks are plain vector arithmetic and the rows of keys and values are read where they lie.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "dispatch.hpp"

namespace sparseloom {

// (batch, heads, length, dim) with neighbouring dims adjacent; strides in elements.
struct DenseView { const void* data; int64_t batch, head, row; };

// Tiles begin ... end - 1 of MASK_KEYS keys: as they are (log2 = 0), or as means over segments of
// 2^log2 keys, each of which counts as often as it has keys that are there and not padding.
struct Run { int32_t begin, end, log2; };

constexpr int LOG2S = 4;  // 0 ... 3

struct DenseArgs {
  DenseView query, key, value;
  void* out;              // (batch, heads, q_len, value_dim), contiguous, as all below
  float* lse;             // (batch, heads, q_len), or null
  float* columns;         // (batch, heads, kv_len): sums of probabilities over queries, or null
  float* magnitude;       // (batch, heads, q_len): sum of |out| over value_dim, or null
  const uint8_t* attend;  // (batch, kv_len), 0 = padding, or null: all attend
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  float scale;
  bool causal;  // query i sees key j if j <= i + kv_len - q_len
  // `offsets` null: every pair. Else what each block of MASK_QUERIES queries keeps, by log2 and then by tile;
  // no tile twice. Head h of `heads` uses mask head h * mask_heads / heads. Causality is not asked of
  // means. No columns then.
  const Run* runs;
  const int64_t* offsets;  // (mask_batch, mask_heads, ceil(q_len / MASK_QUERIES) + 1)
  int64_t mask_batch, mask_heads;
  // Filled in by the driver.
  int means;  // bit l: some run has log2 = l > 0
};

constexpr int64_t MASK_QUERIES = 16, MASK_KEYS = 32;

// Rows first ... first + count - 1 of the heads / kv_heads * q_len query rows of a key head.
struct DenseItem { int64_t batch, kv_head, first, count; };

// Keys first ... first + count - 1 as query head `head` sees them.
struct DenseColumns { int64_t batch, head, first, count; };

struct DenseKernels {
  int block;  // most queries of an item, and most keys of its counterpart for the column sums
  // What all items of a key head read: bytes, parts (prepared independently), and the preparation of
  // one part.
  size_t (*head_bytes)(const DenseArgs&);
  int64_t (*head_parts)(const DenseArgs&);
  void (*prepare)(const DenseArgs&, int64_t batch, int64_t kv_head, void* head, int64_t part);
  size_t (*scratch_bytes)(const DenseArgs&);  // for each worker
  void (*attend)(const DenseArgs&, const DenseItem&, const void* head, void* scratch);
  // Needs args.lse as written by attend.
  void (*columns)(const DenseArgs&, const DenseColumns&, void* scratch);
};

enum class DenseType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct DenseTable { const DenseKernels* of[3]; };  // by DenseType

SL_TABLE(DenseTable, dense_table)

void dense_forward(const DenseArgs& args, DenseType type, int threads);

}  // namespace sparseloom
