// Dense attention in fp32 arithmetic, for every input type: 16-bit keys and values are widened one
// block at a time, while it is in the cache.
#include "dense/lanes.hpp"

namespace sparseloom::SL_TIER::dense {
namespace {

constexpr int64_t KB = 48;                    // keys of a block
constexpr int64_t MASKED_KB = 2 * MASK_KEYS;  // at most, under a mask

// Rows as fp32: the rows themselves, or a widened copy.
struct Rows { const float* at; int64_t stride; };

SL_INLINE Rows widen(const float* rows, int64_t stride, int64_t, int64_t, float*) {
  return {rows, stride};
}
template <class Half>
SL_INLINE Rows widen(const Half* rows, int64_t stride, int64_t count, int64_t dim, float* wide) {
  for (int64_t j = 0; j < count; ++j) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(wide + j * dim + d, load(rows + j * stride + d));
    if (d < dim) store_n(wide + j * dim + d, load_n(rows + j * stride + d, dim - d), dim - d);
  }
  return {wide, dim};
}

struct Scratch { float *lanes, *scores, *acc, *keys, *values; };

Scratch layout(const DenseArgs& a, void* memory) {
  auto* at = static_cast<float*>(memory);
  Scratch s;
  s.lanes = at;
  s.scores = s.lanes + a.head_dim * QB;
  s.acc = s.scores + MASKED_KB * QB;
  s.keys = s.acc + a.value_dim * QB;
  s.values = s.keys + MASKED_KB * a.head_dim;
  return s;
}

size_t scratch_bytes(const DenseArgs& a) {
  return sizeof(float) *
         static_cast<size_t>((a.head_dim + MASKED_KB + a.value_dim) * QB +
                             MASKED_KB * (a.head_dim + a.value_dim));
}

size_t shared_bytes(const DenseArgs&) { return 0; }
int64_t shared_parts(const DenseArgs&) { return 0; }
void prepare(const DenseArgs&, void*, int64_t) {}

// Adjacent keys, and a bit for each block of queries of the mask that keeps them.
struct Block { int64_t first, count; int kept; };

// The keys that some query of an item may see, block after block.
struct Blocks {
  int64_t most;  // last key that a query sees
  bool masked;
  KeptTiles tiles;  // under a mask
  int64_t ahead = -1;  // the tile that ended the last block
  int kept = 0;
  int64_t next = 0;  // key, without a mask

  // False when there is none.
  bool take(Block& block) {
    if (!masked) {
      block = {next, most + 1 - next < KB ? most + 1 - next : KB, 0};
      next += KB;
      return block.count > 0;
    }
    if (ahead < 0) ahead = tiles.next(kept);
    if (ahead < 0 || ahead * MASK_KEYS > most) return false;
    block = {ahead * MASK_KEYS, MASK_KEYS, kept};
    ahead = tiles.next(kept);
    if (ahead * MASK_KEYS == block.first + MASK_KEYS && kept == block.kept) {
      block.count += MASK_KEYS;
      ahead = -1;
    }
    if (block.first + block.count > most + 1) block.count = most + 1 - block.first;
    return true;
  }
};

// Scores of n keys become -inf for the queries whose block does not keep them. `offset` of the first
// lane in its block.
SL_INLINE void forbid_tiles(int kept, int64_t offset, int64_t n, float* scores) {
  const F never = set1(-__builtin_inff());
  for (int v = 0; v < VECTORS; ++v)
    if (!(kept >> (offset + v * W) / MASK_QUERIES & 1))
      for (int64_t j = 0; j < n; ++j) store(scores + j * QB + v * W, never);
}

template <class T>
void attend(const DenseArgs& a, const DenseItem& item, const void*, void* memory) {
  const Scratch s = layout(a, memory);
  Queries<T> lanes;
  find_lanes(a, item, lanes);
  pack_lanes(lanes.query, lanes.count, a.head_dim, a.scale * LOG2E, s.lanes);
  const T* keys = static_cast<const T*>(a.key.data) + item.batch * a.key.batch +
                  item.kv_head * a.key.head;
  const T* values = static_cast<const T*>(a.value.data) + item.batch * a.value.batch +
                    item.kv_head * a.value.head;
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len : nullptr;
  Stats stats;
  clear(stats);
  for (int64_t i = 0; i < a.value_dim * QB; i += W) store(s.acc + i, zero());
  Blocks blocks = {lanes.most, a.indices != nullptr, {}};
  if (blocks.masked) blocks.tiles = kept_tiles(a, item);
  for (Block block; blocks.take(block);) {
    const int64_t j0 = block.first, n = block.count;
    const int64_t live = count_attended(attended, j0, n);
    if (live == 0) continue;
    const Rows key = widen(keys + j0 * a.key.row, a.key.row, n, a.head_dim, s.keys);
    product<false>(key.at, key.stride, 1, n, s.lanes, a.head_dim, s.scores);
    if (live < n || lanes.least < j0 + n - 1) forbid(lanes, attended, j0, n, s.scores);
    if (blocks.masked && block.kept != blocks.tiles.all())
      forbid_tiles(block.kept, item.first % a.q_len % MASK_QUERIES, n, s.scores);
    float shrink[QB];
    if (raise_tops(s.scores, n, 1.0f, stats, shrink)) shrink_rows(s.acc, a.value_dim, shrink);
    for (int v = 0; v < VECTORS; ++v) {
      const F top = load(stats.top + v * W);
      F sum = load(stats.sum + v * W);
      for (int64_t j = 0; j < n; ++j) {
        float* at = s.scores + j * QB + v * W;
        const F p = power(load(at) - top);
        store(at, p);
        sum = sum + p;
      }
      store(stats.sum + v * W, sum);
    }
    const Rows value = widen(values + j0 * a.value.row, a.value.row, n, a.value_dim, s.values);
    product<true>(value.at, 1, value.stride, a.value_dim, s.scores, n, s.acc);
  }
  finish(a, lanes, stats, s.acc);
}

// Here a lane is a key, and the rows are queries.
template <class T>
void columns(const DenseArgs& a, const DenseColumns& item, void* memory) {
  const Scratch s = layout(a, memory);
  const int count = static_cast<int>(item.count);
  const int64_t kv_head = item.head / (a.heads / a.kv_heads), shift = a.kv_len - a.q_len;
  const T* keys = static_cast<const T*>(a.key.data) + item.batch * a.key.batch +
                  kv_head * a.key.head + item.first * a.key.row;
  const T* rows[QB];
  for (int lane = 0; lane < count; ++lane) rows[lane] = keys + lane * a.key.row;
  pack_lanes(rows, count, a.head_dim, a.scale * LOG2E, s.lanes);
  const T* queries = static_cast<const T*>(a.query.data) + item.batch * a.query.batch +
                     item.head * a.query.head;
  const float* lse = a.lse + (item.batch * a.heads + item.head) * a.q_len;
  F sums[VECTORS], index[VECTORS];
  float ramp[QB];
  for (int lane = 0; lane < QB; ++lane) ramp[lane] = static_cast<float>(lane);
  for (int v = 0; v < VECTORS; ++v) {
    sums[v] = zero();
    index[v] = load(ramp + v * W);
  }
  const int64_t start = a.causal && item.first > shift ? item.first - shift : 0;
  for (int64_t i0 = start; i0 < a.q_len; i0 += KB) {
    const int64_t n = a.q_len - i0 < KB ? a.q_len - i0 : KB;
    const Rows query = widen(queries + i0 * a.query.row, a.query.row, n, a.head_dim, s.keys);
    product<false>(query.at, query.stride, 1, n, s.lanes, a.head_dim, s.scores);
    for (int64_t i = 0; i < n; ++i) {
      const float norm = lse[i0 + i] == -__builtin_inff() ? __builtin_inff() : lse[i0 + i] * LOG2E;
      const int64_t seen = a.causal ? i0 + i + shift + 1 - item.first : QB;
      const F end = set1(static_cast<float>(seen < QB ? seen : QB)), centre = set1(norm);
      for (int v = 0; v < VECTORS; ++v) {
        const F p = power(load(s.scores + i * QB + v * W) - centre);
        sums[v] = sums[v] + where_less(index[v], end, p, zero());
      }
    }
  }
  float total[QB];
  for (int v = 0; v < VECTORS; ++v) store(total + v * W, sums[v]);
  float* out = a.columns + (item.batch * a.heads + item.head) * a.kv_len + item.first;
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len + item.first : nullptr;
  for (int lane = 0; lane < count; ++lane)
    out[lane] = attended && !attended[lane] ? 0.0f : total[lane];
}

template <class T>
constexpr DenseKernels kernels = {QB,      shared_bytes,  shared_parts, prepare,
                                  scratch_bytes, attend<T>, columns<T>};

}  // namespace

extern const DenseKernels fp32, wide_bf16, wide_fp16;
const DenseKernels fp32 = kernels<float>;
const DenseKernels wide_bf16 = kernels<Bf16>;
const DenseKernels wide_fp16 = kernels<Fp16>;

}  // namespace sparseloom::SL_TIER::dense
