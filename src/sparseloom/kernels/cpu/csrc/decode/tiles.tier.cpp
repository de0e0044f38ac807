// Dot products of queries with keys, and weighted sums of values, on a tile of the cache.
#include "decode.hpp"
#include "lanes.hpp"

namespace sparseloom::SL_TIER {
namespace {

// What lies between a prefetch and its use: rows of a list, bytes of consecutive rows. The
// prefetchers of the processor stop at the end of a page and do not follow lists.
constexpr int LISTED_AHEAD = 96, BYTES_AHEAD = 8192;

SL_INLINE const char* row_of(const Rows& rows, int64_t i) {
  return rows.data + (rows.list ? rows.list[i] : rows.first + i) * rows.stride;
}

SL_INLINE void prefetch_row(const Rows& rows, int64_t i, int bytes) {
  if (i >= rows.ahead) return;
  const char* row = row_of(rows, i);
  for (int at = 0; at < bytes; at += 64) prefetch(row + at);
}

// ---------------------------------------------------------------- keys

template <class T>
struct Whole {
  static constexpr int parts = 1;
  static constexpr int bytes(int dim) { return dim * static_cast<int>(sizeof(T)); }
  static SL_INLINE void get(const char* row, int at, F (&x)[1]) {
    x[0] = load(reinterpret_cast<const T*>(row) + at);
  }
  static SL_INLINE void get_n(const char* row, int at, int n, F (&x)[1]) {
    x[0] = load_n(reinterpret_cast<const T*>(row) + at, n);
  }
};

struct Nibbles {
  static constexpr int parts = 2;
  static constexpr int bytes(int dim) { return dim / 2; }
  static SL_INLINE void get(const char* row, int at, F (&x)[2]) {
    load_nibbles(reinterpret_cast<const uint8_t*>(row) + at, x[0], x[1]);
  }
  static SL_INLINE void get_n(const char* row, int at, int n, F (&x)[2]) {
    load_nibbles_n(reinterpret_cast<const uint8_t*>(row) + at, n, x[0], x[1]);
  }
};

// W sums at a time: QUERIES rows times W / QUERIES keys.
template <class Key, int QUERIES>
void score(const ScoreTile& t, int row0) {
  constexpr int KEYS = W / QUERIES;
  const int span = t.dim / Key::parts, tail = span % W, whole = span - tail;
  const int64_t part = (span + 15) / 16 * 16;
  const int count = t.keys.count, row_bytes = Key::bytes(t.dim);
  const bool fetch = row0 == 0;
  const int ahead = t.keys.list ? LISTED_AHEAD : BYTES_AHEAD / row_bytes;
  const float* query[QUERIES];
  for (int r = 0; r < QUERIES; ++r) query[r] = t.query[row0 + r];
  for (int i = 0; i < count; i += KEYS) {
    const char* key[KEYS];
    for (int k = 0; k < KEYS; ++k) key[k] = row_of(t.keys, i + k < count ? i + k : count - 1);
    if (fetch)
      for (int k = 0; k < KEYS; ++k) prefetch_row(t.keys, i + k + ahead, row_bytes);
    F acc[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) acc[j] = zero();
    for (int at = 0; at < whole; at += W) {
      F q[QUERIES][Key::parts];
#pragma GCC unroll 4
      for (int r = 0; r < QUERIES; ++r)
        for (int p = 0; p < Key::parts; ++p) q[r][p] = load(query[r] + p * part + at);
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; ++k) {
        F x[Key::parts];
        Key::get(key[k], at, x);
#pragma GCC unroll 4
        for (int r = 0; r < QUERIES; ++r)
          for (int p = 0; p < Key::parts; ++p)
            acc[r * KEYS + k] = fma(x[p], q[r][p], acc[r * KEYS + k]);
      }
    }
    if (tail) {
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; ++k) {
        F x[Key::parts];
        Key::get_n(key[k], whole, tail, x);
#pragma GCC unroll 4
        for (int r = 0; r < QUERIES; ++r)
          for (int p = 0; p < Key::parts; ++p)
            acc[r * KEYS + k] =
                fma(x[p], load_n(query[r] + p * part + whole, tail), acc[r * KEYS + k]);
      }
    }
    const F result = sums(acc);
    if (QUERIES == 1) {
      if (i + W <= count) store(t.scores[row0] + i, result);
      else store_n(t.scores[row0] + i, result, count - i);
    } else {
      float lanes[W];
      store(lanes, result);
      const int n = count - i < KEYS ? count - i : KEYS;
      for (int r = 0; r < QUERIES; ++r)
        for (int k = 0; k < n; ++k) t.scores[row0 + r][i + k] = lanes[r * KEYS + k];
    }
  }
}

template <class Key>
void scores(const ScoreTile& t) {
  int r = 0;
  for (; r + 4 <= t.rows; r += 4) score<Key, 4>(t, r);
  if (r + 2 <= t.rows) score<Key, 2>(t, r), r += 2;
  if (r < t.rows) score<Key, 1>(t, r);
}

// ---------------------------------------------------------------- values

// Dimensions at … at + VECTORS * W - 1, or the first `tail` of a single vector.
template <class T, int ROWS, int VECTORS, bool TAIL>
void slice(const ValueTile& t, int row0, int at, int tail) {
  constexpr int CHAINS = ROWS * VECTORS < 8 ? 2 : 1;  // independent sums hide the latency
  const auto get = [&](const char* row, int v) -> F {
    const T* p = reinterpret_cast<const T*>(row) + at + v * W;
    if constexpr (TAIL) return load_n(p, tail);
    else return load(p);
  };
  F acc[CHAINS][ROWS][VECTORS];
  for (int c = 0; c < CHAINS; ++c)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) acc[c][r][v] = zero();
  const float* weight[ROWS];
  for (int r = 0; r < ROWS; ++r) weight[r] = t.weights[row0 + r];
  const int count = t.values.count, row_bytes = t.dim * static_cast<int>(sizeof(T));
  const bool fetch = row0 == 0 && at == 0;
  const int ahead = t.values.list ? LISTED_AHEAD : BYTES_AHEAD / row_bytes;
  const auto add = [&](int i, F (&into)[ROWS][VECTORS]) {
    const char* row = row_of(t.values, i);
    if (fetch) prefetch_row(t.values, i + ahead, row_bytes);
    F x[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) x[v] = get(row, v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const F w = set1(weight[r][i]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) into[r][v] = fma(w, x[v], into[r][v]);
    }
  };
  int i = 0;
  for (; i + CHAINS <= count; i += CHAINS)
    for (int c = 0; c < CHAINS; ++c) add(i + c, acc[c]);
  if (i < count) add(i, acc[0]);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      F total = acc[0][r][v];
      if (CHAINS == 2) total = total + acc[CHAINS - 1][r][v];
      float* out = t.out[row0 + r] + at + v * W;
      if constexpr (TAIL) store_n(out, load_n(out, tail) + total, tail);
      else store(out, load(static_cast<const float*>(out)) + total);
    }
}

template <class T, int ROWS>
void slices(const ValueTile& t, int row0) {
  int at = 0;
  if constexpr (W * 4 <= 64 || ROWS < 4)
    for (; at + 4 * W <= t.dim; at += 4 * W) slice<T, ROWS, 4, false>(t, row0, at, 0);
  for (; at + 2 * W <= t.dim; at += 2 * W) slice<T, ROWS, 2, false>(t, row0, at, 0);
  for (; at + W <= t.dim; at += W) slice<T, ROWS, 1, false>(t, row0, at, 0);
  if (at < t.dim) slice<T, ROWS, 1, true>(t, row0, at, t.dim - at);
}

template <class T>
void values(const ValueTile& t) {
  int r = 0;
  for (; r + 4 <= t.rows; r += 4) slices<T, 4>(t, r);
  if (r + 2 <= t.rows) slices<T, 2>(t, r), r += 2;
  if (r < t.rows) slices<T, 1>(t, r);
}

}  // namespace

extern const TileKernels decode_tiles = {
    {scores<Whole<float>>, scores<Whole<Bf16>>, scores<Whole<Fp16>>, scores<Whole<int8_t>>,
     scores<Whole<int16_t>>, scores<Nibbles>},
    {values<float>, values<Bf16>, values<Fp16>, values<int8_t>},
};

}  // namespace sparseloom::SL_TIER
