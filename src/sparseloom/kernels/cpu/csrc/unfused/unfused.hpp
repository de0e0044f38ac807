// The unfused three on the tiles of a mask: SDDMM, sparse softmax, SpMM. All numbers are fp32.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "dense/dense.hpp"

namespace sparseloom {

struct UnfusedArgs {
  // A mask of all batches and heads: row (b, h, i) is a block of bq queries.
  const int32_t* indices;
  const int64_t* offsets;  // (batch, heads, q_blocks + 1)
  int64_t batch, heads, q_blocks, bq, bk, q_len, kv_len;
  DenseView query;  // SDDMM
  DenseView key;    // SDDMM: keys, SpMM: values
  int64_t kv_heads, dim;
  const float* from;      // (nnz, bq, bk): scores of softmax, probabilities of SpMM
  float* to;              // (nnz, bq, bk), SpMM: (batch, heads, q_len, dim)
  const uint8_t* attend;  // (batch, kv_len), 0 = padding, or null
  float scale;
  bool causal;
};

// Each works on one row of the mask.
struct UnfusedKernels {
  size_t (*scratch_bytes)(const UnfusedArgs&);
  void (*sddmm)(const UnfusedArgs&, int64_t row, float* scratch);
  void (*softmax)(const UnfusedArgs&, int64_t row, float* scratch);
  void (*spmm)(const UnfusedArgs&, int64_t row, float* scratch);
};

SL_TABLE(UnfusedKernels, unfused_kernels)

enum class UnfusedStep : int { sddmm = 0, softmax = 1, spmm = 2 };

void unfused_run(const UnfusedArgs& args, UnfusedStep step, int threads);

}  // namespace sparseloom
