// The products of the backward pass that the forward pass does not have: scores of a few keys at a
// time, and sums scattered over keys. R query rows (R divides W) of whole vectors; what belongs to a
// pair lies key by key: s[k * R + r]. Rows of keys start `at` numbers behind the given addresses.
#pragma once

#include <stddef.h>

#include "attention/microkernels.hpp"

namespace sparseloom::SL_TIER {

// ------------------------------------------------------------ s[k * R + r] = row r · key k

// The sums of each group of N neighbouring lanes of N vectors, as one vector.
template <int N>
SL_INLINE F add_groups(const F* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    F half[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) half[i] = add_pairs(x[2 * i], x[2 * i + 1]);
    return add_groups<N / 2>(half);
  }
}

template <int R, int NK>
SL_INLINE void score_some(const float* packed, const float* const* keys, int at, int width, float* s) {
  constexpr int G = W / R;
  F acc[NK];
  if constexpr (R == 1) {
#pragma GCC unroll 16
    for (int k = 0; k < NK; ++k) {
      const float* key = keys[k] + at;
      acc[k] = load(packed) * load(key);
      for (int d = W; d < width; d += W) acc[k] = fma(load(packed + d), load(key + d), acc[k]);
    }
  } else {
    const float* key[NK];
    F more[NK];  // a second set of sums: eight alone would only just hide the latency of the FMA
    for (int k = 0; k < NK; ++k) key[k] = keys[k] + at;
    for (int k = 0; k < NK; ++k) acc[k] = more[k] = zero();
    for (int d = 0; d < width; d += 2 * G) {
      const F even = load(packed + d * R), odd = load(packed + d * R + W);
#pragma GCC unroll 16
      for (int k = 0; k < NK; ++k) {
        acc[k] = fma(even, repeat<G>(key[k] + d), acc[k]);
        more[k] = fma(odd, repeat<G>(key[k] + d + G), more[k]);
      }
    }
    for (int k = 0; k < NK; ++k) acc[k] = acc[k] + more[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < NK; k += G) store(s + k * R, add_groups<G>(acc + k));
}

// `packed` as from rows_to_lanes. Whole vectors are written: `keys` is read up to the next multiple
// of W / R.
template <int R>
SL_INLINE void score_keys(const float* packed, const float* const* keys, int at, int n, int width,
                          float* s) {
  constexpr int G = W / R, MOST = SL_AVX512 ? 8 : SL_AVX2 ? 4 : 2, NK = G > MOST ? G : MOST;
  int k = 0;
  for (; k + NK <= n; k += NK) score_some<R, NK>(packed, keys + k, at, width, s + k * R);
  if constexpr (NK > 4 && G <= 4)
    for (; k + 4 <= n; k += 4) score_some<R, 4>(packed, keys + k, at, width, s + k * R);
  for (; k < n; k += G) score_some<R, G>(packed, keys + k, at, width, s + k * R);
}

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
