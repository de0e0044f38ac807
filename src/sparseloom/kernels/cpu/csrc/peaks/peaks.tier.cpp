#include "peaks/peaks.hpp"

#include "simd.hpp"

namespace sparseloom::SL_TIER {
namespace {

constexpr int CHAINS = 12;  // independent sums: more than latency times units of any core

void fp32(int64_t count, void* out) {
  F sums[CHAINS];
  const F factor = set1(0.5f), term = set1(1.0f);  // stays at 2, far from slow numbers
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sums[i] = set1(static_cast<float>(i));
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = fma(sums[i], factor, term);
  }
  F all = zero();
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) all = all + sums[i];
  const float total = sum(all);
  memcpy(out, &total, sizeof total);
}

#if SL_AMX

// Row counts and row bytes of tiles 0 ... 7, as the LDTILECFG instruction reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

SL_INLINE void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // GCC takes only its first bytes for an input
  // GCC's _tile_loadconfig says that it reads 8 bytes: the other stores may then be left out.
  asm volatile("ldtilecfg %0" : : "m"(config));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

void bf16(int64_t count, void* out) {
  configure_tiles();
  for (int64_t n = 0; n < count; ++n) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  alignas(64) char tile[1024];
  _tile_stored(0, tile, 64);
  _tile_release();
  memcpy(out, tile, 64);
}

void int8(int64_t count, void* out) {
  configure_tiles();
  for (int64_t n = 0; n < count; ++n) {
    _tile_dpbusd(0, 6, 7);
    _tile_dpbusd(1, 6, 7);
    _tile_dpbusd(2, 6, 7);
    _tile_dpbusd(3, 6, 7);
    _tile_dpbusd(4, 6, 7);
    _tile_dpbusd(5, 6, 7);
  }
  alignas(64) char tile[1024];
  _tile_stored(0, tile, 64);
  _tile_release();
  memcpy(out, tile, 64);
}

constexpr int64_t BF16_OPS = 6 * 16 * 16 * 32 * 2, INT8_OPS = 6 * 16 * 16 * 64 * 2;

#else

#if SL_AVX512_BF16
void bf16(int64_t count, void* out) {
  __m512 sums[CHAINS];
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80), halves = (__m512bh)_mm512_set1_epi16(0x3f00);
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, halves);
  }
  __m512 all = _mm512_setzero_ps();
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) all = _mm512_add_ps(all, sums[i]);
  _mm512_storeu_ps(out, all);
}
constexpr int64_t BF16_OPS = CHAINS * 32 * 2;
#else
constexpr auto bf16 = static_cast<void (*)(int64_t, void*)>(nullptr);
constexpr int64_t BF16_OPS = 0;
#endif

#if SL_AVX512
void int8(int64_t count, void* out) {
  __m512i sums[CHAINS];
  const __m512i left = _mm512_set1_epi8(1), right = _mm512_set1_epi8(-1);
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], left, right);
  }
  __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) all = _mm512_add_epi32(all, sums[i]);
  _mm512_storeu_si512(out, all);
}
constexpr int64_t INT8_OPS = CHAINS * 64 * 2;
#else
constexpr auto int8 = static_cast<void (*)(int64_t, void*)>(nullptr);
constexpr int64_t INT8_OPS = 0;
#endif

#endif

void read(const void* from, int64_t bytes, void* out) {
  const auto* numbers = static_cast<const float*>(from);
  constexpr int LOADS = 8;
  F sums[LOADS];
#pragma GCC unroll 8
  for (int i = 0; i < LOADS; ++i) sums[i] = zero();
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t n = 0; n < count; n += LOADS * W) {
#pragma GCC unroll 8
    for (int i = 0; i < LOADS; ++i) sums[i] = sums[i] + load(numbers + n + i * W);
  }
  F all = zero();
#pragma GCC unroll 8
  for (int i = 0; i < LOADS; ++i) all = all + sums[i];
  const float total = sum(all);
  memcpy(out, &total, sizeof total);
}

}  // namespace

extern const PeakKernels peak_kernels = {fp32, CHAINS * W * 2, bf16, BF16_OPS, int8, INT8_OPS, read};

}  // namespace sparseloom::SL_TIER
