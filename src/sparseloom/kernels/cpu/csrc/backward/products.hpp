// The product of the backward pass that the forward pass does not have: sums scattered over keys. R
// query rows (R divides W) of whole vectors; what belongs to a pair lies key by key: s[k * R + r].
// Rows of keys start `at` numbers behind the given addresses.
#pragma once

#include <stddef.h>

#include "attention/microkernels.hpp"

namespace sparseloom::SL_TIER {

// ------------------------------------------------------------ out[k] += Σ_r weights[k * R + r] row[r]

template <int R, int NK, int NV>
SL_INLINE void scatter_block(const float* weights, const float* rows, ptrdiff_t row_stride,
                             float* const* out, int at) {
  F acc[NK][NV];
#pragma GCC unroll 4
  for (int k = 0; k < NK; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[k][v] = load(out[k] + at + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    F row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(rows + r * row_stride + v * W);
#pragma GCC unroll 4
    for (int k = 0; k < NK; ++k) {
      const F weight = set1(weights[k * R + r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[k][v] = fma(weight, row[v], acc[k][v]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < NK; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out[k] + at + v * W, acc[k][v]);
}

template <int R, int NK>
SL_INLINE void scatter_some(const float* weights, const float* rows, ptrdiff_t row_stride,
                            float* const* out, int at, int width) {
  int d = 0;
  for (; d + 4 * W <= width; d += 4 * W)
    scatter_block<R, NK, 4>(weights, rows + d, row_stride, out, at + d);
  for (; d < width; d += W) scatter_block<R, NK, 1>(weights, rows + d, row_stride, out, at + d);
}

// No two of `out` may be the same row: several are held in registers at once.
template <int R>
SL_INLINE void scatter(const float* weights, const float* rows, ptrdiff_t row_stride,
                       float* const* out, int at, int n, int width) {
  constexpr int NK = SL_AVX512 ? 4 : 2;
  int k = 0;
  for (; k + NK <= n; k += NK)
    scatter_some<R, NK>(weights + k * R, rows, row_stride, out + k, at, width);
  for (; k < n; ++k) scatter_some<R, 1>(weights + k * R, rows, row_stride, out + k, at, width);
}

}  // namespace sparseloom::SL_TIER
