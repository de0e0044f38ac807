// Dense attention of bf16 inputs with AMX tiles: preparation, and the kernel that takes any scores.
#include "tier.hpp"

#if SL_AMX

#include "dense/amx.hpp"
#include "dense/pool.hpp"

namespace sparseloom::SL_TIER::dense {
namespace {

size_t head_bytes(const DenseArgs& a) {
  const Sizes z = sizes(a);
  return static_cast<size_t>(z.places.all() * chunk_tiles(z) * TILE) +
         sizeof(float) * static_cast<size_t>(z.places.means() * CHUNK + z.places.keys());
}

// Some chunks of keys each, then a chunk of means each.
int64_t key_parts(const Sizes& z) { return (z.places.keys() + CHUNKS - 1) / CHUNKS; }

int64_t head_parts(const DenseArgs& a) {
  const Sizes z = sizes(a);
  return key_parts(z) + z.places.means();
}

// NaN if one of the two is.
float larger(float x, float y) { return x > y || x != x ? x : y; }

float square_rows(const char* tiles, int64_t depth) {
  float most = 0.0f;
  for (int i = 0; i < 16; ++i) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; ++d) {
      const auto row = (__m512bh)_mm512_load_si512(tiles + d * TILE + i * 64);
      sum = _mm512_dpbf16_ps(sum, row, row);
    }
    most = larger(most, _mm512_reduce_add_ps(sum));
  }
  return most;
}

// The tiles of a chunk of means, 32 dims at a time; their factors are in `missing`.
void prepare_means(const DenseArgs& a, const Sizes& z, const Heads& h, const Segments& segments,
                   char* tiles, float* missing) {
  alignas(64) Bf16 rows[CHUNK * CHUNK];
  if (!missing_weights(segments, missing)) return;  // nobody looks at it
  for (int64_t d = 0; d < z.depth; ++d) {
    const int64_t dims = a.head_dim - d * CHUNK < CHUNK ? a.head_dim - d * CHUNK : CHUNK;
    pool_rows(segments, h.key + d * CHUNK, a.key.row, dims, rows, CHUNK);
    for (int half = 0; half < 2; ++half)
      copy_tiles(rows + half * 16 * CHUNK, CHUNK, 16, dims, 1, tiles + (half * z.depth + d) * TILE);
  }
  for (int64_t w = 0; w < z.widths; w += 2) {
    const int64_t left = a.value_dim - w * 16, dims = left < CHUNK ? left : CHUNK;
    pool_rows(segments, h.value + w * 16, a.value.row, dims, rows, CHUNK);
    transpose_tiles(rows, CHUNK, CHUNK, dims, 2, tiles + (2 * z.depth + w) * TILE);
  }
}

void prepare(const DenseArgs& a, int64_t batch, int64_t kv_head, void* head, int64_t part) {
  const Sizes z = sizes(a);
  const Heads h = find_heads(a, batch, kv_head);
  const Shared to = shared_layout(z, head);
  if (part >= key_parts(z)) {
    const int64_t chunk = part - key_parts(z), place = z.places.keys() + chunk;
    prepare_means(a, z, h, Segments(a, batch, z.places, place),
                  to.tiles + place * chunk_tiles(z) * TILE, to.missing + chunk * CHUNK);
    return;
  }
  const int64_t first = part * CHUNKS;
  for (int64_t c = first; c < z.places.keys() && c < first + CHUNKS; ++c) {
    char* at = to.tiles + c * chunk_tiles(z) * TILE;
    float largest_square = 0.0f;
    for (int half = 0; half < 2; ++half) {
      const int64_t j = c * CHUNK + half * 16;
      copy_tiles(h.key + j * a.key.row, a.key.row, a.kv_len - j, a.head_dim, z.depth,
                 at + half * z.depth * TILE);
      largest_square = larger(largest_square, square_rows(at + half * z.depth * TILE, z.depth));
    }
    transpose_tiles(h.value + c * CHUNK * a.value.row, a.value.row, a.kv_len - c * CHUNK,
                    a.value_dim, z.widths, at + 2 * z.depth * TILE);
    to.squares[c] = largest_square;
  }
}

size_t scratch_bytes(const DenseArgs& a) {
  const Sizes z = sizes(a);
  // The column sums keep 2 * depth tiles of queries where attend keeps sums.
  const int64_t last = z.widths > z.depth ? z.widths : z.depth;
  return static_cast<size_t>((2 * z.depth + 2 * last) * TILE + 3 * KB * ROW);
}

// bound[lane] >= |score| in units of log2, by Cauchy and Schwarz. Whether all are below LIMIT.
// `squares` of the chunks of keys.
bool bound_scores(const DenseArgs& a, const Sizes& z, const Queries<Bf16>& lanes,
                  const float* squares, const char* packed, __m512 bound[2]) {
  float most = 0.0f;
  // Means may take in keys of their chunk that no query sees one by one.
  const int64_t end = a.means ? a.kv_len - 1 : lanes.most;
  for (int64_t c = 0; c * CHUNK <= end; ++c) most = larger(most, squares[c]);
  // Means are no longer than the longest of their keys, but for their rounding; and weigh more.
  const float slack = a.means ? 1.004f : 1.001f;
  const __m512 factor = _mm512_set1_ps(positive_factor(a) * slack * __builtin_sqrtf(most));
  const __m512 weight = _mm512_set1_ps(a.means ? LOG2S - 1.0f : 0.0f);
  int fit = 0xffff;
  for (int q = 0; q < 2; ++q) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < z.depth; ++d)
      for (int i = 0; i < 16; ++i) {
        const auto pair = (__m512bh)_mm512_load_si512(packed + (2 * d + q) * TILE + i * 64);
        sum = _mm512_dpbf16_ps(sum, pair, pair);
      }
    bound[q] = _mm512_fmadd_ps(_mm512_sqrt_ps(sum), factor, weight);
    fit &= _mm512_cmp_ps_mask(bound[q], _mm512_set1_ps(LIMIT), _CMP_LT_OQ);  // false for NaN
  }
  return fit == 0xffff;
}

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

void attend(const DenseArgs& a, const DenseItem& item, const void* head, void* memory) {
  const Sizes z = sizes(a);
  const Memory m = layout(a, memory);
  const Shared from = shared_layout(z, head);
  const int64_t step = chunk_tiles(z) * TILE;
  const char *keys = from.tiles, *values = keys + 2 * z.depth * TILE;
  Queries<Bf16> lanes;
  find_lanes(a, item, lanes);
  pack_pairs(lanes.query, lanes.count, a.head_dim, z.depth, a.scale < 0, m.lanes);
  for (int64_t i = 0; i < z.widths * 16 * LANES; i += 16)
    _mm512_store_ps(m.acc + i, _mm512_setzero_ps());
  set_tiles();
  __m512 bound[2];
  const Sight sight = {lanes, a.attend ? a.attend + item.batch * a.kv_len : nullptr, z.places,
                       from.missing};
  if (!a.lse && bound_scores(a, z, lanes, from.squares, m.lanes, bound)) {
    attend_bounded(a, item, sight, keys, m, bound);
    return;
  }
  const float factor = positive_factor(a);
  const __m512 c = _mm512_set1_ps(factor);
  const Weights weights(factor);
  Rows r;
  for (int q = 0; q < 2; ++q) {
    r.top[q] = _mm512_set1_ps(LOWEST);
    r.sum[q] = r.shrink[q] = _mm512_setzero_ps();
  }
  Blocks blocks(a, item, sight);
  Block before = {}, now = {}, after = blocks.take();
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
      const char* key = keys + after.at[i].place * step;
      weights.load(after.at[i].log2);
      for (int64_t d = 0; d < z.depth; ++d)
        multiply(key + d * TILE, key + (z.depth + d) * TILE, m.lanes + 2 * d * TILE,
                 m.lanes + (2 * d + 1) * TILE, 64, work);
      float* to = ahead + i * CHUNK * LANES;
      store_sums(to);
      if (after.at[i].masked) forbid_rows(sight, after.at[i], factor, to);
      // One chunk late: scores that were just stored are slow to load.
      if (i > 0) maxima.chunk(to - CHUNK * LANES);
    }
    for (int64_t w = 0; before.chunks && w < z.widths; w += 2) {
      const char* value = values + w * TILE;
      float* sums = m.acc + w * 16 * LANES;
      load_sums(sums);
      for (int i = 0; i < before.chunks; ++i)
        multiply(value + before.at[i].place * step, value + before.at[i].place * step + TILE,
                 behind + i * 16 * ROW, behind + i * 16 * ROW + 64, ROW, work);
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
    after = blocks.take();
    turn ^= 1;
  }
  _tile_release();
  for (int q = 0; q < 2; ++q) r.sum[q] = _mm512_div_ps(r.sum[q], _mm512_set1_ps(CUT_BIAS));
  finish_rows(a, lanes, r.top, r.sum, m.acc);
}

}  // namespace

void finish_rows(const DenseArgs& a, const Queries<Bf16>& lanes, const __m512 top[2],
                 const __m512 sum[2], const float* acc) {
  for (int q = 0; q < 2 && q * 16 < lanes.count; ++q) {
    const __mmask16 some = _mm512_cmp_ps_mask(sum[q], _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), sum[q]);
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
    _mm512_storeu_ps(sums, sum[q]);
    _mm512_storeu_ps(tops, top[q]);
    _mm512_storeu_ps(totals, total);
    for (int i = 0; i < live; ++i) {
      const int64_t at = lanes.stat[q * 16 + i];
      if (a.lse)
        a.lse[at] = sums[i] == 0.0f ? -__builtin_inff() : LN2 * tops[i] + __builtin_logf(sums[i]);
      if (a.magnitude) a.magnitude[at] = totals[i];
    }
  }
}

extern const DenseKernels tiles_bf16;
const DenseKernels tiles_bf16 = {LANES,         head_bytes, head_parts, prepare,
                                 scratch_bytes, attend,     column_sums};

}  // namespace sparseloom::SL_TIER::dense
#endif
