// What the steps of one forward item share.
#pragma once

#include "attention/forward.hpp"
#include "attention/microkernels.hpp"

namespace sparseloom::SL_TIER {

constexpr int KEY_CHUNK = 64;  // keys gathered at once: 16 KiB at 64 dims in fp32
constexpr int KEY_STEP = 16;   // keys between prefetches, and in a tile of AMX

SL_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
SL_INLINE int smaller(int a, int b) { return a < b ? a : b; }

template <class T>
SL_INLINE const T* row_of(const View& view, int batch, int head, int64_t row) {
  return static_cast<const T*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

struct Tile {
  int row, rows;  // query rows row ... row + rows - 1 of the head
  int block;
  int64_t at, end;  // what is left of the block's list in `indices`
  float *queries, *sums, *highest, *total;
};

struct Work {
  const ForwardArgs& args;
  int batch, head, kv_head;
  int dim, value_dim;  // padded to whole vectors
  float *keys, *values, *scores, *weights, *rows;
  int32_t* list;
};

}  // namespace sparseloom::SL_TIER
