// Scores of 16 rows with all keys, by AMX, 128 keys at a time; the products of the next 128 run
// while the caller works on these.
//
// Tiles are never emptied by TILEZERO: on Sapphire Rapids a product into a tile that it made was
// once seen to take 50 cycles instead of 16. Products without it were later seen to take 50 and
// more, too. Tiles keep their sums while they are stored, and the next product takes them off
// again: rows are [-q, q], columns [the last keys, these keys]. What sums start from is loaded into
// the tiles once.
#pragma once

#include "product.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

constexpr long SLAB = 128;  // keys
constexpr long TILES = SLAB / PANEL;

class Stream {
 public:
  // `rows`: (ROWS, ROW_PARTS · depth), q behind the first `depth` bytes of each; the rest is filled
  // here. Four panels before `codes` can be read, and whole slabs.
  Stream(const int8_t* codes, long depth, int8_t* rows, const int32_t* start)
      : codes_(codes), rows_(rows), depth_(depth), deep_(2 * depth > 64) {
    for (long r = 0; r < ROWS; ++r) {
      for (long c = 0; c < PANEL; ++c) start_[r * PANEL + c] = start[r];
      int8_t* row = rows + r * ROW_PARTS * depth;
      for (long i = 0; i < depth; ++i) {
        row[i] = static_cast<int8_t>(-row[depth + i]);
        row[2 * depth + i] = 0;
        row[3 * depth + i] = row[depth + i];
      }
    }
    asm volatile("" : : : "memory");  // loading tiles does not say that it reads memory
  }

  // row(slab, r, scores) for every slab and row; `words` reads scores.
  template <class Row>
  SL_INLINE void each(long slabs, Row row) {
    run<false>(slabs, 1, slabs, row);
  }

  // Likewise for every `every`-th slab and the last one.
  template <class Row>
  SL_INLINE void some(long slabs, long every, Row row) {
    run<true>((slabs + every - 2) / every + 1, every, slabs, row);
  }

 private:
  template <bool APART, class Row>
  SL_INLINE void run(long count, long every, long slabs, Row row) {
    every_ = every, slabs_ = slabs, last_ = count * TILES;
    if (!deep_) _tile_loadd(4, rows_ + 2 * depth_, static_cast<int>(ROW_PARTS * depth_));  // [0, q]
    start<0, true>(0), start<1, true>(1), start<2, true>(2), start<3, true>(3);
    if (!deep_ && !APART) _tile_loadd(4, rows_, static_cast<int>(ROW_PARTS * depth_));  // [-q, q]
    step<0, APART>(4), step<1, APART>(5), step<2, APART>(6), step<3, APART>(7);
    step<0, APART>(8), step<1, APART>(9), step<2, APART>(10), step<3, APART>(11);
    for (long at = 0; at < count; ++at) {
      const int32_t* scores = place(at * TILES);
      const long slab = slab_of<APART>(at);
      long tile = at * TILES + 12;
      for (int r = 0; r < ROWS; r += 8, scores += 8 * PANEL, tile += 4) {
        step<0, APART>(tile);
        row(slab, r, scores), row(slab, r + 1, scores + PANEL);
        step<1, APART>(tile + 1);
        row(slab, r + 2, scores + 2 * PANEL), row(slab, r + 3, scores + 3 * PANEL);
        step<2, APART>(tile + 2);
        row(slab, r + 4, scores + 4 * PANEL), row(slab, r + 5, scores + 5 * PANEL);
        step<3, APART>(tile + 3);
        row(slab, r + 6, scores + 6 * PANEL), row(slab, r + 7, scores + 7 * PANEL);
      }
    }
  }

  template <bool APART>
  SL_INLINE long slab_of(long at) {
    if (!APART) return at;
    return at * every_ < slabs_ ? at * every_ : slabs_ - 1;
  }

  SL_INLINE int32_t* place(long tile) { return buffer_[tile / TILES & 1][tile % TILES]; }

  // Stores what was started four tiles before, and starts this one.
  template <int T, bool APART>
  SL_INLINE void step(long tile) {
    if (tile - 4 < last_) keep<T>(tile - 4);
    if (tile < last_) start<T, APART>(tile);
  }

#define SL_TILE(T, WORK) if constexpr (C == T) { WORK; }
#define SL_TILES(WORK) SL_TILE(0, WORK(0)) SL_TILE(1, WORK(1)) SL_TILE(2, WORK(2)) SL_TILE(3, WORK(3))

  template <int C>
  SL_INLINE void keep(long tile) {
    int32_t* to = place(tile);
#define SL_WORK(T) _tile_stored(T, to, 64)
    SL_TILES(SL_WORK)
#undef SL_WORK
  }

  // FRESH: not after the tile four before.
  template <int C, bool FRESH>
  SL_INLINE void start(long tile) {
    const long super = 4 * PANEL * depth_, slab = slab_of<FRESH>(tile / TILES);
    const int8_t* columns = codes_ + (2 * slab + tile % TILES / 4) * super + C * 64;
    if (FRESH || deep_) {
#define SL_WORK(T) _tile_loadd(T, start_, 64)
      SL_TILES(SL_WORK)
#undef SL_WORK
    }
    if (deep_) {
      const long bytes = tile_depth(depth_);
      for (long at = 0; at < depth_; at += bytes) {
        _tile_loadd(6, rows_ + depth_ + at, static_cast<int>(ROW_PARTS * depth_));
        _tile_loadd(7, columns + at * 64, 256);
#define SL_WORK(T) _tile_dpbssd(T, 6, 7)
        SL_TILES(SL_WORK)
#undef SL_WORK
      }
      return;
    }
    _tile_loadd(5, columns - super, 256);
#define SL_WORK(T) _tile_dpbssd(T, 4, 5)
    SL_TILES(SL_WORK)
#undef SL_WORK
  }
#undef SL_TILES
#undef SL_TILE

  const int8_t* codes_;
  const int8_t* rows_;
  long depth_, every_ = 1, slabs_ = 0, last_ = 0;
  bool deep_;
  alignas(64) int32_t start_[ROWS * PANEL];
  alignas(64) int32_t buffer_[2][TILES][ROWS * PANEL];
};

// The scores of a row and the i-th 32 keys of a slab, as 16-bit integers in the order of the keys.
SL_INLINE __m512i words(const int32_t* scores, int i) {
  const int32_t* from = scores + 2 * i * ROWS * PANEL;
  return _mm512_packs_epi32(_mm512_load_si512(from), _mm512_load_si512(from + ROWS * PANEL));
}

}  // namespace sparseloom::SL_TIER

#endif
