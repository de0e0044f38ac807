// Which tiles of keys the queries of an item keep, and whether as they are or as means.
#pragma once

#include "dense/dense.hpp"

namespace sparseloom {

// A tile of MASK_KEYS keys, and a bit for each query block of an item that keeps it this way.
struct KeptTile {
  int log2;
  int64_t tile;
  int kept;
};

// Walks the tiles that some query row of the item keeps: whole ones first, in order, then those of
// means, by the size of their segments. The rows belong to one head and at most ROWS query blocks of
// the mask, the first of which starts the item or holds it all.
struct KeptTiles {
  static constexpr int ROWS = 4;
  const Run *run[ROWS] = {}, *end[ROWS] = {};
  int64_t at[ROWS] = {};  // order of the next tile of each row, LAST behind its end
  int rows = 0;

  static constexpr int64_t LAST = INT64_MAX;

  KeptTiles() = default;
  KeptTiles(const DenseArgs& a, int64_t batch, int64_t head, int64_t first, int64_t count) {
    const int64_t mask_head = (a.mask_batch == 1 ? 0 : batch) * a.mask_heads +
                              head * a.mask_heads / a.heads;
    const int64_t blocks = (a.q_len + MASK_QUERIES - 1) / MASK_QUERIES;
    const int64_t block = first / MASK_QUERIES;
    rows = static_cast<int>((first + count - 1) / MASK_QUERIES - block) + 1;
    const int64_t* offsets = a.offsets + mask_head * (blocks + 1) + block;
    for (int r = 0; r < rows; ++r) {
      run[r] = a.runs + offsets[r];
      end[r] = a.runs + offsets[r + 1];
      at[r] = start(r);
    }
  }

  int all() const { return (1 << rows) - 1; }

  // False when there is none.
  bool next(KeptTile& found) {
    int64_t least = LAST;
    for (int r = 0; r < rows; ++r)
      if (at[r] < least) least = at[r];
    if (least == LAST) return false;
    found = {static_cast<int>(least >> 32), least & 0xffffffff, 0};
    for (int r = 0; r < rows; ++r)
      if (at[r] == least) {
        found.kept |= 1 << r;
        if (found.tile + 1 < run[r]->end) {
          ++at[r];
        } else {
          ++run[r];
          at[r] = start(r);
        }
      }
    return true;
  }

 private:
  int64_t start(int r) const {
    return run[r] < end[r] ? int64_t{run[r]->log2} << 32 | run[r]->begin : LAST;
  }
};

// Chunks of MASK_KEYS keys or means have places: those of keys, then those of means that the call
// uses, by the size of their segments. A chunk of means stands for 2^log2 tiles of keys.
struct Places {
  int64_t first[LOG2S + 1];  // of each size; the end of one is the first of the next

  explicit Places(const DenseArgs& a) {
    const int64_t tiles = (a.kv_len + MASK_KEYS - 1) / MASK_KEYS;
    first[0] = 0;
    for (int log2 = 0; log2 < LOG2S; ++log2) {
      const bool used = log2 == 0 || (a.means >> log2 & 1);
      first[log2 + 1] = first[log2] + (used ? (tiles + (int64_t{1} << log2) - 1) >> log2 : 0);
    }
  }

  int64_t keys() const { return first[1]; }
  int64_t means() const { return first[LOG2S] - first[1]; }
  int64_t all() const { return first[LOG2S]; }
  int log2(int64_t place) const {
    int log2 = 0;
    while (place >= first[log2 + 1]) ++log2;
    return log2;
  }
};

}  // namespace sparseloom
