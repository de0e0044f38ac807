// SDDMM, softmax and SpMM on one row of a mask: bq queries and their kept blocks of bk keys.
#include "unfused/unfused.hpp"

#include "dense/lanes.hpp"

namespace sparseloom::SL_TIER::unfused {
namespace {

using dense::QB;
using dense::VECTORS;

constexpr int64_t KEYS = 48;  // whose scores are made at once
constexpr float NEVER = -__builtin_inff();

struct Row {
  int64_t batch, head, first, live, begin, end;  // queries first ... first + live - 1
  const float* keys;                             // of the key head
};

Row find_row(const UnfusedArgs& a, int64_t row) {
  const int64_t head = row / a.q_blocks, block = row % a.q_blocks;
  const int64_t* at = a.offsets + head * (a.q_blocks + 1) + block;
  Row r;
  r.batch = head / a.heads;
  r.head = head % a.heads;
  r.first = block * a.bq;
  r.live = a.q_len - r.first < a.bq ? a.q_len - r.first : a.bq;
  r.begin = at[0];
  r.end = at[1];
  r.keys = a.kv_heads == 0 ? nullptr
                           : static_cast<const float*>(a.key.data) + r.batch * a.key.batch +
                                 r.head / (a.heads / a.kv_heads) * a.key.head;
  return r;
}

// ---------------------------------------------------------------- SDDMM

// out[i][lane] = rows[i] . lanes, for V vectors of lanes.
template <int R, int V>
SL_INLINE void dots_of(const float* const* rows, const float* lanes, int64_t dim, float* out) {
  F sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = zero();
  for (int64_t d = 0; d < dim; ++d) {
    F x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(lanes + d * QB + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F y = set1(rows[i][d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[i][v] = fma(y, x[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + i * QB + v * W, sums[i][v]);
}

template <int V>
void dots(const float* const* rows, int64_t count, const float* lanes, int64_t dim, float* out) {
  constexpr int R = V == 1 ? 8 : 6;
  int64_t i = 0;
  for (; i + R <= count; i += R) dots_of<R, V>(rows + i, lanes, dim, out + i * QB);
  for (; i + 2 <= count; i += 2) dots_of<2, V>(rows + i, lanes, dim, out + i * QB);
  if (i < count) dots_of<1, V>(rows + i, lanes, dim, out + i * QB);
}

void dots(const float* const* rows, int64_t count, const float* lanes, int width, int64_t dim,
          float* out) {
  if (width <= W) return dots<1>(rows, count, lanes, dim, out);
  if (width <= 2 * W) return dots<2>(rows, count, lanes, dim, out);
  return dots<VECTORS>(rows, count, lanes, dim, out);
}

// -inf at the pairs of a tile that lie past an edge, or that causality or padding forbid.
void forbid(const UnfusedArgs& a, const Row& r, int64_t block, float* tile) {
  const int64_t j0 = block * a.bk, shift = a.kv_len - a.q_len;
  const uint8_t* attend = a.attend ? a.attend + r.batch * a.kv_len : nullptr;
  const bool whole = r.live == a.bq && j0 + a.bk <= a.kv_len && !attend &&
                     !(a.causal && j0 + a.bk - 1 > r.first + shift);
  if (whole) return;
  for (int64_t i = 0; i < a.bq; ++i)
    for (int64_t c = 0; c < a.bk; ++c) {
      const int64_t j = j0 + c;
      if (i >= r.live || j >= a.kv_len || (attend && !attend[j]) ||
          (a.causal && j > r.first + i + shift))
        tile[i * a.bk + c] = NEVER;
    }
}

float dot(const float* x, const float* y, int64_t dim) {
  F sums[2] = {zero(), zero()};
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    sums[0] = fma(load(x + d), load(y + d), sums[0]);
    sums[1] = fma(load(x + d + W), load(y + d + W), sums[1]);
  }
  for (; d + W <= dim; d += W) sums[0] = fma(load(x + d), load(y + d), sums[0]);
  if (d < dim) {
    const int n = static_cast<int>(dim - d);
    sums[1] = fma(load_n(x + d, n), load_n(y + d, n), sums[1]);
  }
  return sum(sums[0] + sums[1]);
}

// The row of a key; past the end the last, whose scores are overwritten.
SL_INLINE const float* key_at(const UnfusedArgs& a, const Row& r, int64_t j) {
  return r.keys + (j < a.kv_len ? j : a.kv_len - 1) * a.key.row;
}

void sddmm(const UnfusedArgs& a, int64_t at, float* scratch) {
  const Row r = find_row(a, at);
  const float* queries = static_cast<const float*>(a.query.data) + r.batch * a.query.batch +
                         r.head * a.query.head + r.first * a.query.row;
  const int64_t tile = a.bq * a.bk;
  if (r.live < 4) {  // lanes are dims
    for (int64_t n = r.begin; n < r.end; ++n)
      for (int64_t c = 0; c < a.bk; ++c) {
        const float* key = key_at(a, r, a.indices[n] * a.bk + c);
        for (int64_t i = 0; i < r.live; ++i)
          a.to[n * tile + i * a.bk + c] = a.scale * dot(queries + i * a.query.row, key, a.dim);
      }
  } else {  // lanes are queries
    float *lanes = scratch, *scores = lanes + a.dim * QB;
    float ones[QB];
    for (int lane = 0; lane < QB; ++lane) ones[lane] = 1.0f;
    for (int64_t first = 0; first < r.live; first += QB) {
      const int count = static_cast<int>(r.live - first < QB ? r.live - first : QB);
      const int width = (count + W - 1) / W * W;
      const float* rows[QB];
      for (int i = 0; i < count; ++i) rows[i] = queries + (first + i) * a.query.row;
      dense::pack_lanes(rows, count, a.dim, a.scale, lanes, width <= 2 * W ? width : QB);
      // Keys in the order of the tiles; a tile of one key is a row of scores as it stands.
      for (int64_t k = r.begin * a.bk; k < r.end * a.bk;) {
        const int64_t left = a.bk == 1 ? r.end - k : a.bk - k % a.bk;
        const int64_t many = left < KEYS ? left : KEYS, n = k / a.bk, c = k % a.bk;
        const float* keys[KEYS];
        for (int64_t i = 0; i < many; ++i)
          keys[i] = key_at(a, r, a.bk == 1 ? a.indices[k + i] : a.indices[n] * a.bk + c + i);
        dots(keys, many, lanes, width, a.dim, scores);
        if (a.bk == 1) {
          for (int64_t i = 0; i < many; ++i) {
            float* to = a.to + (k + i) * a.bq + first;
            for (int lane = 0; lane < count; lane += W)
              store_n(to + lane, load(scores + i * QB + lane), count - lane < W ? count - lane : W);
          }
        } else {
          float* to[QB];
          for (int i = 0; i < count; ++i) to[i] = a.to + n * tile + (first + i) * a.bk + c;
          dense::unpack_lanes(scores, ones, count, many, to);
        }
        k += many;
      }
    }
  }
  for (int64_t n = r.begin; n < r.end; ++n) forbid(a, r, a.indices[n], a.to + n * tile);
}

// ---------------------------------------------------------------- softmax

// Softmax of numbers whose rows repeat with a period that divides W.
void softmax_lanes(const float* from, float* to, int64_t count, int period) {
  float lanes[W];
  const auto fold = [&](F x, bool largest_of) {
    store(lanes, x);
    for (int i = period; i < W; ++i) {
      float& at = lanes[i % period];
      at = largest_of ? (at > lanes[i] ? at : lanes[i]) : at + lanes[i];
    }
    for (int i = period; i < W; ++i) lanes[i] = lanes[i % period];
  };
  const int64_t whole = count / W * W;
  const int rest = static_cast<int>(count - whole);
  F top = set1(NEVER), total = zero();
  float last[W];
  for (int i = 0; i < W; ++i) last[i] = i < rest ? from[whole + i] : NEVER;
  for (int64_t i = 0; i < whole; i += W) top = max(top, load(from + i));
  fold(max(top, load(last)), true);
  for (int i = 0; i < W; ++i)
    if (lanes[i] == NEVER) lanes[i] = 0.0f;
  const F shift = load(lanes), factor = set1(LOG2E);
  for (int64_t i = 0; i < whole; i += W) {
    const F p = dense::power((load(from + i) - shift) * factor);
    total = total + p;
    store(to + i, p);
  }
  const F tail = dense::power((load(last) - shift) * factor);
  fold(total + tail, false);
  for (int i = 0; i < W; ++i) lanes[i] = lanes[i] == 0.0f ? 0.0f : 1.0f / lanes[i];
  const F inverse = load(lanes);
  for (int64_t i = 0; i < whole; i += W) store(to + i, load(to + i) * inverse);
  store_n(to + whole, tail * inverse, rest);
}

void softmax(const UnfusedArgs& a, int64_t at, float*) {
  const Row r = find_row(a, at);
  const int64_t tile = a.bq * a.bk, tiles = r.end - r.begin;
  const float* from = a.from + r.begin * tile;
  float* to = a.to + r.begin * tile;
  if (a.bq == 1) return softmax_lanes(from, to, tiles * a.bk, 1);
  if (a.bk == 1 && W % a.bq == 0) {
    return softmax_lanes(from, to, tiles * a.bq, static_cast<int>(a.bq));
  }
  for (int64_t i = 0; i < a.bq; ++i) {
    float top = NEVER, total = 0.0f;
    for (int64_t n = 0; n < tiles; ++n)
      for (int64_t c = 0; c < a.bk; ++c) {
        const float x = from[n * tile + i * a.bk + c];
        top = x > top ? x : top;
      }
    const F shift = set1(top == NEVER ? 0.0f : top), factor = set1(LOG2E);
    F sums = zero();
    for (int64_t n = 0; n < tiles; ++n)
      for (int64_t c = 0; c < a.bk; c += W) {
        const int64_t place = n * tile + i * a.bk + c;
        const int live = static_cast<int>(a.bk - c < W ? a.bk - c : W);
        const F p = dense::power((load_n(from + place, live) - shift) * factor);
        store_n(to + place, p, live);
        sums = sums + load_n(to + place, live);  // without the lanes past the tile
      }
    total = sum(sums);
    const F inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
    for (int64_t n = 0; n < tiles; ++n)
      for (int64_t c = 0; c < a.bk; c += W) {
        const int64_t place = n * tile + i * a.bk + c;
        const int live = static_cast<int>(a.bk - c < W ? a.bk - c : W);
        store_n(to + place, load_n(to + place, live) * inverse, live);
      }
  }
}

// ---------------------------------------------------------------- SpMM

// R queries from i0 on by V vectors of dims from d0 on; the last vector has `last` lanes.
template <int R, int V>
void sums_of(const UnfusedArgs& a, const Row& r, int64_t i0, int64_t d0, int last, float* out) {
  F sums[R][V];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = zero();
  for (int64_t n = r.begin; n < r.end; ++n) {
    const float* p = a.from + (n * a.bq + i0) * a.bk;
    const int64_t j0 = a.indices[n] * a.bk;
    const int64_t many = a.kv_len - j0 < a.bk ? a.kv_len - j0 : a.bk;
    for (int64_t c = 0; c < many; ++c) {
      const float* row = r.keys + (j0 + c) * a.key.row + d0;
      F x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = V == 1 ? load_n(row, last) : load(row + v * W);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const F y = set1(p[i * a.bk + c]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[i][v] = fma(y, x[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = out + i * a.dim + d0 + v * W;
      if (V == 1) store_n(to, sums[i][v], last);
      else store(to, sums[i][v]);
    }
}

template <int R>
void sums_rows(const UnfusedArgs& a, const Row& r, int64_t i0, float* out) {
  int64_t d = 0;
  for (; d + VECTORS * W <= a.dim; d += VECTORS * W) sums_of<R, VECTORS>(a, r, i0, d, W, out);
  for (; d + 2 * W <= a.dim; d += 2 * W) sums_of<R, 2>(a, r, i0, d, W, out);
  for (; d < a.dim; d += W)
    sums_of<R, 1>(a, r, i0, d, static_cast<int>(a.dim - d < W ? a.dim - d : W), out);
}

void spmm(const UnfusedArgs& a, int64_t at, float*) {
  const Row r = find_row(a, at);
  float* out = a.to + ((r.batch * a.heads + r.head) * a.q_len + r.first) * a.dim;
  int64_t i = 0;
  for (; i + 4 <= r.live; i += 4) sums_rows<4>(a, r, i, out + i * a.dim);
  for (; i < r.live; ++i) sums_rows<1>(a, r, i, out + i * a.dim);
}

size_t scratch_bytes(const UnfusedArgs& a) {
  return sizeof(float) * static_cast<size_t>((a.dim + KEYS) * QB);
}

}  // namespace
}  // namespace sparseloom::SL_TIER::unfused

namespace sparseloom::SL_TIER {

extern const UnfusedKernels unfused_kernels;
const UnfusedKernels unfused_kernels = {unfused::scratch_bytes, unfused::sddmm, unfused::softmax,
                                        unfused::spmm};

}  // namespace sparseloom::SL_TIER
