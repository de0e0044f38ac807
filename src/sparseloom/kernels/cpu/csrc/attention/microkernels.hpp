// The two products of attention for a tile of R query rows and a list of gathered keys.
//
// Scores hold in their lanes the R rows times G = W / R neighbouring dims, against broadcasts of G dims of a key; adjacent lanes
// are added last (one row: dims only). No key is transposed.
// Values keep the dims in the lanes and broadcast the probabilities.
#pragma once

#include "simd.hpp"

namespace sparseloom::SL_TIER {

// ---------------------------------------------------------------- lane shuffles

// [a0+a1, a2+a3, ..., b0+b1, b2+b3, ...]
SL_INLINE F add_pairs(F a, F b) {
#if SL_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v),
                        _mm512_permutex2var_ps(a.v, odd, b.v))};
#elif SL_AVX2
  const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a.v, b.v));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8))};
#else
  return {Lanes{a.v[0] + a.v[1], a.v[2] + a.v[3], b.v[0] + b.v[1], b.v[2] + b.v[3]}};
#endif
}

// Interleaves groups of G lanes: low = [a0.. b0.. a1.. b1..] of the first halves, high of the last.
template <int G>
struct ZipOrder {
  alignas(64) int32_t places[2 * W] = {};
  constexpr ZipOrder() {
    for (int i = 0; i < 2 * W; ++i)
      places[i] = i / (2 * G) * G + i % G + (i % (2 * G) < G ? 0 : W);
  }
};
template <int G>
static constexpr ZipOrder<G> zip_order{};

template <int G>
SL_INLINE void zip(F a, F b, F& low, F& high) {
  const int32_t* order = zip_order<G>.places;
#if SL_AVX512
  low = {_mm512_permutex2var_ps(a.v, _mm512_load_si512(order), b.v)};
  high = {_mm512_permutex2var_ps(a.v, _mm512_load_si512(order + W), b.v)};
#else
  float both[2 * W], mixed[2 * W];
  store(both, a);
  store(both + W, b);
  for (int i = 0; i < 2 * W; ++i) mixed[i] = both[order[i]];
  low = load(mixed);
  high = load(mixed + W);
#endif
}

// ---------------------------------------------------------------- rows to lanes

// Copies `count` of n numbers per row into fp32, times `factor`, and zeroes up to `padded`.
template <class T>
SL_INLINE void widen_row(const T* from, float* to, int n, int padded, F factor) {
  int d = 0;
  for (; d + W <= n; d += W) store(to + d, load(from + d) * factor);
  if (d < n) {
    store(to + d, load_n(from + d, n - d) * factor);
    d += W;
  }
  for (; d < padded; d += W) store(to + d, zero());
}

// Transposes R rows of `width` numbers (a multiple of W, row r at rows + r * stride) into
// width / G vectors of R x G lanes, vector t holding dims t * G ... t * G + G - 1 of every row.
template <int R>
SL_INLINE void rows_to_lanes(const float* rows, int stride, int width, float* packed) {
  constexpr int G = W / R;
  for (int d = 0; d < width; d += W) {
    F a[R], b[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = load(rows + r * stride + d);
#pragma GCC unroll 4
    for (int stage = 1; stage < R; stage *= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < R / 2; ++r) zip<G>(a[r], a[r + R / 2], b[2 * r], b[2 * r + 1]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) a[r] = b[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(packed + (d / G + r) * W, a[r]);
  }
}

// ---------------------------------------------------------------- scores: s[k * R + r] = row r · key k

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
  if constexpr (R == 1 && W == 8) {  // as many chains of sums as keys, whose addresses fit in registers
    const float* key[NK];
    for (int k = 0; k < NK; ++k) key[k] = keys[k] + at, acc[k] = zero();
    for (int d = 0; d < width; d += W) {
      const F row = load(packed + d);
#pragma GCC unroll 8
      for (int k = 0; k < NK; ++k) acc[k] = fma(row, load(key[k] + d), acc[k]);
    }
  } else if constexpr (R == 1) {
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

// Scores of R rows, `packed` as from rows_to_lanes, and n keys, whose numbers start `at` behind the
// given addresses; `width` dims, a multiple of W. Whole vectors are written: `keys` is read up to the next multiple
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

// ---------------------------------------------------------------- values

// sums[r][0 ... NV*W) += sum over keys of weights[key * R + r] * values[key][0 ... NV*W),
// for the rows 0 ... RT - 1 of the R that `weights` holds per key.
template <int R, int RT, int NV>
SL_INLINE void value_block(const float* weights, const float* const* values, int keys, int at,
                           float* sums, int stride) {
  F acc[RT][NV];
#pragma GCC unroll 8
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = load(sums + r * stride + v * W);
  for (int k = 0; k < keys; ++k) {
    const float* row = values[k] + at;
    F value[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) value[v] = load(row + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < RT; ++r) {
      if constexpr (NV == 1) {
        acc[r][0] = fma_repeat(value[0], weights + k * R + r, acc[r][0]);
        continue;
      }
      const F weight = set1(weights[k * R + r]);  // one load for all of them
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(sums + r * stride + v * W, acc[r][v]);
}

// All rows and `width` dims (a multiple of W).
template <int R>
SL_INLINE void add_values(const float* weights, const float* const* values, int keys, int width,
                          float* sums, int stride) {
  constexpr int MOST = SL_AVX512 ? 8 : 4;
  constexpr int RT = R < MOST ? R : MOST;
  // Eight chains of sums hide the latency of the FMA; with 32 registers there may be more.
  constexpr int NV = SL_AVX512 ? (RT <= 4 ? 4 : 2) : SL_AVX2 ? 8 / RT : 2;
  for (int r = 0; r < R; r += RT) {
    int d = 0;
    for (; d + NV * W <= width; d += NV * W)
      value_block<R, RT, NV>(weights + r, values, keys, d, sums + r * stride + d, stride);
    if constexpr (NV > 4)
      for (; d + 4 * W <= width; d += 4 * W)
        value_block<R, RT, 4>(weights + r, values, keys, d, sums + r * stride + d, stride);
    for (; d < width; d += W)
      value_block<R, RT, 1>(weights + r, values, keys, d, sums + r * stride + d, stride);
  }
}

}  // namespace sparseloom::SL_TIER
