// Products of int8 codes with packed codes, exact in int32.
#pragma once

#include "../simd.hpp"
#include "predict.hpp"

namespace sparseloom::SL_TIER {

// Scores in 16 bits (`fast.hpp`). Processors with AMX have these extensions too; compilers may not.
#if SL_AMX && defined(__AVX512FP16__) && defined(__AVX512VBMI2__)
#define SL_FAST 1
#else
#define SL_FAST 0
#endif

// VNNI multiplies unsigned by signed codes: rows are stored with 128 added.
#if SL_AVX512 && !SL_AMX
constexpr int8_t BIAS = static_cast<int8_t>(-128);
#else
constexpr int8_t BIAS = 0;
#endif

// Products of small codes, in 16 bits (`pairs.hpp`).
#define SL_PAIRS (SL_AVX2 && !SL_AVX512)

SL_INLINE int32_t four(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

#if SL_AMX

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

SL_INLINE long tile_depth(long depth) { return depth / ((depth + 63) / 64); }

// Tiles 0 ... 3: sums of 16 rows x 16 columns; 4: rows and 5: packed columns of twice the depth,
// where that fits (`stream.hpp`); 6: rows, 7: columns.
static void begin_products(long depth) {
  const long bytes = tile_depth(depth), twice = 2 * depth <= 64 ? 2 * depth : bytes;
  const long rows[8] = {ROWS, ROWS, ROWS, ROWS, ROWS, twice / 4, ROWS, bytes / 4};
  const long width[8] = {64, 64, 64, 64, twice, 64, bytes, 64};
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(rows[tile]);
    config.bytes[tile] = static_cast<uint16_t>(width[tile]);
  }
  asm volatile("" : : "r"(&config) : "memory");
  // GCC's _tile_loadconfig says that it reads 8 bytes: the other stores may then be left out.
  asm volatile("ldtilecfg %0" : : "m"(config));
}
static void end_products() { _tile_release(); }

// out[r * stride + c] for ROWS rows and the columns of `panels` panels. `side_by_side`: as
// `key_codes` packs them.
static void product(const int8_t* rows, long depth, const int8_t* codes, const int32_t*,
                    long panels, int32_t* out, long stride, bool side_by_side = false) {
  const long bytes = tile_depth(depth), apart = side_by_side ? 256 : 64;
  const int row_step = static_cast<int>(stride * 4), step = static_cast<int>(apart);
  asm volatile("" : : : "memory");  // loading tiles does not say that it reads memory
  for (long panel = 0; panel < panels; ++panel) {
    const int8_t* columns = side_by_side ? codes + panel / 4 * 4 * PANEL * depth + panel % 4 * 64
                                         : codes + panel * PANEL * depth;
    _tile_zero(0);
    for (long at = 0; at < depth; at += bytes) {
      _tile_loadd(6, rows + at, static_cast<int>(depth));
      _tile_loadd(7, columns + at / 4 * apart, step);
      _tile_dpbssd(0, 6, 7);
    }
    _tile_stored(0, out + panel * PANEL, row_step);
  }
}

#else

static void begin_products(long) {}
static void end_products() {}

static void product(const int8_t* rows, long depth, const int8_t* codes, const int32_t* sums,
                    long panels, int32_t* out, long stride, bool = false) {
  for (long panel = 0; panel < panels; ++panel) {
    const int8_t* b = codes + panel * depth * PANEL;
    int32_t* to = out + panel * PANEL;
#if SL_AVX512
    const __m512i bias = _mm512_loadu_si512(sums + panel * PANEL);
    for (long r = 0; r < ROWS; r += 8) {
      const int8_t* a = rows + r * depth;
      __m512i sum[8];
      for (auto& s : sum) s = _mm512_sub_epi32(_mm512_setzero_si512(), bias);
      for (long at = 0; at < depth; at += 4) {
        const __m512i column = _mm512_loadu_si512(b + at * PANEL);
        for (int i = 0; i < 8; ++i)
          sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_set1_epi32(four(a + i * depth + at)), column);
      }
      for (int i = 0; i < 8; ++i) _mm512_storeu_si512(to + (r + i) * stride, sum[i]);
    }
#elif SL_AVX2
    // |a| times sign(a)·b: pairs of products of codes up to 127 fit in 16 bits.
    (void)sums;
    const __m256i ones = _mm256_set1_epi16(1);
    for (long r = 0; r < ROWS; r += 4) {
      const int8_t* a = rows + r * depth;
      __m256i sum[4][2] = {};
      for (long at = 0; at < depth; at += 4) {
        const auto* column = reinterpret_cast<const __m256i*>(b + at * PANEL);
        const __m256i left = _mm256_loadu_si256(column), right = _mm256_loadu_si256(column + 1);
        for (int i = 0; i < 4; ++i) {
          const __m256i row = _mm256_set1_epi32(four(a + i * depth + at));
          const __m256i size = _mm256_abs_epi8(row);
          const __m256i x = _mm256_maddubs_epi16(size, _mm256_sign_epi8(left, row));
          const __m256i y = _mm256_maddubs_epi16(size, _mm256_sign_epi8(right, row));
          sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(x, ones));
          sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(y, ones));
        }
      }
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (r + i) * stride + half * 8),
                              sum[i][half]);
    }
#else
    (void)sums;
    for (long r = 0; r < ROWS; ++r) {
      int32_t sum[PANEL] = {};
      for (long at = 0; at < depth; at += 4)
        for (int c = 0; c < PANEL; ++c)
          for (int i = 0; i < 4; ++i)
            sum[c] += rows[r * depth + at + i] * b[at * PANEL + c * 4 + i];
      memcpy(to + r * stride, sum, sizeof sum);
    }
#endif
  }
}

#endif

}  // namespace sparseloom::SL_TIER
