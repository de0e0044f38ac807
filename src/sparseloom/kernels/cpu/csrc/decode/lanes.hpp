// What decoding needs beyond simd.hpp: integers as vectors, and W sums at once.
#pragma once

#include "simd.hpp"

namespace sparseloom::SL_TIER {

#if SL_AVX512

SL_INLINE F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
SL_INLINE F load_n(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
SL_INLINE F load(const int16_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)))};
}
SL_INLINE F load_n(const int16_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(first(n), p)))};
}
SL_INLINE void split_nibbles(__m128i bytes, F& low, F& high) {
  const __m512i wide = _mm512_cvtepu8_epi32(bytes);
  low.v = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
  high.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}
SL_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  split_nibbles(_mm_loadu_si128((const __m128i*)p), low, high);
}
SL_INLINE void load_nibbles_n(const uint8_t* p, int n, F& low, F& high) {
  split_nibbles(_mm_maskz_loadu_epi8(first(n), p), low, high);
}

// Lane i of the result is the sum of the lanes of a[i]. Overwrites a.
SL_INLINE F sums(F (&a)[16]) {
  __m512 b[8], c[4], d[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // lane pairs (i, i + 8)
    const __m512 x = a[i].v, y = a[i + 8].v;
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                         _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_ps(_mm512_shuffle_ps(c[i], c[i + 2], 0x44),
                         _mm512_shuffle_ps(c[i], c[i + 2], 0xee));
  const __m512 e = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88),
                                 _mm512_shuffle_ps(d[0], d[1], 0xdd));
  // Each step put its two operands side by side in the lanes: undo that order.
  const __m512i order =
      _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return {_mm512_permutexvar_ps(order, e)};
}

#else

#if SL_AVX2
SL_INLINE F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
SL_INLINE F load(const int16_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
SL_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low.v = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
  high.v = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}
#else
template <class Integer>
SL_INLINE F load_integers(const Integer* p) {
  return {Lanes{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                static_cast<float>(p[3])}};
}
SL_INLINE F load(const int8_t* p) { return load_integers(p); }
SL_INLINE F load(const int16_t* p) { return load_integers(p); }
SL_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  for (int i = 0; i < W; ++i) {
    low.v[i] = static_cast<float>(p[i] & 15);
    high.v[i] = static_cast<float>(p[i] >> 4);
  }
}
#endif

template <class Integer>
SL_INLINE F load_integers_n(const Integer* p, int n) {
  float wide[W] = {};
  for (int i = 0; i < n; ++i) wide[i] = static_cast<float>(p[i]);
  return load(static_cast<const float*>(wide));
}
SL_INLINE F load_n(const int8_t* p, int n) { return load_integers_n(p, n); }
SL_INLINE F load_n(const int16_t* p, int n) { return load_integers_n(p, n); }
SL_INLINE void load_nibbles_n(const uint8_t* p, int n, F& low, F& high) {
  uint8_t bytes[W] = {};
  for (int i = 0; i < n; ++i) bytes[i] = p[i];
  load_nibbles(bytes, low, high);
}

#if SL_AVX2
SL_INLINE F sums(F (&a)[8]) {
  __m256 b[4];
  for (int i = 0; i < 4; ++i) b[i] = _mm256_hadd_ps(a[2 * i].v, a[2 * i + 1].v);
  const __m256 c = _mm256_hadd_ps(b[0], b[1]), d = _mm256_hadd_ps(b[2], b[3]);
  return {_mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31))};
}
#else
SL_INLINE F sums(F (&a)[4]) { return {Lanes{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}}; }
#endif

#endif

}  // namespace sparseloom::SL_TIER
