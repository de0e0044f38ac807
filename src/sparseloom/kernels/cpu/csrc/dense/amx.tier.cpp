// Dense attention of bf16 inputs with AMX tiles.
//
// Tiles of 16 x 16 hold scores S^T = K Q^T (a row per key, a column per query), probabilities P^T in
// pairs of keys as bf16, and sums O^T = V^T P^T. A block of keys passes three stages, and one loop
// runs the three stages of three neighbouring blocks: scores of block t + 1, powers of block t,
// values of block t - 1. Vector instructions stand between the tile products, a few after each:
// the tile unit and the vector units then work at once, which they do not if either comes in bulk.
#include "tier.hpp"

#if SL_AMX

#include "dense/lanes.hpp"
#include "dense/tiles.hpp"

namespace sparseloom::SL_TIER::dense {
namespace {

constexpr int64_t KB = 64;  // keys of a block: all that its three stages touch stays in the cache
constexpr int CHUNKS = KB / CHUNK;  // of a block

struct Sizes {
  int64_t depth;   // chunks of head_dim
  int64_t widths;  // tiles of value_dim, an even number
  int64_t chunks;  // of the keys
};

Sizes sizes(const DenseArgs& a) {
  return {(a.head_dim + CHUNK - 1) / CHUNK, (a.value_dim + 31) / 32 * 2,
          (a.kv_len + CHUNK - 1) / CHUNK};
}

// Tiles of keys and of values, per key head and chunk: 2 * depth and widths.
int64_t chunk_tiles(const Sizes& z) { return 2 * z.depth + z.widths; }

size_t shared_bytes(const DenseArgs& a) {
  const Sizes z = sizes(a);
  return static_cast<size_t>(a.batch * a.kv_heads * z.chunks * chunk_tiles(z) * TILE);
}

int64_t shared_parts(const DenseArgs& a) {
  return a.batch * a.kv_heads * ((sizes(a).chunks + CHUNKS - 1) / CHUNKS);
}

struct Heads { const Bf16 *key, *value; };

Heads find_heads(const DenseArgs& a, int64_t batch, int64_t kv_head) {
  return {static_cast<const Bf16*>(a.key.data) + batch * a.key.batch + kv_head * a.key.head,
          static_cast<const Bf16*>(a.value.data) + batch * a.value.batch + kv_head * a.value.head};
}

void prepare(const DenseArgs& a, void* shared, int64_t part) {
  const Sizes z = sizes(a);
  const int64_t parts = (z.chunks + CHUNKS - 1) / CHUNKS, head = part / parts;
  const Heads h = find_heads(a, head / a.kv_heads, head % a.kv_heads);
  char* tiles = static_cast<char*>(shared) + head * z.chunks * chunk_tiles(z) * TILE;
  const int64_t first = part % parts * CHUNKS;
  for (int64_t c = first; c < z.chunks && c < first + CHUNKS; ++c) {
    char* at = tiles + c * chunk_tiles(z) * TILE;
    for (int half = 0; half < 2; ++half) {
      const int64_t j = c * CHUNK + half * 16;
      copy_tiles(h.key + j * a.key.row, a.key.row, a.kv_len - j, a.head_dim, z.depth,
                 at + half * z.depth * TILE);
    }
    transpose_tiles(h.value + c * CHUNK * a.value.row, a.value.row, a.kv_len - c * CHUNK,
                    a.value_dim, z.widths, at + 2 * z.depth * TILE);
  }
}

// Rows of 32 queries, 128 bytes.
constexpr int64_t ROW = 128, LANES = 32;

struct Memory {
  char* lanes;       // queries: depth x 2 tiles of pairs
  float* scores[2];  // KB rows
  char* powers[2];   // KB / 2 rows of pairs
  float* acc;        // 16 * widths rows
};

size_t scratch_bytes(const DenseArgs& a) {
  const Sizes z = sizes(a);
  // The column sums keep 2 * depth tiles of queries where attend keeps sums.
  const int64_t last = z.widths > z.depth ? z.widths : z.depth;
  return static_cast<size_t>((2 * z.depth + 2 * last) * TILE + 3 * KB * ROW);
}

Memory layout(const DenseArgs& a, void* memory) {
  char* at = static_cast<char*>(memory);
  Memory m;
  m.lanes = at;
  at += 2 * sizes(a).depth * TILE;
  for (int i = 0; i < 2; ++i, at += KB * ROW) m.scores[i] = reinterpret_cast<float*>(at);
  for (int i = 0; i < 2; ++i, at += KB / 2 * ROW) m.powers[i] = at;
  m.acc = reinterpret_cast<float*>(at);
  return m;
}

// Two by two tiles at `at`, tiles 0 ... 3.
SL_INLINE void load_sums(const float* at) {
  _tile_loadd(0, at, ROW);
  _tile_loadd(1, at + 16, ROW);
  _tile_loadd(2, at + 16 * LANES, ROW);
  _tile_loadd(3, at + 16 * LANES + 16, ROW);
}

SL_INLINE void store_sums(float* at) {
  _tile_stored(0, at, ROW);
  _tile_stored(1, at + 16, ROW);
  _tile_stored(2, at + 16 * LANES, ROW);
  _tile_stored(3, at + 16 * LANES + 16, ROW);
}

// Tiles 0 ... 3 += (two tiles one above the other) (two tiles side by side), with some of the
// vector work after each product.
template <class Vectors>
SL_INLINE void multiply(const char* upper, const char* lower, const char* left, const char* right,
                        int64_t stride, Vectors& vectors) {
  _tile_loadd(4, upper, 64);
  _tile_loadd(6, left, stride);
  _tile_dpbf16ps(0, 4, 6);
  vectors.some();
  _tile_loadd(7, right, stride);
  _tile_dpbf16ps(1, 4, 7);
  vectors.some();
  _tile_loadd(5, lower, 64);
  _tile_dpbf16ps(2, 5, 6);
  vectors.some();
  _tile_dpbf16ps(3, 5, 7);
  vectors.some();
}

struct Block {
  int64_t first;
  int chunks;
  bool masked;
};

// -inf where keys of a chunk are padding, past the end, or later than the query sees.
void forbid_rows(const Queries<Bf16>& lanes, const uint8_t* attend, int64_t j0, float* scores) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  for (int j = 0; j < CHUNK; ++j, scores += LANES) {
    const int64_t key = j0 + j;
    if (key > lanes.most || (attend && !attend[key])) {
      _mm512_store_ps(scores, never);
      _mm512_store_ps(scores + 16, never);
    } else if (key > lanes.least) {
      for (int lane = 0; lane < LANES; ++lane)
        if (lanes.limit[lane] < key) scores[lane] = -__builtin_inff();
    }
  }
}

// Vector work spread evenly over a number of products.
struct Spread {
  int left, products, gain, credit;
  SL_INLINE Spread(int work, int over) : left(work), products(over), gain(work), credit(0) {}
  SL_INLINE bool due() {
    if (credit < products) return false;
    credit -= products;
    return true;
  }
};

// Scores of a block to powers, a pair of keys at a time. All inline, and its address goes nowhere:
// then it lives in registers.
struct Powers {
  const float* scores;
  char* powers;
  __m512 factor, top0, top1, sum0, sum1;
  Spread spread;

  SL_INLINE __m512 half(int q, __m512 top) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512 even = cut_power(_mm512_fmsub_ps(_mm512_load_ps(scores + q * 16), factor, top));
    const __m512 odd =
        cut_power(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES + q * 16), factor, top));
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    // (odd & high) | low
    _mm512_store_si512(powers + q * 64,
                       _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), high, low, 0xea));
    return _mm512_add_ps(even, odd);
  }
  SL_INLINE void one() {
    sum0 = _mm512_add_ps(sum0, half(0, top0));
    sum1 = _mm512_add_ps(sum1, half(1, top1));
    scores += 2 * LANES;
    powers += ROW;
    --spread.left;
  }
  SL_INLINE void some() {
    spread.credit += spread.gain;
    while (spread.due()) one();
  }
};

struct Maxima {
  __m512 top0, top1;
  SL_INLINE void chunk(const float* scores) {
#pragma GCC unroll 8
    for (int j = 0; j < CHUNK; ++j) {
      top0 = _mm512_max_ps(top0, _mm512_load_ps(scores + j * LANES));
      top1 = _mm512_max_ps(top1, _mm512_load_ps(scores + j * LANES + 16));
    }
  }
};

// Running maxima and sums of the queries, 16 to a vector, and the factor of the sums before.
struct Rows {
  __m512 top[2], sum[2], shrink[2];
};

// As raise_tops in lanes.hpp, but sums in memory wait for their shrinking.
bool follow(__m512 top0, __m512 top1, __m512 c, Rows& r) {
  const __m512 slack = _mm512_set1_ps(SLACK), tops[2] = {_mm512_mul_ps(top0, c), _mm512_mul_ps(top1, c)};
  int grown = 0;
  for (int q = 0; q < 2; ++q)
    grown |= _mm512_cmp_ps_mask(_mm512_sub_ps(tops[q], r.top[q]), slack, _CMP_GT_OQ);
  if (!grown) return false;
  for (int q = 0; q < 2; ++q) {
    const __m512 top = _mm512_max_ps(r.top[q], tops[q]);
    r.shrink[q] = power(F{_mm512_sub_ps(r.top[q], top)}).v;
    r.top[q] = top;
    r.sum[q] = _mm512_mul_ps(r.sum[q], r.shrink[q]);
  }
  return true;
}

void shrink_sums(float* acc, int64_t rows, const Rows& r) {
  for (int64_t d = 0; d < rows; ++d)
    for (int q = 0; q < 2; ++q) {
      float* at = acc + d * LANES + q * 16;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), r.shrink[q]));
    }
}

void finish_rows(const DenseArgs& a, const Queries<Bf16>& lanes, const Rows& r, const float* acc) {
  for (int q = 0; q < 2 && q * 16 < lanes.count; ++q) {
    const __m512 sum = _mm512_div_ps(r.sum[q], _mm512_set1_ps(CUT_BIAS));
    const __mmask16 some = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), sum);
    const int live = lanes.count - q * 16 < 16 ? lanes.count - q * 16 : 16;
    __m512 total = _mm512_setzero_ps();
    for (int64_t d = 0; d < a.value_dim; d += 16) {
      const int n = a.value_dim - d < 16 ? static_cast<int>(a.value_dim - d) : 16;
      __m512 tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        tile[i] = _mm512_mul_ps(_mm512_load_ps(acc + (d + i) * LANES + q * 16), inverse);
        total = _mm512_add_ps(total, _mm512_abs_ps(tile[i]));
      }
      transpose16(tile);
      for (int i = 0; i < live; ++i) store_n(lanes.out[q * 16 + i] + d, F{tile[i]}, n);
    }
    float sums[16], tops[16], totals[16];
    _mm512_storeu_ps(sums, sum);
    _mm512_storeu_ps(tops, r.top[q]);
    _mm512_storeu_ps(totals, total);
    for (int i = 0; i < live; ++i) {
      const int64_t at = lanes.stat[q * 16 + i];
      if (a.lse)
        a.lse[at] = sums[i] == 0.0f ? -__builtin_inff() : LN2 * tops[i] + __builtin_logf(sums[i]);
      if (a.magnitude) a.magnitude[at] = totals[i];
    }
  }
}

// Scores are not multiplied before their maximum is taken, so the factor must be positive: the sign
// of the scale goes into the queries, and 0 becomes a number that no score makes visible.
SL_INLINE float positive_factor(const DenseArgs& a) {
  const float c = __builtin_fabsf(a.scale) * LOG2E;
  return c < 1e-37f ? 1e-37f : c;
}

void attend(const DenseArgs& a, const DenseItem& item, const void* shared, void* memory) {
  const Sizes z = sizes(a);
  const Memory m = layout(a, memory);
  const int64_t step = chunk_tiles(z) * TILE;
  const char* keys = static_cast<const char*>(shared) +
                     (item.batch * a.kv_heads + item.kv_head) * z.chunks * step;
  const char* values = keys + 2 * z.depth * TILE;
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len : nullptr;
  Queries<Bf16> lanes;
  find_lanes(a, item, lanes);
  pack_pairs(lanes.query, lanes.count, a.head_dim, z.depth, a.scale < 0, m.lanes);
  const __m512 c = _mm512_set1_ps(positive_factor(a));
  Rows r;
  for (int q = 0; q < 2; ++q) {
    r.top[q] = _mm512_set1_ps(LOWEST);
    r.sum[q] = r.shrink[q] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < z.widths * 16 * LANES; i += 16)
    _mm512_store_ps(m.acc + i, _mm512_setzero_ps());
  set_tiles();

  int64_t next = 0;  // the key after the last block that was started
  const auto start = [&]() -> Block {
    for (; next <= lanes.most; next += KB) {
      const int64_t n = lanes.most + 1 - next < KB ? lanes.most + 1 - next : KB;
      const int64_t live = count_attended(attended, next, n);
      if (live == 0) continue;
      const Block block = {next, static_cast<int>((n + CHUNK - 1) / CHUNK),
                           live < n || n % CHUNK || lanes.least < next + n - 1};
      next += KB;
      return block;
    }
    return {0, 0, false};
  };
  Block before = {0, 0, false}, now = {0, 0, false}, after = start();
  int turn = 0;
  bool grown = false;
  while (before.chunks || now.chunks || after.chunks) {
    float* ahead = m.scores[turn ^ 1];
    const char* behind = m.powers[turn ^ 1];
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    Maxima maxima = {lowest, lowest};
    Powers work = {m.scores[turn], m.powers[turn], c, r.top[0], r.top[1], r.sum[0], r.sum[1],
                   Spread(now.chunks * (CHUNK / 2),
                          4 * (after.chunks * static_cast<int>(z.depth) +
                               static_cast<int>(z.widths / 2) * before.chunks))};
    asm volatile("" ::: "memory");  // what tiles load must have been stored
    for (int i = 0; i < after.chunks; ++i) {
      const char* key = keys + (after.first / CHUNK + i) * step;
      zero_tiles();
      for (int64_t d = 0; d < z.depth; ++d)
        multiply(key + d * TILE, key + (z.depth + d) * TILE, m.lanes + 2 * d * TILE,
                 m.lanes + (2 * d + 1) * TILE, 64, work);
      float* to = ahead + i * CHUNK * LANES;
      store_sums(to);
      if (after.masked) forbid_rows(lanes, attended, after.first + i * CHUNK, to);
      // One chunk late: scores that were just stored are slow to load.
      if (i > 0) maxima.chunk(to - CHUNK * LANES);
    }
    for (int64_t w = 0; before.chunks && w < z.widths; w += 2) {
      const char* value = values + before.first / CHUNK * step + w * TILE;
      float* sums = m.acc + w * 16 * LANES;
      load_sums(sums);
      for (int i = 0; i < before.chunks; ++i)
        multiply(value + i * step, value + i * step + TILE, behind + i * 16 * ROW,
                 behind + i * 16 * ROW + 64, ROW, work);
      store_sums(sums);
    }
    while (work.spread.left > 0) work.one();
    r.sum[0] = work.sum0;
    r.sum[1] = work.sum1;
    // The sums now hold the blocks up to `before`, and may follow the maxima of `now`.
    if (grown) shrink_sums(m.acc, a.value_dim, r);
    grown = false;
    if (after.chunks) {
      maxima.chunk(ahead + (after.chunks - 1) * CHUNK * LANES);
      grown = follow(maxima.top0, maxima.top1, c, r);
    }
    before = now;
    now = after;
    after = start();
    turn ^= 1;
  }
  _tile_release();
  finish_rows(a, lanes, r, m.acc);
}

// Probabilities of a chunk of queries, summed. Here the lanes are keys and the rows queries.
struct Columns {
  const float* scores;
  const float* lse;
  int64_t seen;  // keys of the block that the next query sees
  bool causal;
  __m512 factor, sum0, sum1;
  Spread spread;

  SL_INLINE void one() {
    const float norm = *lse == -__builtin_inff() ? __builtin_inff() : *lse * LOG2E;
    const uint32_t mask = seen >= LANES ? ~0u : seen <= 0 ? 0u : (1u << seen) - 1;
    const __m512 centre = _mm512_set1_ps(norm);
    const F p0 = power(F{_mm512_fmsub_ps(_mm512_load_ps(scores), factor, centre)});
    const F p1 = power(F{_mm512_fmsub_ps(_mm512_load_ps(scores + 16), factor, centre)});
    sum0 = _mm512_mask_add_ps(sum0, static_cast<__mmask16>(mask), sum0, p0.v);
    sum1 = _mm512_mask_add_ps(sum1, static_cast<__mmask16>(mask >> 16), sum1, p1.v);
    scores += LANES;
    ++lse;
    seen += causal;
    --spread.left;
  }
  SL_INLINE void some() {
    spread.credit += spread.gain;
    while (spread.due()) one();
  }
};

void columns(const DenseArgs& a, const DenseColumns& item, void* memory) {
  const Sizes z = sizes(a);
  const Memory m = layout(a, memory);
  const int count = static_cast<int>(item.count);
  const int64_t shift = a.kv_len - a.q_len;
  const Heads h = find_heads(a, item.batch, item.head / (a.heads / a.kv_heads));
  const Bf16* keys[LANES];
  for (int i = 0; i < count; ++i) keys[i] = h.key + (item.first + i) * a.key.row;
  pack_pairs(keys, count, a.head_dim, z.depth, a.scale < 0, m.lanes);
  const Bf16* queries = static_cast<const Bf16*>(a.query.data) + item.batch * a.query.batch +
                        item.head * a.query.head;
  const float* lse = a.lse + (item.batch * a.heads + item.head) * a.q_len;
  const __m512 c = _mm512_set1_ps(positive_factor(a));
  char* tiles = reinterpret_cast<char*>(m.acc);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
  set_tiles();
  const int64_t start = a.causal && item.first > shift ? item.first - shift : 0;
  int rows = 0;  // of the chunk before, whose scores are ready
  for (int64_t i0 = start, turn = 0; i0 < a.q_len || rows; i0 += CHUNK, turn ^= 1) {
    const int64_t left = a.q_len - i0, done = rows ? i0 - CHUNK : 0;
    Columns work = {m.scores[turn ^ 1], lse + done,
                    a.causal ? done + shift + 1 - item.first : LANES, a.causal, c, sum0, sum1,
                    Spread(rows, 4 * static_cast<int>(z.depth))};
    if (left > 0) {
      for (int half = 0; half < 2; ++half)
        copy_tiles(queries + (i0 + half * 16) * a.query.row, a.query.row, left - half * 16,
                   a.head_dim, z.depth, tiles + half * z.depth * TILE);
      asm volatile("" ::: "memory");  // what tiles load must have been stored
      zero_tiles();
      for (int64_t d = 0; d < z.depth; ++d)
        multiply(tiles + d * TILE, tiles + (z.depth + d) * TILE, m.lanes + 2 * d * TILE,
                 m.lanes + (2 * d + 1) * TILE, 64, work);
    }
    while (work.spread.left > 0) work.one();
    sum0 = work.sum0;
    sum1 = work.sum1;
    if (left > 0) store_sums(m.scores[turn]);
    rows = left < 0 ? 0 : left < CHUNK ? static_cast<int>(left) : CHUNK;
  }
  _tile_release();
  float total[LANES];
  _mm512_storeu_ps(total, sum0);
  _mm512_storeu_ps(total + 16, sum1);
  float* out = a.columns + (item.batch * a.heads + item.head) * a.kv_len + item.first;
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len + item.first : nullptr;
  for (int i = 0; i < count; ++i) out[i] = attended && !attended[i] ? 0.0f : total[i];
}

}  // namespace

extern const DenseKernels tiles_bf16;
const DenseKernels tiles_bf16 = {32,      shared_bytes,  shared_parts, prepare,
                                 scratch_bytes, attend, columns};

}  // namespace sparseloom::SL_TIER::dense
#endif
