// Which tiles of keys the queries of an item keep under a mask.
#pragma once

#include "dense/dense.hpp"

namespace sparseloom {

// Walks the tiles of MASK_KEYS keys that some query row of the item keeps, in order. The rows belong
// to one head and at most ROWS query blocks of the mask, the first of which starts the item or holds
// it all.
struct KeptTiles {
  static constexpr int ROWS = 4;
  const int32_t *row[ROWS] = {}, *end[ROWS] = {};
  int rows = 0;

  KeptTiles() = default;
  KeptTiles(const DenseArgs& a, int64_t batch, int64_t head, int64_t first, int64_t count) {
    const int64_t mask_head = (a.mask_batch == 1 ? 0 : batch) * a.mask_heads +
                              head * a.mask_heads / a.heads;
    const int64_t blocks = (a.q_len + MASK_QUERIES - 1) / MASK_QUERIES;
    const int64_t block = first / MASK_QUERIES;
    rows = static_cast<int>((first + count - 1) / MASK_QUERIES - block) + 1;
    const int64_t* at = a.offsets + mask_head * (blocks + 1) + block;
    for (int r = 0; r < rows; ++r) {
      row[r] = a.indices + at[r];
      end[r] = a.indices + at[r + 1];
    }
  }

  int all() const { return (1 << rows) - 1; }

  // The next tile, and in `kept` a bit for each row that keeps it; -1 when there is none.
  int64_t next(int& kept) {
    int64_t tile = INT64_MAX;
    for (int r = 0; r < rows; ++r)
      if (row[r] < end[r] && *row[r] < tile) tile = *row[r];
    kept = 0;
    for (int r = 0; r < rows; ++r)
      if (row[r] < end[r] && *row[r] == tile) {
        kept |= 1 << r;
        ++row[r];
      }
    return kept ? tile : -1;
  }
};

}  // namespace sparseloom
