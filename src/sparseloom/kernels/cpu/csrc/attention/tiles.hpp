// AMX: both products for bf16 inputs, 8 or 16 query rows against gathered keys.
//
// Scores are 16 keys x R rows per tile, K as the left operand in the order of its rows, so that a
// gathered key is only copied; they come out as [key][R], as everywhere else. For the values the
// probabilities are the left operand, R rows x 32 keys, and V the right one, whose rows of two keys
// are interleaved by two unpacks; that leaves each 32 dims of a sum as [0-3 8-11 16-19 24-27 | the
// others], which in_order() undoes at the end.
//
// Rows are packed 32 keys ahead of the products that read them, some after each product: a tile
// cannot be loaded from stores that have not reached the cache, and no processor looks far enough
// ahead to pack while a product is under way.
#pragma once

#include "attention/work.hpp"

#if SL_AMX

namespace sparseloom::SL_TIER {

constexpr int TILE_KEYS = 32;  // keys that are packed at once

// Compilers do not see what tile instructions read and write.
SL_INLINE void tile_fence() { asm volatile("" ::: "memory"); }

// Tiles 0 and 1 hold scores of 16 keys each and R rows, 2 queries, 3 and 4 keys or values, 5
// probabilities, 6 and 7 sums of R rows and 16 dims each.  One shape for each serves both products:
// another configuration takes as long as the products of 16 keys.
template <int R>
SL_INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = tile < 5 ? 16 : R;
    config.row_bytes[tile] = tile < 3 ? R * 4 : 64;
  }
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

// Copies the keys `first` ... `last` - 1 of 32 to 32-dim slabs of [key][32], for each 16 of them;
// keys from n on repeat the first. SLABS 0: as many as there are.
template <int SLABS, bool WHOLE>
SL_INLINE void pack_tile_keys(const Work& w, const int32_t* keys, int n, int first, int last,
                              Bf16* packed) {
  const ForwardArgs& a = w.args;
  const Bf16* base = row_of<Bf16>(a.key, w.batch, w.kv_head, 0);
  const int dim = SLABS ? SLABS * 32 : w.dim;
  for (int i = first; i < last; ++i) {
    const Bf16* from = base + keys[WHOLE || i < n ? i : 0] * a.key.row;
    Bf16* to = packed + i / 16 * 16 * dim + i % 16 * 32;
#pragma GCC unroll 4
    for (int d = 0; d < dim; d += 32)
      _mm512_store_si512(to + d * 16, load_half_row<WHOLE>(from + d, a.head_dim - d));
  }
}

// Interleaves 32 dims from `dim` on of the values of the keys `first` ... `last` - 1 of 32 in pairs:
// a slab of low halves and one of high ones. Keys from n on give zeros.
template <bool WHOLE>
SL_INLINE void pack_tile_values(const Work& w, const int32_t* keys, int n, int dim, int first,
                                int last, Bf16* packed) {
  const ForwardArgs& a = w.args;
  const Bf16* base = row_of<Bf16>(a.value, w.batch, w.kv_head, 0) + dim;
  const int dims = a.value_dim - dim;
  for (int k = first; k < last; k += 2) {
    const Bf16* even = base + (WHOLE || k < n ? keys[k] : 0) * a.value.row;
    const Bf16* odd = base + (WHOLE || k + 1 < n ? keys[k + 1] : 0) * a.value.row;
    const __m512i x = load_half_row<WHOLE>(even, k < n ? dims : 0);
    const __m512i y = load_half_row<WHOLE>(odd, k + 1 < n ? dims : 0);
    _mm512_store_si512(packed + k * 16, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(packed + k * 16 + 512, _mm512_unpackhi_epi16(x, y));
  }
}

template <int R, int SLABS, class Ahead>
SL_INLINE void score_slabs(const Work& w, const Tile& tile, const int32_t* keys, int n, float* out,
                           Ahead ahead) {
  alignas(64) static constexpr float nothing[16] = {};
  const int dim = SLABS ? SLABS * 32 : w.dim;
  const int step = (TILE_KEYS * 16 + dim - 1) / dim;  // keys packed after each product
  Bf16* packed[2] = {reinterpret_cast<Bf16*>(w.keys),
                     reinterpret_cast<Bf16*>(w.keys) + TILE_KEYS * dim};
  ahead(0);
  pack_tile_keys<SLABS, false>(w, keys, n, 0, smaller(TILE_KEYS, int(round_up(n, 16))), packed[0]);
  for (int k = 0; k < n; k += TILE_KEYS) {
    const Bf16* here = packed[k / TILE_KEYS % 2];
    Bf16* there = packed[k / TILE_KEYS % 2 ^ 1];
    const int32_t* next = keys + k + TILE_KEYS;
    const int left = n - k - TILE_KEYS;
    const bool whole = left >= TILE_KEYS && w.args.head_dim == dim;
    int at = 0;
    const auto some = [&]() SL_LAMBDA {
      if (!whole || at >= TILE_KEYS) return;
      const int end = smaller(at + step, TILE_KEYS);
      pack_tile_keys<SLABS, true>(w, next, left, at, end, there);
      at = end;
    };
    if (left > 0) {
      ahead(k + TILE_KEYS);
      if (!whole)
        pack_tile_keys<SLABS, false>(w, next, left, 0, smaller(TILE_KEYS, int(round_up(left, 16))),
                                     there);
    }
    const bool both = left > -16;
    tile_fence();
    // On Sapphire Rapids products into a tile that was emptied by TILEZERO take longer.
    _tile_loadd(0, nothing, 0);
    _tile_loadd(1, nothing, 0);
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(2, tile.queries + d / 2 * R, R * 4);
      _tile_loadd(3, here + d * 16, 64);
      _tile_dpbf16ps(0, 3, 2);
      some();
      if (!both) continue;
      _tile_loadd(4, here + (dim + d) * 16, 64);
      _tile_dpbf16ps(1, 4, 2);
      some();
    }
    _tile_stored(0, out + k * R, R * 4);
    if (both) _tile_stored(1, out + (k + 16) * R, R * 4);
    tile_fence();
  }
}

// out[key * R + row] of n keys, n padded to 16 by repeating the first; scaled. `ahead(k)` is called
// before the k-th key and those behind it are read.
template <int R, class Ahead>
void score_tiles(const Work& w, const Tile& tile, const int32_t* keys, int n, float* out,
                 Ahead ahead) {
  if (w.dim == 64) score_slabs<R, 2>(w, tile, keys, n, out, ahead);
  else if (w.dim == 128) score_slabs<R, 4>(w, tile, keys, n, out, ahead);
  else score_slabs<R, 0>(w, tile, keys, n, out, ahead);
  const F factor = set1(w.args.scale * LOG2E);
  for (int i = 0; i < round_up(n, 16) * R; i += W) store(out + i, load(out + i) * factor);
}

// weights[key * R + row], 0 from the n-th key to the next multiple of 16, to R rows of 32 bf16 for
// each 32 keys, in their place.
template <int R>
void pack_tile_weights(float* weights, int n) {
  auto* halves = reinterpret_cast<Bf16*>(weights);
  for (int first = 0; first < n; first += TILE_KEYS) {
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
      _mm512_store_si512(halves + first * R + r * 32,
                         (__m512i)_mm512_cvtne2ps_pbh(high[r].v, low[r].v));
  }
}

// tile.sums[.][dim ... dim + 31] += weights[key * R + row] * values, for n keys.
template <int R>
void add_value_slab(const Work& w, const Tile& tile, const int32_t* keys, int n,
                    const Bf16* weights, int dim) {
  Bf16* packed[2] = {reinterpret_cast<Bf16*>(w.values),
                     reinterpret_cast<Bf16*>(w.values) + TILE_KEYS * 32};
  const int64_t stride = w.value_dim * int64_t{4};
  float* sums = tile.sums + dim;
  pack_tile_values<false>(w, keys, n, dim, 0, TILE_KEYS, packed[0]);
  tile_fence();
  _tile_loadd(6, sums, stride);
  _tile_loadd(7, sums + 16, stride);
  for (int k = 0; k < n; k += TILE_KEYS) {
    const Bf16* here = packed[k / TILE_KEYS % 2];
    Bf16* there = packed[k / TILE_KEYS % 2 ^ 1];
    const int32_t* next = keys + k + TILE_KEYS;
    const int left = n - k - TILE_KEYS;
    const bool whole = left >= TILE_KEYS && dim + 32 <= w.args.value_dim;
    if (left > 0 && !whole) pack_tile_values<false>(w, next, left, dim, 0, TILE_KEYS, there);
    tile_fence();
    _tile_loadd(5, weights + k * R, 64);
    _tile_loadd(3, here, 64);
    _tile_dpbf16ps(6, 5, 3);
    if (whole) pack_tile_values<true>(w, next, left, dim, 0, TILE_KEYS / 2, there);
    _tile_loadd(4, here + 512, 64);
    _tile_dpbf16ps(7, 5, 4);
    if (whole) pack_tile_values<true>(w, next, left, dim, TILE_KEYS / 2, TILE_KEYS, there);
    tile_fence();
  }
  _tile_stored(6, sums, stride);
  _tile_stored(7, sums + 16, stride);
  tile_fence();
}

// tile.sums += weights * values of n keys; the weights are overwritten.
template <int R>
void add_value_tiles(const Work& w, const Tile& tile, const int32_t* keys, int n, float* weights) {
  pack_tile_weights<R>(weights, n);
  const auto* halves = reinterpret_cast<const Bf16*>(weights);
  for (int dim = 0; dim < w.value_dim; dim += 32)
    add_value_slab<R>(w, tile, keys, n, halves, dim);
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
