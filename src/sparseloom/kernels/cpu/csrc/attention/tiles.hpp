// AMX: both products for bf16 inputs, 8 or 16 query rows against gathered keys.
//
// Scores are 16 keys x R rows per tile, K as the left operand in the order of its rows, so that a
// gathered key is only copied; they come out as [key][R], as everywhere else. For the values the
// probabilities are the left operand, R rows x 32 keys, and V the right one, whose rows of two keys
// are interleaved by two unpacks; that leaves each 32 dims of a sum as [0-3 8-11 16-19 24-27 | the
// others], which in_order() undoes at the end.
#pragma once

#include "attention/work.hpp"

#if SL_AMX

namespace sparseloom::SL_TIER {

// The compilers' tile operations want numbers that the preprocessor can see.
#define SL_SCORES 0
#define SL_KEYS 1
#define SL_QUERIES 2
#define SL_WEIGHTS 3
#define SL_LOW 4
#define SL_HIGH 5
#define SL_SUM_LOW 6
#define SL_SUM_HIGH 7

// Compilers do not see what tile instructions read and write.
SL_INLINE void tile_fence() { asm volatile("" ::: "memory"); }

template <int R>
SL_INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const auto shape = [&config](int tile, int rows, int bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  shape(SL_SCORES, 16, R * 4);
  shape(SL_KEYS, 16, 64);
  shape(SL_QUERIES, 16, R * 4);
  shape(SL_WEIGHTS, R, 64);
  shape(SL_LOW, 16, 64);
  shape(SL_HIGH, 16, 64);
  shape(SL_SUM_LOW, R, 64);
  shape(SL_SUM_HIGH, R, 64);
  tile_fence();
  // GCC's _tile_loadconfig says that it reads 8 bytes: the other stores may then be left out.
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// R rows of 16 numbers of 32 bits each to [number][R], or back with `back`.
template <int R>
SL_INLINE void turn(F (&a)[R]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < R; stage *= 2) {
    F b[R];
#pragma GCC unroll 8
    for (int r = 0; r < R / 2; ++r) zip<1>(a[r], a[r + R / 2], b[2 * r], b[2 * r + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = b[r];
  }
}
// [16 keys][R] to R rows of 16 keys.
template <int R>
SL_INLINE void turn_back(F (&a)[R]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#pragma GCC unroll 4
  for (int stage = 1; stage < R; stage *= 2) {
    F b[R];
#pragma GCC unroll 8
    for (int r = 0; r < R / 2; ++r) {
      b[r] = {_mm512_permutex2var_ps(a[2 * r].v, even, a[2 * r + 1].v)};
      b[r + R / 2] = {_mm512_permutex2var_ps(a[2 * r].v, odd, a[2 * r + 1].v)};
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = b[r];
  }
}

// 32 bf16 numbers at `from`, of which `left` exist: with WHOLE, all.
template <bool WHOLE = false>
SL_INLINE __m512i load_half_row(const Bf16* from, int left) {
  if constexpr (WHOLE) return _mm512_loadu_si512(from);
  const __mmask32 there = left >= 32 ? ~0u : (1u << (left < 0 ? 0 : left)) - 1;
  return _mm512_maskz_loadu_epi16(there, from);
}

// Queries as the right operand: [dim / 2][R][2], unscaled.
template <int R>
void load_tile_queries(const Work& w, const Tile& tile) {
  const ForwardArgs& a = w.args;
  for (int d = 0; d < w.dim; d += 32) {
    F rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      rows[r] = {r < tile.rows ? _mm512_castsi512_ps(load_half_row(
                                     row_of<Bf16>(a.query, w.batch, w.head, tile.row + r) + d,
                                     a.head_dim - d))
                               : _mm512_setzero_ps()};
    turn<R>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(tile.queries + d / 2 * R + r * W, rows[r]);
  }
}

// Copies sixteen keys to 32-dim slabs of [key][32]; keys from n on repeat the first.
template <bool WHOLE>
SL_INLINE void pack_tile_keys(const Work& w, const int32_t* keys, int n, Bf16* packed) {
  const ForwardArgs& a = w.args;
  const Bf16* base = row_of<Bf16>(a.key, w.batch, w.kv_head, 0);
  for (int i = 0; i < 16; ++i) {
    const Bf16* from = base + keys[i < n ? i : 0] * a.key.row;
    for (int d = 0; d < w.dim; d += 32)
      _mm512_store_si512(packed + d * 16 + i * 32, load_half_row<WHOLE>(from + d, a.head_dim - d));
  }
}

// Interleaves the values of 32 keys in pairs, for each 32 dims a slab of low and one of high halves;
// `stride` from one 32 dims to the next. Keys from n on give zeros.
template <bool WHOLE>
SL_INLINE void pack_tile_values(const Work& w, const int32_t* keys, int n, Bf16* packed,
                                int64_t stride) {
  const ForwardArgs& a = w.args;
  const Bf16* base = row_of<Bf16>(a.value, w.batch, w.kv_head, 0);
  for (int pair = 0; pair < 16; ++pair) {
    const int k = 2 * pair;
    const Bf16* even = base + (WHOLE || k < n ? keys[k] : 0) * a.value.row;
    const Bf16* odd = base + (WHOLE || k + 1 < n ? keys[k + 1] : 0) * a.value.row;
    Bf16* to = packed + pair * 32;
    for (int d = 0; d < w.value_dim; d += 32, to += stride) {
      const __m512i x = load_half_row<WHOLE>(even + d, k < n ? a.value_dim - d : 0);
      const __m512i y = load_half_row<WHOLE>(odd + d, k + 1 < n ? a.value_dim - d : 0);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(to + 512, _mm512_unpackhi_epi16(x, y));
    }
  }
}

// out[key * R + row] of n keys, n padded to 16 by repeating the first; scaled.
template <int R>
void score_tiles(const Work& w, const Tile& tile, const int32_t* keys, int n, float* out) {
  const ForwardArgs& a = w.args;
  Bf16* packed = reinterpret_cast<Bf16*>(w.keys);
  for (int k = 0; k < n; k += 16) {
    if (a.head_dim == w.dim) pack_tile_keys<true>(w, keys + k, n - k, packed);
    else pack_tile_keys<false>(w, keys + k, n - k, packed);
    tile_fence();
    _tile_zero(SL_SCORES);
    for (int d = 0; d < w.dim; d += 32) {
      _tile_loadd(SL_KEYS, packed + d * 16, 64);
      _tile_loadd(SL_QUERIES, tile.queries + d / 2 * R, R * 4);
      _tile_dpbf16ps(SL_SCORES, SL_KEYS, SL_QUERIES);
    }
    _tile_stored(SL_SCORES, out + k * R, R * 4);
  }
  tile_fence();
  const F factor = set1(a.scale * LOG2E);
  for (int i = 0; i < round_up(n, 16) * R; i += W) store(out + i, load(out + i) * factor);
}

// tile.sums += weights[key * R + row] * values, for n keys, at most KEY_CHUNK; the weights up to the
// next multiple of 16 are 0.
template <int R>
void add_value_tiles(const Work& w, const Tile& tile, const int32_t* keys, int n,
                     const float* weights) {
  const ForwardArgs& a = w.args;
  Bf16* packed = reinterpret_cast<Bf16*>(w.values);
  Bf16* halves = reinterpret_cast<Bf16*>(w.weights);
  const int blocks = static_cast<int>(round_up(n, 32)) / 32;
  for (int block = 0; block < blocks; ++block) {
    const int first = block * 32;
    F low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) low[r] = load(weights + first * R + r * W);
    turn_back<R>(low);
    if (first + 16 < n) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) high[r] = load(weights + (first + 16) * R + r * W);
      turn_back<R>(high);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) high[r] = zero();
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      _mm512_store_si512(halves + (block * R + r) * 32,
                         (__m512i)_mm512_cvtne2ps_pbh(high[r].v, low[r].v));
    Bf16* to = packed + block * 1024;
    if (a.value_dim == w.value_dim && first + 32 <= n)
      pack_tile_values<true>(w, keys + first, n - first, to, blocks * 1024);
    else
      pack_tile_values<false>(w, keys + first, n - first, to, blocks * 1024);
  }
  tile_fence();
  const int64_t stride = w.value_dim * int64_t{4};
  for (int d = 0; d < w.value_dim; d += 32) {
    _tile_loadd(SL_SUM_LOW, tile.sums + d, stride);
    _tile_loadd(SL_SUM_HIGH, tile.sums + d + 16, stride);
    for (int block = 0; block < blocks; ++block) {
      const Bf16* right = packed + (int64_t{d / 32} * blocks + block) * 1024;
      _tile_loadd(SL_WEIGHTS, halves + block * R * 32, 64);
      _tile_loadd(SL_LOW, right, 64);
      _tile_dpbf16ps(SL_SUM_LOW, SL_WEIGHTS, SL_LOW);
      _tile_loadd(SL_HIGH, right + 512, 64);
      _tile_dpbf16ps(SL_SUM_HIGH, SL_WEIGHTS, SL_HIGH);
    }
    _tile_stored(SL_SUM_LOW, tile.sums + d, stride);
    _tile_stored(SL_SUM_HIGH, tile.sums + d + 16, stride);
  }
  tile_fence();
}

// The sums of a tile with their dims in order.
template <int R>
void in_order(const Work& w, const Tile& tile) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < R * w.value_dim; i += 32) {
    const F low = load(tile.sums + i), high = load(tile.sums + i + 16);
    store(tile.sums + i, {_mm512_permutex2var_ps(low.v, first, high.v)});
    store(tile.sums + i + 16, {_mm512_permutex2var_ps(low.v, last, high.v)});
  }
}

}  // namespace sparseloom::SL_TIER

#endif
