// Fused scores, softmax and values for the query rows of one item.
//
// Keys are visited segment by segment, so that the gathered rows of all query blocks of the item
// come from a cache; a running maximum and sum per row join the segments (online softmax).
#include "attention/forward.hpp"
#include "attention/microkernels.hpp"

namespace sparseloom::SL_TIER {
namespace {

constexpr int KEY_CHUNK = 64;  // keys gathered at once: 16 KiB at 64 dims
static_assert(KEY_CHUNK % KEY_TILE == 0);

SL_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
SL_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Rows per tile: the least power of two that holds a query block, at most a vector.
SL_INLINE int tile_rows(int bq) {
  int rows = 1;
  while (rows < bq && rows < W) rows *= 2;
  return rows;
}

ForwardScratch scratch(const ForwardArgs& a) {
  const int rows = tile_rows(a.bq);
  const int64_t dim = round_up(a.head_dim, W), value_dim = round_up(a.value_dim, W);
  ForwardScratch s;
  s.queries = GROUP_TILES * rows * dim;
  s.sums = GROUP_TILES * (rows * value_dim + 2 * W);
  s.keys = KEY_CHUNK * dim;
  s.values = KEY_CHUNK * value_dim;
  s.scores = (int64_t{a.segment} + KEY_CHUNK) * rows;
  s.list = int64_t{a.segment} + KEY_CHUNK;
  s.factors = a.dropout.threshold ? KEY_CHUNK * int64_t{rows} : 0;
  // Rows of queries before they are transposed, and 64 bytes between parts.
  s.total = s.queries + s.sums + s.keys + s.values + s.scores + s.list + s.factors + rows * dim + 16 * 8;
  return s;
}

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
  int batch, head, kv_head, dim, value_dim;
  float *keys, *values, *scores, *factors, *rows;
  int32_t* list;
};

// The keys of a tile below `stop`, in order, padding left out. Returns how many, and where.
int segment_keys(Work& w, Tile& tile, int stop, const int32_t** out) {
  const ForwardArgs& a = w.args;
  if (a.causal) {
    const int64_t seen = int64_t{tile.row} + tile.rows + a.kv_len - a.q_len;
    if (seen < stop) stop = seen < 0 ? 0 : static_cast<int>(seen);
  }
  if (a.bk == 1 && !a.key_padding) {
    const int32_t* from = a.indices + tile.at;
    int64_t low = 0, high = tile.end - tile.at;
    if (high > 0 && from[high - 1] >= stop) {
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (from[middle] < stop) low = middle + 1; else high = middle;
      }
    }
    *out = from;
    tile.at += high;
    return static_cast<int>(high);
  }
  const uint8_t* padding = a.key_padding ? a.key_padding + int64_t{w.batch} * a.kv_len : nullptr;
  int n = 0;
  for (; tile.at < tile.end; ++tile.at) {
    const int64_t begin = int64_t{a.indices[tile.at]} * a.bk;
    if (begin >= stop) break;
    const int end = begin + a.bk < stop ? static_cast<int>(begin + a.bk) : stop;
    for (int key = static_cast<int>(begin); key < end; ++key)
      if (!padding || padding[key]) w.list[n++] = key;
  }
  *out = w.list;
  return n;
}

// Pointers to fp32 rows of n keys (or values), a multiple of W wide: in place if they are that, else
// widened copies at `to`.
template <class T>
void rows_of(const Work& w, const View& view, const int32_t* keys, int n, int dim, float* to,
             const float** rows) {
  const T* base = row_of<T>(view, w.batch, w.kv_head, 0);
  if constexpr (sizeof(T) == 4) {
    if (dim % W == 0) {
      for (int k = 0; k < n; ++k) rows[k] = base + keys[k] * view.row;
      return;
    }
  }
  const int padded = static_cast<int>(round_up(dim, W));
  const F one = set1(1.0f);
  for (int k = 0; k < n; ++k) {
    widen_row(base + keys[k] * view.row, to, dim, padded, one);
    rows[k] = to;
    to += padded;
  }
}

template <class T>
void prefetch_rows(const Work& w, const View& view, const int32_t* keys, int n, int dim) {
  const T* base = row_of<T>(view, w.batch, w.kv_head, 0);
  for (int k = 0; k < n; ++k) {
    const char* row = reinterpret_cast<const char*>(base + keys[k] * view.row);
    for (int64_t byte = 0; byte < dim * int64_t{sizeof(T)}; byte += 64) prefetch(row + byte);
  }
}

// Scores (times log2 e) of a tile and n keys, -inf where causality forbids the pair and beyond n.
template <class T, int R>
F score_keys(const Work& w, const Tile& tile, const int32_t* keys, int n, float* out) {
  const ForwardArgs& a = w.args;
  const float lowest = -__builtin_inff();
  F highest = set1(lowest);
  const float* rows[KEY_CHUNK];
  for (int k = 0; k < n; k += KEY_CHUNK) {
    const int count = smaller(KEY_CHUNK, n - k), full = int(round_up(count, KEY_TILE));
    prefetch_rows<T>(w, a.value, keys + k, count, a.value_dim);
    rows_of<T>(w, a.key, keys + k, count, a.head_dim, w.keys, rows);
    for (int i = count; i < full; ++i) rows[i] = rows[0];
    for (int i = 0; i < full; i += KEY_TILE)
      score_tile<R>(tile.queries, rows + i, w.dim, out + (k + i) * R, highest);
  }
  const int padded = static_cast<int>(round_up(n, KEY_TILE));
  bool changed = false;
  for (int i = n * R; i < padded * R; ++i) out[i] = lowest;
  if (a.causal) {
    const int64_t shift = int64_t{a.kv_len} - a.q_len;
    for (int k = n - 1; k >= 0 && keys[k] > tile.row + shift; --k)
      for (int r = 0; r < R; ++r)
        if (keys[k] > tile.row + r + shift) out[k * R + r] = lowest, changed = true;
  }
  if (changed || padded != n) {  // what was overwritten may have been the largest
    highest = set1(lowest);
    for (int i = 0; i < padded * R; i += W) highest = max(highest, load(out + i));
  }
  return highest;
}

// Per row, from W / R lanes each: the largest or the sum.
template <int R>
SL_INLINE void fold_largest(F lanes, float* rows) {
  float all[W];
  store(all, lanes);
  for (int r = 0; r < R; ++r) rows[r] = all[r];
  for (int i = R; i < W; ++i) rows[i % R] = rows[i % R] > all[i] ? rows[i % R] : all[i];
}
template <int R>
SL_INLINE void fold_sum(F lanes, float* rows) {
  float all[W];
  store(all, lanes);
  for (int r = 0; r < R; ++r) rows[r] = all[r];
  for (int i = R; i < W; ++i) rows[i % R] += all[i];
}

// Dropout of n keys' probabilities, which the sums of the rows do not see.
template <int R>
void drop(const Work& w, const Tile& tile, const int32_t* keys, int n, float* p) {
  const ForwardArgs& a = w.args;
  const uint64_t row = dropout_row(w.batch, w.head, a.heads, tile.row, a.q_len, a.kv_len);
  dropout_tile<R>(a.dropout, row, a.kv_len, keys, n, w.factors);
  for (int i = 0; i < n * R; ++i) p[i] *= w.factors[i];
}

// One segment for one tile: scores, probabilities relative to the running maximum, values.
template <class T, int R>
void add_segment(Work& w, Tile& tile, const int32_t* keys, int n) {
  const F segment_highest = score_keys<T, R>(w, tile, keys, n, w.scores);
  float highest[R], factor[R], sums[R];
  fold_largest<R>(segment_highest, highest);
  bool rescale = false;
  for (int r = 0; r < R; ++r) {
    const float before = tile.highest[r];
    if (highest[r] <= before) {
      highest[r] = before;
      factor[r] = 1.0f;
    } else {
      // Nothing was added while the maximum was -inf.
      factor[r] = exp2(set1(before - highest[r])).v[0];
      rescale = rescale || tile.total[r] > 0.0f;
      tile.highest[r] = highest[r];
    }
    if (highest[r] == -__builtin_inff()) highest[r] = 0.0f;
  }
  if (rescale) {
    for (int r = 0; r < R; ++r) {
      const F by = set1(factor[r]);
      for (int d = 0; d < w.value_dim; d += W) {
        float* at = tile.sums + r * w.value_dim + d;
        store(at, load(at) * by);
      }
      tile.total[r] *= factor[r];
    }
  }
  const F base = repeat<R>(highest);
  const int padded = static_cast<int>(round_up(n, KEY_TILE));
  F total = zero();
  for (int i = 0; i < padded * R; i += W) {
    const F p = exp2(load(w.scores + i) - base);
    total = total + p;
    store(w.scores + i, p);
  }
  fold_sum<R>(total, sums);
  for (int r = 0; r < R; ++r) tile.total[r] += sums[r];
  const float* rows[KEY_CHUNK];
  for (int k = 0; k < n; k += KEY_CHUNK) {
    const int count = smaller(KEY_CHUNK, n - k);
    if (w.args.dropout.threshold) drop<R>(w, tile, keys + k, count, w.scores + k * R);
    rows_of<T>(w, w.args.value, keys + k, count, w.args.value_dim, w.values, rows);
    add_values<R>(w.scores + k * R, rows, count, w.value_dim, tile.sums, w.value_dim);
  }
}

template <class T, int R>
void load_queries(Work& w, const Tile& tile) {
  const ForwardArgs& a = w.args;
  const F factor = set1(a.scale * LOG2E);
  for (int r = 0; r < R; ++r) {
    float* to = w.rows + r * w.dim;
    if (r < tile.rows)
      widen_row(row_of<T>(a.query, w.batch, w.head, tile.row + r), to, a.head_dim, w.dim, factor);
    else
      for (int d = 0; d < w.dim; d += W) store(to + d, zero());
  }
  rows_to_lanes<R>(w.rows, w.dim, w.dim, tile.queries);
}

template <class T, int R>
void store_rows(const Work& w, const Tile& tile, Importance* importance) {
  const ForwardArgs& a = w.args;
  for (int r = 0; r < tile.rows; ++r) {
    const float total = tile.total[r];
    const F inverse = set1(total > 0.0f ? 1.0f / total : 0.0f);
    T* to = const_cast<T*>(row_of<T>(a.out, w.batch, w.head, tile.row + r));
    const float* from = tile.sums + r * w.value_dim;
    F size = zero();
    for (int d = 0; d < a.value_dim; d += W) {
      const F x = load(from + d) * inverse;
      size = size + abs(x);
      if (d + W <= a.value_dim) store(to + d, x); else store_n(to + d, x, a.value_dim - d);
    }
    if (importance) importance->head += sum(size);
    if (a.lse) {
      const int64_t at = (int64_t{w.batch} * a.heads + w.head) * a.q_len + tile.row + r;
      a.lse[at] = total > 0.0f ? (tile.highest[r] + __builtin_log2f(total)) * LN2
                               : -__builtin_inff();
    }
  }
}

// Column sums of the probabilities, which need the final sums of their rows: scores once more.
template <class T, int R>
void add_importance(Work& w, Tile& tile, const int32_t* keys, int n, float* into) {
  score_keys<T, R>(w, tile, keys, n, w.scores);
  float level[R];
  for (int r = 0; r < R; ++r)
    level[r] = r < tile.rows && tile.total[r] > 0.0f
                   ? tile.highest[r] + __builtin_log2f(tile.total[r])
                   : __builtin_inff();
  const F base = repeat<R>(level);
  const int padded = static_cast<int>(round_up(n, KEY_TILE));
  for (int i = 0; i < padded * R; i += W) store(w.scores + i, exp2(load(w.scores + i) - base));
  for (int k = 0; k < n; ++k) {
    float share = 0.0f;
    for (int r = 0; r < R; ++r) share += w.scores[k * R + r];
    into[keys[k]] += share;
  }
}

template <class T, int R>
void run_tiles(Work& w, Tile* tiles, int count, Importance* importance) {
  const ForwardArgs& a = w.args;
  const int32_t* keys;
  for (int t = 0; t < count; ++t) load_queries<T, R>(w, tiles[t]);
  int64_t starts[GROUP_TILES];
  for (int t = 0; t < count; ++t) starts[t] = tiles[t].at;
  for (int64_t stop = a.segment; stop < int64_t{a.kv_len} + a.segment; stop += a.segment)
    for (int t = 0; t < count; ++t) {
      const int n = segment_keys(w, tiles[t], stop < a.kv_len ? int(stop) : a.kv_len, &keys);
      if (n) add_segment<T, R>(w, tiles[t], keys, n);
    }
  for (int t = 0; t < count; ++t) store_rows<T, R>(w, tiles[t], importance);
  if (!a.key_importance) return;
  for (int t = 0; t < count; ++t) tiles[t].at = starts[t];
  for (int64_t stop = a.segment; stop < int64_t{a.kv_len} + a.segment; stop += a.segment)
    for (int t = 0; t < count; ++t) {
      const int n = segment_keys(w, tiles[t], stop < a.kv_len ? int(stop) : a.kv_len, &keys);
      if (n) add_importance<T, R>(w, tiles[t], keys, n, importance->keys);
    }
}

template <class T>
void run_rows(Work& w, Tile* tiles, int count, int rows, Importance* importance) {
  switch (rows) {
    case 1: return run_tiles<T, 1>(w, tiles, count, importance);
    case 2: return run_tiles<T, 2>(w, tiles, count, importance);
    case 4: return run_tiles<T, 4>(w, tiles, count, importance);
#if SL_AVX2
    case 8: return run_tiles<T, 8>(w, tiles, count, importance);
#endif
#if SL_AVX512
    case 16: return run_tiles<T, 16>(w, tiles, count, importance);
#endif
  }
}

void run(const ForwardArgs& a, const ForwardItem& item, float* memory, Importance* importance) {
  const ForwardScratch size = scratch(a);
  const int rows = tile_rows(a.bq);
  auto take = [&memory](int64_t n) {
    float* part = memory;
    memory += round_up(n, 16);
    return part;
  };
  Work w{a, item.batch, item.head, item.head / (a.heads / a.kv_heads),
         static_cast<int>(round_up(a.head_dim, W)), static_cast<int>(round_up(a.value_dim, W)), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  float* queries = take(size.queries);
  float* sums = take(size.sums);
  w.keys = take(size.keys);
  w.values = take(size.values);
  w.scores = take(size.scores);
  w.list = reinterpret_cast<int32_t*>(take(size.list));
  w.factors = take(size.factors);
  w.rows = take(int64_t{rows} * w.dim);

  const int blocks = (a.q_len + a.bq - 1) / a.bq;
  const int mask_head = static_cast<int>(int64_t{item.head} * a.mask_heads / a.heads);
  const int mask_batch = a.mask_batch == 1 ? 0 : item.batch;
  const int64_t* offsets =
      a.offsets + (int64_t{mask_batch} * a.mask_heads + mask_head) * (blocks + 1);
  Tile tiles[GROUP_TILES];
  int count = 0;
  for (int block = item.first_block; block < item.end_block; ++block) {
    const int64_t block_end = int64_t{block + 1} * a.bq;
    const int end = block_end < a.q_len ? static_cast<int>(block_end) : a.q_len;
    for (int row = block * a.bq; row < end; row += rows) {
      Tile& tile = tiles[count];
      tile = {row, smaller(rows, end - row), block, offsets[block], offsets[block + 1],
              queries + int64_t{count} * rows * w.dim,
              sums + int64_t{count} * (rows * w.value_dim + 2 * W), nullptr, nullptr};
      tile.highest = tile.sums + rows * w.value_dim;
      tile.total = tile.highest + W;
      for (int i = 0; i < rows * w.value_dim; i += W) store(tile.sums + i, zero());
      store(tile.highest, set1(-__builtin_inff()));
      store(tile.total, zero());
      if (++count == GROUP_TILES || (row + rows >= end && block + 1 == item.end_block)) {
        switch (a.type) {
          case Type::fp32: run_rows<float>(w, tiles, count, rows, importance); break;
          case Type::bf16: run_rows<Bf16>(w, tiles, count, rows, importance); break;
          case Type::fp16: run_rows<Fp16>(w, tiles, count, rows, importance); break;
        }
        count = 0;
      }
    }
  }
}

}  // namespace

extern const ForwardKernels forward_kernels = {W, scratch, run};

}  // namespace sparseloom::SL_TIER
