// Dense attention in fp32 arithmetic, for every input type: 16-bit keys and values are widened one
// block at a time, while it is in the cache.
#include "dense/lanes.hpp"
#include "dense/pool.hpp"

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

// Means are made once, in fp32: rows of keys, of values, and what their weights lack, in each of the
// three one chunk of means after the other.
struct Means {
  float *keys, *values, *missing;
};

Means means_layout(const DenseArgs& a, const Places& places, const void* head) {
  float* at = static_cast<float*>(const_cast<void*>(head));
  const int64_t rows = places.means() * MASK_KEYS;
  return {at, at + rows * a.head_dim, at + rows * (a.head_dim + a.value_dim)};
}

size_t head_bytes(const DenseArgs& a) {
  return sizeof(float) *
         static_cast<size_t>(Places(a).means() * MASK_KEYS * (a.head_dim + a.value_dim + 1));
}

int64_t head_parts(const DenseArgs& a) { return Places(a).means(); }

template <class T>
const T* head_rows(const DenseView& view, int64_t batch, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch + head * view.head;
}

template <class T>
void prepare(const DenseArgs& a, int64_t batch, int64_t kv_head, void* head, int64_t chunk) {
  const Places places(a);
  const Segments segments(a, batch, places, places.keys() + chunk);
  const Means to = means_layout(a, places, head);
  const int64_t first = chunk * MASK_KEYS;
  missing_weights(segments, to.missing + first);
  pool_rows(segments, head_rows<T>(a.key, batch, kv_head), a.key.row, a.head_dim,
            to.keys + first * a.head_dim, a.head_dim);
  pool_rows(segments, head_rows<T>(a.value, batch, kv_head), a.value.row, a.value_dim,
            to.values + first * a.value_dim, a.value_dim);
}

// Adjacent keys, or means over segments of 2^log2 keys.
struct Block {
  static constexpr int MOST = 2 << (LOG2S - 1);
  int log2;
  int64_t first, count;
  int tiles;       // under a mask: tiles of keys that they come from
  int kept[MOST];  // and which blocks of queries keep each of them
  int64_t tile() const { return MASK_KEYS >> log2; }  // rows of one
};

// The blocks that some query of an item may see, one after the other.
struct Blocks {
  int64_t most, kv_len;  // last key that a query sees
  bool masked;
  KeptTiles tiles;  // under a mask
  KeptTile ahead;
  bool more = false;
  int64_t next = 0;  // key, without a mask

  template <class T>
  Blocks(const DenseArgs& a, const DenseItem& item, const Queries<T>& lanes)
      : most(lanes.most), kv_len(a.kv_len), masked(a.offsets) {
    if (!masked) return;
    tiles = kept_tiles(a, item);
    more = tiles.next(ahead);
  }

  // False when there is none.
  bool take(Block& block) {
    if (!masked) {
      block.log2 = block.tiles = 0;
      block.first = next;
      block.count = most + 1 - next < KB ? most + 1 - next : KB;
      next += KB;
      return block.count > 0;
    }
    while (more && ahead.log2 == 0 && ahead.tile * MASK_KEYS > most) more = tiles.next(ahead);
    if (!more) return false;
    const int64_t first = ahead.tile;
    block.log2 = ahead.log2;
    block.first = first * block.tile();
    block.tiles = 0;
    do {
      block.kept[block.tiles++] = ahead.kept;
      more = tiles.next(ahead);
      // Tiles of means are short, and queries skip what only others keep of a block.
    } while (more && ahead.log2 == block.log2 && ahead.tile == first + block.tiles &&
             (block.log2 || ahead.kept == block.kept[0]) &&
             block.tiles * block.tile() < MASKED_KB);
    const int64_t seen = block.log2 ? kv_len : most + 1, size = int64_t{1} << block.log2;
    const int64_t left = (seen + size - 1) / size - block.first;
    block.count = block.tiles * block.tile() < left ? block.tiles * block.tile() : left;
    return true;
  }
};

// The vectors that some tile of a block is kept by. `offset` of the first lane in its block of queries.
SL_INLINE Range kept_range(const Block& block, int64_t offset) {
  int any = 0;
  for (int t = 0; t < block.tiles; ++t) any |= block.kept[t];
  Range range = {0, VECTORS};
  while (!(any >> (offset + range.first * W) / MASK_QUERIES & 1)) ++range.first;
  while (!(any >> (offset + (range.end - 1) * W) / MASK_QUERIES & 1)) --range.end;
  return range;
}

// Scores become -inf for the queries whose block does not keep their tile.
SL_INLINE void forbid_tiles(const Block& block, int64_t offset, Range range, float* scores) {
  const F never = set1(-__builtin_inff());
  for (int t = 0; t < block.tiles; ++t) {
    const int64_t begin = t * block.tile(), end = begin + block.tile();
    for (int v = range.first; v < range.end; ++v)
      if (!(block.kept[t] >> (offset + v * W) / MASK_QUERIES & 1))
        for (int64_t j = begin; j < end && j < block.count; ++j) store(scores + j * QB + v * W, never);
  }
}

// Whether some of n means have keys.
SL_INLINE bool any_key(const float* missing, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (missing[j] != -__builtin_inff()) return true;
  return false;
}

// Means weigh as much as their keys.
SL_INLINE void add_weights(const Block& block, const float* missing, Range range, float* scores) {
  for (int64_t j = 0; j < block.count; ++j) {
    const F weight = set1(static_cast<float>(block.log2) + missing[j]);
    for (int v = range.first; v < range.end; ++v) {
      float* at = scores + j * QB + v * W;
      store(at, load(at) + weight);
    }
  }
}

template <class T>
void attend(const DenseArgs& a, const DenseItem& item, const void* head, void* memory) {
  const Scratch s = layout(a, memory);
  Queries<T> lanes;
  find_lanes(a, item, lanes);
  pack_lanes(lanes.query, lanes.count, a.head_dim, a.scale * LOG2E, s.lanes);
  const T* keys = head_rows<T>(a.key, item.batch, item.kv_head);
  const T* values = head_rows<T>(a.value, item.batch, item.kv_head);
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len : nullptr;
  const Places places(a);
  const Means means = means_layout(a, places, head);
  const int64_t offset = item.first % a.q_len % MASK_QUERIES;
  Stats stats;
  clear(stats);
  for (int64_t i = 0; i < a.value_dim * QB; i += W) store(s.acc + i, zero());
  Blocks blocks(a, item, lanes);
  for (Block block; blocks.take(block);) {
    const int64_t j0 = block.first, n = block.count;
    const Range range = blocks.masked ? kept_range(block, offset) : EVERY;
    Rows key, value;
    if (block.log2 == 0) {
      const int64_t live = count_attended(attended, j0, n);
      if (live == 0) continue;
      key = widen(keys + j0 * a.key.row, a.key.row, n, a.head_dim, s.keys);
      product<false>(key.at, key.stride, 1, n, s.lanes, a.head_dim, s.scores, range);
      if (live < n || lanes.least < j0 + n - 1) forbid(lanes, attended, j0, n, s.scores);
    } else {
      const int64_t row = (places.first[block.log2] - places.keys()) * MASK_KEYS + j0;
      if (!any_key(means.missing + row, n)) continue;
      key = {means.keys + row * a.head_dim, a.head_dim};
      value = {means.values + row * a.value_dim, a.value_dim};
      product<false>(key.at, key.stride, 1, n, s.lanes, a.head_dim, s.scores, range);
      add_weights(block, means.missing + row, range, s.scores);
    }
    if (blocks.masked) forbid_tiles(block, offset, range, s.scores);
    float shrink[QB];
    if (raise_tops(s.scores, n, stats, shrink, range))
      shrink_rows(s.acc, a.value_dim, shrink, range);
    for (int v = range.first; v < range.end; ++v) {
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
    if (block.log2 == 0) value = widen(values + j0 * a.value.row, a.value.row, n, a.value_dim, s.values);
    product<true>(value.at, 1, value.stride, a.value_dim, s.scores, n, s.acc, range);
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
constexpr DenseKernels kernels = {QB,            head_bytes, head_parts, prepare<T>,
                                  scratch_bytes, attend<T>,  columns<T>};

}  // namespace

extern const DenseKernels fp32, wide_bf16, wide_fp16;
const DenseKernels fp32 = kernels<float>;
const DenseKernels wide_bf16 = kernels<Bf16>;
const DenseKernels wide_fp16 = kernels<Fp16>;

}  // namespace sparseloom::SL_TIER::dense
