// AMX tiles of 16 rows of 64 bytes, and how matrices in memory become tiles.
#pragma once

#include "dense/lanes.hpp"

namespace sparseloom::SL_TIER::dense {

constexpr int TILE = 1024;  // bytes
constexpr int CHUNK = 32;   // bf16 numbers in a row of a tile

SL_INLINE void set_tiles() {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  static_assert(sizeof config == 64, "the layout that LDTILECFG reads");
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  // GCC's _tile_loadconfig says that it reads 8 bytes: the other stores may then be left out.
  asm volatile("ldtilecfg %0" : : "m"(config));
}

SL_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Up to 32 bf16 numbers, n <= 0 allowed; the others are 0.
SL_INLINE __m512i load_bf16(const Bf16* p, int64_t n) {
  const __mmask32 mask = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// 16 rows, of which `live` exist, as `depth` tiles side by side, filled up with zeros.
static inline void copy_tiles(const Bf16* rows, int64_t stride, int64_t live, int64_t dim,
                              int64_t depth, char* tiles) {
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t d = 0; d < depth; ++d)
      _mm512_store_si512(tiles + d * TILE + i * 64,
                         i < live ? load_bf16(rows + i * stride + d * CHUNK, dim - d * CHUNK)
                                  : _mm512_setzero_si512());
}

// 32 rows, of which `live` exist, transposed: `widths` tiles of 16 columns each, a row per column.
static inline void transpose_tiles(const Bf16* rows, int64_t stride, int64_t live, int64_t dim,
                                   int64_t widths, char* tiles) {
  for (int64_t w = 0; w < widths; ++w) {
    const int64_t left = dim - w * 16;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    __m512 pairs[16];
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const Bf16* at = rows + 2 * p * stride + w * 16;
      const __m256i even = 2 * p < live ? _mm256_maskz_loadu_epi16(mask, at) : _mm256_setzero_si256();
      const __m256i odd =
          2 * p + 1 < live ? _mm256_maskz_loadu_epi16(mask, at + stride) : _mm256_setzero_si256();
      pairs[p] = _mm512_castsi512_ps(
          _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
    }
    transpose16(pairs);
#pragma GCC unroll 16
    for (int d = 0; d < 16; ++d) _mm512_store_ps(tiles + w * TILE + d * 64, pairs[d]);
  }
}

// 32 columns, of which `count` exist, as depth x 2 tiles: 16 pairs of numbers by 16 columns.
static inline void pack_pairs(const Bf16* const* columns, int count, int64_t dim, int64_t depth,
                              bool negate, char* tiles) {
  const __m512i sign = _mm512_set1_epi32(negate ? static_cast<int>(0x80008000u) : 0);
  for (int64_t d = 0; d < depth; ++d)
    for (int half = 0; half < 2; ++half) {
      __m512 tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int column = half * 16 + i;
        const __m512i numbers = column < count ? load_bf16(columns[column] + d * CHUNK, dim - d * CHUNK)
                                               : _mm512_setzero_si512();
        tile[i] = _mm512_castsi512_ps(_mm512_xor_si512(numbers, sign));
      }
      transpose16(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(tiles + (2 * d + half) * TILE + i * 64, tile[i]);
    }
}

// 2^x to a relative 9e-5, times the bias that cutting to bf16 takes off: a fraction cut to 7 bits
// loses 2^-8 on average, a number on average 2^-8 / (2 ln 2) of itself. 0 for -inf, NaN for NaN.
constexpr float CUT_BIAS = 1.00281776f;
SL_INLINE __m512 cut_power(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(7.706705261e-02f * CUT_BIAS);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.276449846e-01f * CUT_BIAS));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.951167835e-01f * CUT_BIAS));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(CUT_BIAS));
  return _mm512_scalef_ps(p, x);
}

}  // namespace sparseloom::SL_TIER::dense
