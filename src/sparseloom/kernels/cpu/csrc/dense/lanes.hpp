// What the dense kernels share: a block of QB lanes, its products, transposes and row softmax.
#pragma once

#include "dense/mask.hpp"
#include "simd.hpp"

namespace sparseloom::SL_TIER::dense {

#if SL_AVX512
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif
constexpr int QB = VECTORS * W;  // lanes of a block
constexpr int ROWS = 6;          // ROWS * VECTORS accumulators stay in registers

// A row's maximum is followed lazily: sums may grow by 2^SLACK before they are rescaled.
constexpr float SLACK = 8.0f, LOWEST = -1e30f;

// 2^x for x <= 126, to a relative 1e-7; 0 for -inf, NaN for NaN.
SL_INLINE F power(F x) {
#if SL_AVX512
  const F f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  F p = set1(1.868606761e-3f);
  p = fma(p, f, set1(9.014210626e-3f));
  p = fma(p, f, set1(5.580130235e-2f));
  p = fma(p, f, set1(2.401645808e-1f));
  p = fma(p, f, set1(6.931511485e-1f));
  p = fma(p, f, set1(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
#else
  return where_less(x, set1(__builtin_inff()), exp2(x), x);
#endif
}

// Vectors first ... end - 1 of the lanes.
struct Range { int first, end; };
constexpr Range EVERY = {0, VECTORS};

// c[r][lane] = (ADD ? c[r][lane] : 0) + sum over k < depth of a[r, k] * b[k][lane], r < R, for V
// vectors of lanes. Sums of blocks, rather than one sum over all keys, keep the rounding error low.
template <int R, int V, bool ADD>
SL_INLINE void product_rows(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                            int64_t depth, float* c) {
  F sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k) {
    F lanes[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) lanes[v] = load(b + k * QB + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F x = set1(a[r * a_row + k * a_depth]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = fma(x, lanes[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* at = c + r * QB + v * W;
      store(at, ADD ? load(at) + sums[r][v] : sums[r][v]);
    }
}

template <int V, bool ADD>
static inline void product_vectors(const float* a, int64_t a_row, int64_t a_depth, int64_t rows,
                                   const float* b, int64_t depth, float* c) {
  constexpr int R = V == VECTORS ? ROWS : 8;  // enough sums at once to hide the latency of the FMA
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    product_rows<R, V, ADD>(a + r * a_row, a_row, a_depth, b, depth, c + r * QB);
  a += r * a_row;
  c += r * QB;
  const int64_t left = rows - r;
  if constexpr (R > 6) {
    if (left == 6) product_rows<6, V, ADD>(a, a_row, a_depth, b, depth, c);
    if (left == 7) product_rows<7, V, ADD>(a, a_row, a_depth, b, depth, c);
  }
  switch (left) {
    case 1: product_rows<1, V, ADD>(a, a_row, a_depth, b, depth, c); break;
    case 2: product_rows<2, V, ADD>(a, a_row, a_depth, b, depth, c); break;
    case 3: product_rows<3, V, ADD>(a, a_row, a_depth, b, depth, c); break;
    case 4: product_rows<4, V, ADD>(a, a_row, a_depth, b, depth, c); break;
    case 5: product_rows<5, V, ADD>(a, a_row, a_depth, b, depth, c); break;
    default: break;
  }
}

// For the vectors of a range; the others of c stay as they are.
template <bool ADD>
static inline void product(const float* a, int64_t a_row, int64_t a_depth, int64_t rows,
                           const float* b, int64_t depth, float* c, Range range = EVERY) {
  b += range.first * W;
  c += range.first * W;
  switch (range.end - range.first) {
#if SL_AVX512
    case 3: return product_vectors<3, ADD>(a, a_row, a_depth, rows, b, depth, c);
    case 2: return product_vectors<2, ADD>(a, a_row, a_depth, rows, b, depth, c);
#endif
    case 1: return product_vectors<1, ADD>(a, a_row, a_depth, rows, b, depth, c);
    default: return product_vectors<VECTORS, ADD>(a, a_row, a_depth, rows, b, depth, c);
  }
}

#if SL_AVX512
// rows[i] lane j <-> rows[j] lane i
SL_INLINE void transpose16(__m512 rows[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

// lanes[d][lane] = factor * rows[lane][d], 0 in the lanes from count to width (of whole vectors).
template <class T>
static inline void pack_lanes(const T* const* rows, int count, int64_t dim, float factor,
                              float* lanes, int width = QB) {
#if SL_AVX512
  for (int lane = 0; lane < width; lane += 16)
    for (int64_t d = 0; d < dim; d += 16) {
      const int n = dim - d < 16 ? static_cast<int>(dim - d) : 16;
      __m512 tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        tile[i] = lane + i < count ? (load_n(rows[lane + i] + d, n) * set1(factor)).v : zero().v;
      transpose16(tile);
      for (int i = 0; i < n; ++i) _mm512_storeu_ps(lanes + (d + i) * QB + lane, tile[i]);
    }
#else
  for (int lane = 0; lane < width; ++lane)
    for (int64_t d = 0; d < dim; ++d)
      lanes[d * QB + lane] = lane < count ? factor * to_float(rows[lane][d]) : 0.0f;
#endif
}

// rows[lane][d] = factor[lane] * lanes[d][lane] for the first count lanes.
template <class T>
static inline void unpack_lanes(const float* lanes, const float* factor, int count, int64_t dim,
                                T* const* rows) {
#if SL_AVX512
  for (int lane = 0; lane < count; lane += 16)
    for (int64_t d = 0; d < dim; d += 16) {
      const int n = dim - d < 16 ? static_cast<int>(dim - d) : 16;
      __m512 tile[16];
      const F f = load(factor + lane);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        tile[i] = i < n ? (load(lanes + (d + i) * QB + lane) * f).v : zero().v;
      transpose16(tile);
      const int live = count - lane < 16 ? count - lane : 16;
      for (int i = 0; i < live; ++i) store_n(rows[lane + i] + d, F{tile[i]}, n);
    }
#else
  for (int lane = 0; lane < count; ++lane)
    for (int64_t d = 0; d < dim; ++d)
      from_float(factor[lane] * lanes[d * QB + lane], rows[lane][d]);
#endif
}

// The query rows of an item, lane by lane.
template <class T>
struct Queries {
  const T* query[QB];
  T* out[QB];
  int64_t stat[QB];   // index into lse and magnitude
  int64_t limit[QB];  // last key that the lane sees, may be negative
  int count;
  int64_t least, most;  // of limit
};

template <class T>
static inline void find_lanes(const DenseArgs& a, const DenseItem& item, Queries<T>& lanes) {
  const int64_t group = a.heads / a.kv_heads;
  lanes.count = static_cast<int>(item.count);
  lanes.least = INT64_MAX;
  lanes.most = INT64_MIN;
  int64_t head = item.kv_head * group + item.first / a.q_len, i = item.first % a.q_len;
  for (int lane = 0; lane < lanes.count; ++lane) {
    const int64_t limit = a.causal ? i + a.kv_len - a.q_len : a.kv_len - 1;
    lanes.query[lane] = static_cast<const T*>(a.query.data) + item.batch * a.query.batch +
                        head * a.query.head + i * a.query.row;
    lanes.stat[lane] = (item.batch * a.heads + head) * a.q_len + i;
    lanes.out[lane] = static_cast<T*>(a.out) + lanes.stat[lane] * a.value_dim;
    lanes.limit[lane] = limit;
    if (limit < lanes.least) lanes.least = limit;
    if (limit > lanes.most) lanes.most = limit;
    if (++i == a.q_len) {
      i = 0;
      ++head;
    }
  }
  for (int lane = lanes.count; lane < QB; ++lane) lanes.limit[lane] = lanes.most;
}

// What the rows of an item keep under a mask.
SL_INLINE KeptTiles kept_tiles(const DenseArgs& a, const DenseItem& item) {
  const int64_t head = item.kv_head * (a.heads / a.kv_heads) + item.first / a.q_len;
  return {a, item.batch, head, item.first % a.q_len, item.count};
}

// Running maximum (in units of log2) and sum of each lane.
struct Stats {
  float top[QB], sum[QB];
};

SL_INLINE void clear(Stats& stats) {
  for (int v = 0; v < VECTORS; ++v) {
    store(stats.top + v * W, set1(LOWEST));
    store(stats.sum + v * W, zero());
  }
}

// Takes in the scores of n keys. Returns whether what was summed so far must be multiplied by
// shrink[lane].
static inline bool raise_tops(const float* scores, int64_t n, Stats& stats, float* shrink,
                              Range range) {
  F tops[VECTORS], grown = set1(LOWEST);
  for (int v = range.first; v < range.end; ++v) tops[v] = set1(-__builtin_inff());
  for (int64_t j = 0; j < n; ++j)
    for (int v = range.first; v < range.end; ++v)
      tops[v] = max(tops[v], load(scores + j * QB + v * W));
  for (int v = range.first; v < range.end; ++v)
    grown = max(grown, tops[v] - load(stats.top + v * W));
  if (!(largest(grown) > SLACK)) return false;
  for (int v = range.first; v < range.end; ++v) {
    const F old = load(stats.top + v * W), top = max(old, tops[v]), alpha = power(old - top);
    store(shrink + v * W, alpha);
    store(stats.top + v * W, top);
    store(stats.sum + v * W, load(stats.sum + v * W) * alpha);
  }
  return true;
}

static inline void shrink_rows(float* lanes, int64_t rows, const float* shrink, Range range) {
  for (int64_t r = 0; r < rows; ++r)
    for (int v = range.first; v < range.end; ++v) {
      float* at = lanes + r * QB + v * W;
      store(at, load(at) * load(shrink + v * W));
    }
}

// Scores of keys j0 ... j0 + n - 1 that padding or causality forbid become -inf.
template <class T>
static inline void forbid(const Queries<T>& lanes, const uint8_t* attend, int64_t j0, int64_t n,
                          float* scores) {
  const F never = set1(-__builtin_inff());
  const bool edge = lanes.least < j0 + n - 1;
  float ahead[QB];  // keys of the block that the lane sees
  if (edge)
    for (int lane = 0; lane < QB; ++lane) {
      const int64_t seen = lanes.limit[lane] - j0 + 1;
      ahead[lane] = static_cast<float>(seen < 0 ? 0 : seen > n ? n : seen);
    }
  for (int64_t j = 0; j < n; ++j) {
    if (attend && !attend[j0 + j]) {
      for (int v = 0; v < VECTORS; ++v) store(scores + j * QB + v * W, never);
    } else if (edge) {
      const F index = set1(static_cast<float>(j));
      for (int v = 0; v < VECTORS; ++v) {
        float* at = scores + j * QB + v * W;
        store(at, where_less(index, load(ahead + v * W), load(at), never));
      }
    }
  }
}

SL_INLINE int64_t count_attended(const uint8_t* attend, int64_t j0, int64_t n) {
  if (!attend) return n;
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += attend[j0 + j] != 0;
  return count;
}

// Writes out, lse and magnitude from the sums acc[value_dim][QB].
template <class T>
static inline void finish(const DenseArgs& a, const Queries<T>& lanes, const Stats& stats,
                          const float* acc) {
  float inverse[QB], magnitude[QB];
  for (int v = 0; v < VECTORS; ++v) store(magnitude + v * W, zero());
  for (int lane = 0; lane < QB; ++lane)
    inverse[lane] = stats.sum[lane] == 0.0f ? 0.0f : 1.0f / stats.sum[lane];
  unpack_lanes(acc, inverse, lanes.count, a.value_dim, lanes.out);
  if (a.magnitude) {
    for (int64_t d = 0; d < a.value_dim; ++d)
      for (int v = 0; v < VECTORS; ++v) {
        float* at = magnitude + v * W;
        store(at, load(at) + abs(load(acc + d * QB + v * W) * load(inverse + v * W)));
      }
    for (int lane = 0; lane < lanes.count; ++lane)
      a.magnitude[lanes.stat[lane]] = magnitude[lane];
  }
  if (a.lse)
    for (int lane = 0; lane < lanes.count; ++lane)
      a.lse[lanes.stat[lane]] = stats.sum[lane] == 0.0f
                                    ? -__builtin_inff()
                                    : LN2 * stats.top[lane] + __builtin_logf(stats.sum[lane]);
}

}  // namespace sparseloom::SL_TIER::dense
