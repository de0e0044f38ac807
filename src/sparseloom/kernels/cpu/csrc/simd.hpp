// One vector of W fp32 numbers per tier, and the few operations that the kernels need.
// Lane counts: 16 (AVX-512), 8 (AVX2), 4 (portable, by the compilers' vector extension).
#pragma once

#include <stdint.h>
#include <string.h>

#include "tier.hpp"

#if SL_AVX2
#include <immintrin.h>
#endif

namespace sparseloom::SL_TIER {

// ---------------------------------------------------------------- scalars of 16 bits

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

SL_INLINE float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
SL_INLINE uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

SL_INLINE float to_float(float x) { return x; }
SL_INLINE float to_float(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
SL_INLINE float to_float(Fp16 x) {
#if SL_AVX2
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // 2^112 puts the exponent right, for subnormal numbers too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
#endif
}

SL_INLINE void from_float(float x, float& out) { out = x; }
SL_INLINE void from_float(float x, Bf16& out) {
  const uint32_t bits = to_bits(x);
  out.bits = x != x ? static_cast<uint16_t>(bits >> 16 | 0x40)
                    : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SL_INLINE void from_float(float x, Fp16& out) {
#if SL_AVX2
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) half = 0x7e00;
  else if (rest >= 0x477ff000) half = 0x7c00;  // rounds to 65520 or more: infinite
  else if (rest < 0x38800000) half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;  // subnormal
  else half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// ---------------------------------------------------------------- vectors

#if SL_AVX512

constexpr int W = 16;
struct F { __m512 v; };

SL_INLINE F zero() { return {_mm512_setzero_ps()}; }
SL_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
SL_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
SL_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
SL_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
// The first n lanes, 0 <= n <= W; the others are 0 and their memory is not touched.
SL_INLINE F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
SL_INLINE void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
SL_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
SL_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
SL_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
SL_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
SL_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
SL_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
SL_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
SL_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
SL_INLINE float sum(F a) { return _mm512_reduce_add_ps(a.v); }
SL_INLINE float largest(F a) { return _mm512_reduce_max_ps(a.v); }
// a < b ? x : y
SL_INLINE F where_less(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// The G floats at p, again and again: lane i holds p[i % G].
template <int G>
SL_INLINE F repeat(const float* p) {
  if constexpr (G == 1) return {_mm512_set1_ps(*p)};
  if constexpr (G == 2) { double d; memcpy(&d, p, 8); return {_mm512_castpd_ps(_mm512_set1_pd(d))}; }
  if constexpr (G == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
  if constexpr (G == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
  if constexpr (G == 16) return load(p);
}
SL_INLINE F load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
SL_INLINE F load_n(const Bf16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
SL_INLINE F load(const Fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SL_INLINE F load_n(const Fp16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
SL_INLINE __m256i bf16_bits(F a) {
#if SL_AVX512_BF16
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  up = _mm512_mask_mov_epi32(up, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
SL_INLINE void store(Bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits(a)); }
SL_INLINE void store_n(Bf16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), bf16_bits(a)); }
SL_INLINE void store(Fp16* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
SL_INLINE void store_n(Fp16* p, F a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
SL_INLINE F scale_by_power(F a, F n, F) { return {_mm512_scalef_ps(a.v, n.v)}; }
// a * *p + c, the number broadcast by the load itself: a separate broadcast takes the place of an
// FMA on Sapphire Rapids, and compilers split it off where the number is used twice.
SL_INLINE F fma_repeat(F a, const float* p, F c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(a.v), "m"(*p));
  return c;
}

#elif SL_AVX2

constexpr int W = 8;
struct F { __m256 v; };

SL_INLINE F zero() { return {_mm256_setzero_ps()}; }
SL_INLINE F set1(float x) { return {_mm256_set1_ps(x)}; }
SL_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
SL_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
SL_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// A masked store takes ten cycles and more on AMD processors, whatever its mask.
SL_INLINE F load_n(const float* p, int n) { return n == W ? load(p) : F{_mm256_maskload_ps(p, first(n))}; }
SL_INLINE void store_n(float* p, F a, int n) {
  if (n == W) store(p, a);
  else _mm256_maskstore_ps(p, first(n), a.v);
}
SL_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
SL_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
SL_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
SL_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
SL_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SL_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
SL_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
SL_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
SL_INLINE F where_less(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
SL_INLINE float sum(F a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
SL_INLINE float largest(F a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
template <int G>
SL_INLINE F repeat(const float* p) {
  if constexpr (G == 1) return {_mm256_set1_ps(*p)};
  if constexpr (G == 2) { double d; memcpy(&d, p, 8); return {_mm256_castpd_ps(_mm256_set1_pd(d))}; }
  if constexpr (G == 4) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
  if constexpr (G == 8) return load(p);
}
SL_INLINE F load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
SL_INLINE F load(const Fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
SL_INLINE __m128i bf16_bits(F a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  up = _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  up = _mm256_srli_epi32(up, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
SL_INLINE void store(Bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_bits(a)); }
SL_INLINE void store(Fp16* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// p[i] * 2^n, where `shifted` is n + 1.5 * 2^23: its lowest bits are those of the integer n.
SL_INLINE F scale_by_power(F a, F, F shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), n))};
}

#else

constexpr int W = 4;
typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
struct F { Lanes v; };

SL_INLINE F zero() { return {Lanes{0, 0, 0, 0}}; }
SL_INLINE F set1(float x) { return {Lanes{x, x, x, x}}; }
SL_INLINE F load(const float* p) { F a; memcpy(&a.v, p, 16); return a; }
SL_INLINE void store(float* p, F a) { memcpy(p, &a.v, 16); }
SL_INLINE F load_n(const float* p, int n) {
  F a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
SL_INLINE void store_n(float* p, F a, int n) { for (int i = 0; i < n; ++i) p[i] = a.v[i]; }
SL_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
SL_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
SL_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
SL_INLINE F operator/(F a, F b) { return {a.v / b.v}; }
SL_INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
SL_INLINE F pick(IntLanes mask, F x, F y) { return {(Lanes)((mask & (IntLanes)x.v) | (~mask & (IntLanes)y.v))}; }
SL_INLINE F max(F a, F b) { return pick(a.v > b.v, a, b); }
SL_INLINE F min(F a, F b) { return pick(a.v < b.v, a, b); }
SL_INLINE F abs(F a) { return {(Lanes)((IntLanes)a.v & 0x7fffffff)}; }
SL_INLINE F where_less(F a, F b, F x, F y) { return pick(a.v < b.v, x, y); }
SL_INLINE float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
SL_INLINE float largest(F a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
template <int G>
SL_INLINE F repeat(const float* p) {
  if constexpr (G == 1) return set1(*p);
  if constexpr (G == 2) return {Lanes{p[0], p[1], p[0], p[1]}};
  if constexpr (G == 4) return load(p);
}
template <class Half>
SL_INLINE F load(const Half* p) {
  return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class Half>
SL_INLINE void store(Half* p, F a) { for (int i = 0; i < W; ++i) from_float(a.v[i], p[i]); }
SL_INLINE F scale_by_power(F a, F, F shifted) {
  return {(Lanes)((IntLanes)a.v + ((IntLanes)shifted.v << 23))};
}

#endif

#if !SL_AVX512
template <class Half>
SL_INLINE F load_n(const Half* p, int n) {
  float wide[W] = {};
  for (int i = 0; i < n; ++i) wide[i] = to_float(p[i]);
  return load(static_cast<const float*>(wide));
}
template <class Half>
SL_INLINE void store_n(Half* p, F a, int n) {
  float wide[W];
  store(wide, a);
  for (int i = 0; i < n; ++i) from_float(wide[i], p[i]);
}
#endif

// Towards the nearest cache, or the one behind it.
SL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
SL_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

#if !SL_AVX512
SL_INLINE F fma_repeat(F a, const float* p, F c) { return fma(a, set1(*p), c); }
#endif

// 2^x for x <= 126, to a relative 2e-7; exactly 0 for x < -126 (and for -inf).
SL_INLINE F exp2(F x) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23 rounds to integers when added
  const F low = set1(-126.0f);
  const F clamped = max(low, x);  // in this order NaN stays NaN
  const F shifted = clamped + magic, n = shifted - magic, f = clamped - n;
  F p = set1(1.32647e-3f);
  p = fma(p, f, set1(9.67151e-3f));
  p = fma(p, f, set1(5.550734e-2f));
  p = fma(p, f, set1(2.4022242e-1f));
  p = fma(p, f, set1(6.9314698e-1f));
  p = fma(p, f, set1(1.0f));
  return where_less(x, low, zero(), scale_by_power(p, n, shifted));
}

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

}  // namespace sparseloom::SL_TIER
