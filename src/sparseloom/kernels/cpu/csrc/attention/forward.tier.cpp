// Fused scores, softmax and values for the query rows of one item.
//
// Keys are visited segment by segment, so that the gathered rows of all query blocks of the item
// come from a cache; a running maximum and sum per row join the segments (online softmax).
#include "attention/tiles.hpp"
#include "attention/work.hpp"

namespace sparseloom::SL_TIER {
namespace {

// Whether tiles of AMX do both products.
template <class T, int R>
constexpr bool by_tiles() {
  return SL_AMX && sizeof(T) == 2 && !__is_same(T, Fp16) && (R == 8 || R == 16);
}

// Dims are padded to whole vectors, or to the 32 of a tile.
SL_INLINE int dim_step(Type type) { return SL_AMX && type == Type::bf16 ? 32 : W; }

// Rows per tile: the least power of two that holds a query block, at most a vector.
SL_INLINE int tile_rows(int bq) {
  int rows = 1;
  while (rows < bq && rows < W) rows *= 2;
  return rows;
}

ForwardScratch scratch(const ForwardArgs& a) {
  const int rows = tile_rows(a.bq);
  const int step = dim_step(a.type);
  const int64_t dim = round_up(a.head_dim, step), value_dim = round_up(a.value_dim, step);
  ForwardScratch s;
  s.queries = GROUP_TILES * rows * dim;
  s.sums = GROUP_TILES * (rows * value_dim + 2 * W);
  s.keys = KEY_CHUNK * dim;
  s.values = KEY_CHUNK * value_dim;
  s.scores = (int64_t{a.segment} + KEY_CHUNK) * rows;
  s.list = int64_t{a.segment} + KEY_CHUNK;
  s.weights = KEY_CHUNK * int64_t{rows};
  // Rows of queries before they are transposed, and 64 bytes between parts.
  s.total = s.queries + s.sums + s.keys + s.values + s.scores + s.list + s.weights + rows * dim + 16 * 8;
  return s;
}

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
  const int padded = static_cast<int>(round_up(dim, dim_step(w.args.type)));
  const F one = set1(1.0f);
  for (int k = 0; k < n; ++k) {
    widen_row(base + keys[k] * view.row, to, dim, padded, one);
    rows[k] = to;
    to += padded;
  }
}

// Rows of K (near) or V (far: their turn comes after all scores) that are wanted soon.
template <class T, bool FAR>
SL_INLINE void prefetch_rows(const Work& w, const View& view, const int32_t* keys, int n, int dim) {
  const T* base = row_of<T>(view, w.batch, w.kv_head, 0);
  const int64_t bytes = dim * int64_t{sizeof(T)};
  for (int k = 0; k < n; ++k) {
    const char* row = reinterpret_cast<const char*>(base + keys[k] * view.row);
    for (int64_t byte = 0; byte < bytes; byte += 64)
      if constexpr (FAR) prefetch_far(row + byte); else prefetch(row + byte);
  }
}

// While keys k ... k + 15 are scored: their values, and the keys two steps on.
template <class T>
SL_INLINE void prefetch_step(const Work& w, const int32_t* keys, int k, int n) {
  const int ahead = k + 2 * KEY_STEP;
  if (ahead < n)
    prefetch_rows<T, false>(w, w.args.key, keys + ahead, smaller(KEY_STEP, n - ahead),
                            w.args.head_dim);
  prefetch_rows<T, true>(w, w.args.value, keys + k, smaller(KEY_STEP, n - k), w.args.value_dim);
}

// Keys up to which whole vectors (or tiles) of scores reach.
template <class T, int R>
constexpr int padded_keys(int n) {
  constexpr int STEP = by_tiles<T, R>() ? KEY_STEP : W / R;
  return (n + STEP - 1) / STEP * STEP;
}

// Scores (times log2 e) of a tile and n keys, -inf where causality forbids the pair and beyond n.
// Returns the largest per lane.
template <class T, int R>
F tile_scores(const Work& w, const Tile& tile, const int32_t* keys, int n, float* out) {
  const ForwardArgs& a = w.args;
  const float lowest = -__builtin_inff();
#if SL_AMX
  if constexpr (by_tiles<T, R>())
    score_tiles<R>(w, tile, keys, n, out, [&](int k) {
      for (int i = k; i < n && i < k + TILE_KEYS; i += KEY_STEP) prefetch_step<T>(w, keys, i, n);
    });
#endif
  for (int k = by_tiles<T, R>() ? n : 0; k < n; k += KEY_CHUNK) {
    const int count = smaller(KEY_CHUNK, n - k);
    const float* rows[KEY_CHUNK];
    rows_of<T>(w, a.key, keys + k, count, a.head_dim, w.keys, rows);
    for (int i = count; i < padded_keys<T, R>(count); ++i) rows[i] = rows[0];
    for (int i = 0; i < count; i += KEY_STEP) {
      prefetch_step<T>(w, keys, k + i, n);
      score_keys<R>(tile.queries, rows + i, 0, smaller(KEY_STEP, count - i), w.dim,
                    out + (k + i) * R);
    }
  }
  const int end = padded_keys<T, R>(n) * R;
  for (int i = n * R; i < end; ++i) out[i] = lowest;
  if (a.causal) {
    const int64_t shift = int64_t{a.kv_len} - a.q_len;
    for (int k = n - 1; k >= 0 && keys[k] > tile.row + shift; --k)
      for (int r = 0; r < R; ++r)
        if (keys[k] > tile.row + r + shift) out[k * R + r] = lowest;
  }
  F highest = set1(lowest);
  for (int i = 0; i < end; i += W) highest = max(highest, load(out + i));
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
  dropout_tile<R>(a.dropout, row, a.kv_len, keys, n, w.weights);
  for (int i = 0; i < n * R; ++i) p[i] *= w.weights[i];
}

// One segment for one tile: scores, probabilities relative to the running maximum, values.
template <class T, int R>
void add_segment(Work& w, Tile& tile, const int32_t* keys, int n) {
  const F segment_highest = tile_scores<T, R>(w, tile, keys, n, w.scores);
  float highest[W], sums[R];
  fold_largest<R>(segment_highest, highest);
  bool rescale = false;
  for (int r = R; r < W; ++r) highest[r] = 0.0f;
  for (int r = 0; r < R; ++r) {
    if (!(highest[r] > tile.highest[r])) highest[r] = tile.highest[r];
    // Nothing was added while the maximum was -inf.
    rescale = rescale || (highest[r] > tile.highest[r] && tile.total[r] != 0.0f);
  }
  if (rescale) {
    float factor[W];
    store(factor, exp2(load(tile.highest) - load(highest)));
    for (int r = 0; r < R; ++r) {
      if (tile.total[r] == 0.0f) continue;
      const F by = set1(factor[r]);
      for (int d = 0; d < w.value_dim; d += W) {
        float* at = tile.sums + r * w.value_dim + d;
        store(at, load(at) * by);
      }
      tile.total[r] *= factor[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    tile.highest[r] = highest[r];
    if (highest[r] == -__builtin_inff()) highest[r] = 0.0f;
  }
  const F base = repeat<R>(highest);
  const int padded = padded_keys<T, R>(n);
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
    if constexpr (by_tiles<T, R>()) continue;
    rows_of<T>(w, w.args.value, keys + k, count, w.args.value_dim, w.values, rows);
    add_values<R>(w.scores + k * R, rows, count, w.value_dim, tile.sums, w.value_dim);
  }
#if SL_AMX
  if constexpr (by_tiles<T, R>()) add_value_tiles<R>(w, tile, keys, n, w.scores);
#endif
}

template <class T, int R>
void load_queries(Work& w, const Tile& tile) {
  const ForwardArgs& a = w.args;
#if SL_AMX
  if constexpr (by_tiles<T, R>()) return load_tile_queries<R>(w, tile);
#endif
  const F factor = set1(a.scale * LOG2E);
  // Pointers past the rows are never made: the offset is added where the row exists.
  const T* here = row_of<T>(a.query, w.batch, w.head, tile.row);
  for (int r = 0; r < R; ++r) {
    if (tile.row + 4 * R + r < a.q_len)
      for (int d = 0; d < a.head_dim; d += 64 / int{sizeof(T)})
        prefetch(here + (4 * R + r) * a.query.row + d);
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
    const F inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
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
      a.lse[at] = total == 0.0f ? -__builtin_inff()
                                : (tile.highest[r] + __builtin_log2f(total)) * LN2;
    }
  }
}

// Column sums of the probabilities, which need the final sums of their rows: scores once more.
template <class T, int R>
void add_importance(Work& w, Tile& tile, const int32_t* keys, int n, float* into) {
  tile_scores<T, R>(w, tile, keys, n, w.scores);
  float level[R];
  for (int r = 0; r < R; ++r)
    level[r] = r < tile.rows && tile.total[r] > 0.0f
                   ? tile.highest[r] + __builtin_log2f(tile.total[r])
                   : __builtin_inff();
  const F base = repeat<R>(level);
  const int padded = padded_keys<T, R>(n);
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
#if SL_AMX
  if constexpr (by_tiles<T, R>()) configure_tiles<R>();
#endif
  for (int t = 0; t < count; ++t) load_queries<T, R>(w, tiles[t]);
  int64_t starts[GROUP_TILES];
  for (int t = 0; t < count; ++t) starts[t] = tiles[t].at;
  for (int64_t stop = a.segment; stop < int64_t{a.kv_len} + a.segment; stop += a.segment)
    for (int t = 0; t < count; ++t) {
      const int n = segment_keys(w, tiles[t], stop < a.kv_len ? int(stop) : a.kv_len, &keys);
      if (t + 1 < count && a.bk == 1) {  // the first keys of the next tile
        const Tile& next = tiles[t + 1];
        const int some = smaller(2 * KEY_STEP, static_cast<int>(next.end - next.at));
        prefetch_rows<T, true>(w, a.key, a.indices + next.at, some, a.head_dim);
      }
      if (n) add_segment<T, R>(w, tiles[t], keys, n);
    }
  for (int t = 0; t < count; ++t) {
#if SL_AMX
    if constexpr (by_tiles<T, R>()) in_order<R>(w, tiles[t]);
#endif
    store_rows<T, R>(w, tiles[t], importance);
  }
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
         static_cast<int>(round_up(a.head_dim, dim_step(a.type))),
         static_cast<int>(round_up(a.value_dim, dim_step(a.type))), {}, {}, {}, {}, {}, {}};
  float* queries = take(size.queries);
  float* sums = take(size.sums);
  w.keys = take(size.keys);
  w.values = take(size.values);
  w.scores = take(size.scores);
  w.list = reinterpret_cast<int32_t*>(take(size.list));
  w.weights = take(size.weights);
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
#if SL_AMX
  _tile_release();
#endif
}

}  // namespace

extern const ForwardKernels forward_kernels = {W, scratch, run};

}  // namespace sparseloom::SL_TIER
