// One query block after another: products, pooling, selection.
#include "fast_select.hpp"
#include "pairs.hpp"
#include "pool.hpp"
#include "top.hpp"

namespace sparseloom::SL_TIER {
namespace {

constexpr int32_t MUST = INT32_MAX, NEVER = INT32_MIN;

int largest_code(const int8_t* codes, long count) {
  int low = 0, high = 0;
  for (long i = 0; i < count; ++i) {
    low = codes[i] < low ? codes[i] : low;
    high = codes[i] > high ? codes[i] : high;
  }
  return -low > high ? -low : high;
}

bool small_scores(long width, int largest, int largest_q) {
#if SL_FAST
  return largest && largest_q && largest_q < 128 && largest < 128 &&
         largest * largest_q * width < 16000;
#elif SL_PAIRS
  return fits_pairs(width, largest, largest_q);
#endif
  (void)width, (void)largest, (void)largest_q;
  return false;
}

// Which key stands in a column of packed codes. With AVX512-FP16 two panels share 32 keys such that
// their scores pack to 16 bits in order.
SL_INLINE long key_at(long panel, long column) {
#if SL_FAST
  return panel / 2 * 32 + column / 4 * 8 + panel % 2 * 4 + column % 4;
#else
  return panel * PANEL + column;
#endif
}

// With AVX512-FP16 four panels lie side by side: [panels / 4][depth / 4][4][16][4].
void pack(const int8_t* codes, long width, const Keys& keys, long first_panel, long last_panel,
          int8_t* packed, int32_t* sums) {
#if SL_PAIRS
  if (keys.small) return pack_pairs(codes, width, keys, first_panel, last_panel, packed);
#endif
  const KeyMap& map = keys.map;
  constexpr long apart = SL_FAST ? 256 : 64;  // from four codes of a key to the next four
  for (long panel = first_panel; panel < last_panel; ++panel) {
    int8_t* to = SL_FAST ? packed + panel / 4 * 4 * keys.depth * PANEL + panel % 4 * 64
                         : packed + panel * keys.depth * PANEL;
    for (long i = 0; i < keys.depth; i += 4) memset(to + i / 4 * apart, 0, 64);
    for (long c = 0; c < PANEL; ++c) {
      const long key = key_at(panel, c);
      int32_t total = 0;
      if (key < map.count) {
        const int8_t* from = codes + (map.place ? map.place[key] : key) * width;
        long i = 0;
        for (; i + 4 <= width; i += 4) memcpy(to + i / 4 * apart + c * 4, from + i, 4);
        for (; i < width; ++i) to[i / 4 * apart + c * 4 + i % 4] = from[i];
        if (BIAS)
          for (i = 0; i < width; ++i) total += from[i];
      }
      sums[panel * PANEL + c] = 128 * total;
    }
  }
}

// Scores of panels that share their keys, to the order of the keys.
void in_order(int32_t* scores, long stride, long panels) {
#if SL_FAST
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (long r = 0; r < ROWS; ++r) {
    for (int32_t* x = scores + r * stride, *end = x + panels * PANEL; x < end; x += 32) {
      const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
      _mm512_storeu_si512(x, _mm512_permutex2var_epi32(a, low, b));
      _mm512_storeu_si512(x + 16, _mm512_permutex2var_epi32(a, high, b));
    }
  }
#else
  (void)scores, (void)stride, (void)panels;
#endif
}

// The rows first ... first + count - 1 as products want them, ROWS of them.
void copy_rows(const SelectArgs& args, long b, long h, long first, long count, const Room& room,
               long depth) {
  memset(room.rows, BIAS, static_cast<size_t>(ROWS * depth));
  for (long r = 0; r < count; ++r) {
    const int8_t* from = args.q + (((b * args.heads + h) * args.q_len) + first + r) * args.width;
    int8_t* to = room.rows + r * depth;
    for (long i = 0; i < args.width; ++i) to[i] = static_cast<int8_t>(from[i] ^ BIAS);
  }
}

SL_INLINE float row_scale(const SelectArgs& args, long b, long h, long row) {
  return args.q_scale[(b * args.heads + h) * args.q_len + row] * args.k_scale[h];
}

SL_INLINE bool votes(const SelectArgs& args, long b, long row) {
  return !args.voters || args.voters[b * args.voters_stride + row];
}

// Where pooled scores start from.
SL_INLINE float nothing(Pooling pooling) { return pooling == Pooling::max ? -INFINITE : 0.0f; }

void pool_row(const SelectArgs& args, int32_t* scores, long n, float scale, float* to) {
  if (args.pooling == Pooling::mass) add_mass(scores, n, scale, to);
  else if (args.pooling == Pooling::max) raise_to_row(scores, n, scale, to);
  else add_scaled(scores, n, scale, to);
}

SL_INLINE long minimum(long a, long b) { return a < b ? a : b; }

// The first n keys' scores to scores of key blocks: sums, or the largest.
void pool_keys(const SelectArgs& args, const KeyMap& map, long n, long blocks, const float* x,
               float* to) {
  for (long j = 0; j < blocks; ++j) {
    const long from = attended_before(map, j * args.bk);
    const long upto = minimum(n, attended_before(map, minimum((j + 1) * args.bk, args.kv_len)));
    float all = nothing(args.pooling);
    for (long i = from; i < upto; ++i) all = args.pooling == Pooling::max ? (x[i] > all ? x[i] : all) : all + x[i];
    if (args.pooling == Pooling::mean && upto > from) all /= static_cast<float>(upto - from);
    to[j] = all;
  }
}

// Marks what a block must keep and, where keys come in blocks, may not keep; x[] counts attended
// keys where bk is 1, else all key blocks. Returns how many candidates there are.
long mark(const SelectArgs& args, const KeyMap& map, long b, long block, int32_t* x) {
  const long visible = args.visible[b * args.visible_stride + block];
  long from = args.diagonal[2 * block], upto = minimum(args.diagonal[2 * block + 1], visible);
  if (args.bk == 1) {
    from = attended_before(map, minimum(from, args.kv_len));
    for (long j = from, end = attended_before(map, upto < 0 ? 0 : upto); j < end; ++j) x[j] = MUST;
    return attended_before(map, visible);
  }
  for (long j = from; j < upto; ++j) x[j] = MUST;
  if (map.before)
    for (long j = 0; j < visible; ++j)
      if (map.before[j * args.bk] == map.before[minimum((j + 1) * args.bk, args.kv_len)]) x[j] = NEVER;
  return visible;
}

void keep_top(const SelectArgs& args, const Keys& keys, long b, long h, long block, int32_t* x,
              const Room& room) {
  const int64_t* offsets = args.offsets + (b * args.heads + h) * ((args.q_len + args.bq - 1) / args.bq + 1);
  const long budget = args.budget[b * args.budget_stride + block];
  if (budget <= 0) return;
  const long n = mark(args, keys.map, b, block, x);
  int32_t* out = args.out + offsets[block];
  const int32_t* place = args.bk == 1 ? keys.map.place : nullptr;
  const int32_t level = budget >= n ? NEVER : kth_largest(x, n, budget, room.candidates);
  write_top(x, n, budget, level, place, out);
}

// Products of the query blocks' rows with all keys that the last of them sees.
long score(const SelectArgs& args, const Keys& keys, long b, long h, long first, long count,
           const Room& room) {
  const long n = seen(args, keys.map, first + count - 1);
#if SL_PAIRS
  if (keys.small) {
    const PairRows rows = pair_rows(args, keys, b, h, first, count, room.rows);
    score_pairs(rows, count, keys, n, room.scores, room.stride);
    return n;
  }
#endif
  copy_rows(args, b, h, first, count, room, keys.depth);
  const long panels = round_up(n, 2 * PANEL) / PANEL;
  product(room.rows, keys.depth, keys.codes, keys.sums, panels, room.scores, room.stride,
          SL_FAST);
  in_order(room.scores, room.stride, panels);
  return n;
}

void write_pooled(const SelectArgs& args, const Keys& keys, long b, long h, long block,
                  const float* x) {
  const long blocks = (args.kv_len + args.bk - 1) / args.bk, rows = (args.q_len + args.bq - 1) / args.bq;
  float* to = args.pooled + ((b * args.heads + h) * rows + block) * blocks;
  const long visible = args.visible[b * args.visible_stride + block];
  for (long j = 0; j < blocks; ++j) to[j] = -INFINITE;
  if (args.bk > 1)
    for (long j = 0; j < visible; ++j) to[j] = x[j];
  else
    for (long i = 0, n = attended_before(keys.map, visible); i < n; ++i)
      to[keys.map.place ? keys.map.place[i] : i] = x[i];
}

// Whether masses go by 16 bits (`fast.hpp`, where `select_fast` does not take the block; `pairs.hpp`).
SL_INLINE bool fast_mass(const SelectArgs& args, const Keys& keys) {
  return (SL_FAST || SL_PAIRS) && keys.small && args.pooling == Pooling::mass;
}

// Pools the rows into `to` over the first n keys. False: no row votes, or none sees a key.
bool pool_block(const SelectArgs& args, const Keys& keys, long b, long h, long block, long n,
                int32_t* scores, bool scored, float* to, const Room& room) {
  const long start = block * args.bq, stop = minimum(start + args.bq, args.q_len);
  long voting = 0;
  for (long j = 0; j < n; ++j) to[j] = nothing(args.pooling);
  for (long slab = start; slab < stop; slab += ROWS) {
    const long rows = minimum(ROWS, stop - slab);
#if SL_FAST || SL_PAIRS
    if (fast_mass(args, keys) && add_mass16(args, keys, b, h, slab, rows, room, to, voting)) continue;
#endif
    if (!scored) score(args, keys, b, h, slab, rows, room);
    for (long r = 0; r < rows; ++r) {
      const long mine = seen(args, keys.map, slab + r);
      if (!mine || !votes(args, b, slab + r)) continue;
      ++voting;
      pool_row(args, scores + r * room.stride, mine, row_scale(args, b, h, slab + r), to);
    }
  }
  if (args.pooling == Pooling::mean && voting)
    for (long j = 0; j < n; ++j) to[j] /= static_cast<float>(voting);
  return voting > 0;
}

void select_top(const SelectArgs& args, const Keys& keys, long b, long h, long first, long last,
                const Room& room) {
  const long rows = minimum(last * args.bq, args.q_len) - first * args.bq;
  const bool together = args.bq <= ROWS && !fast_mass(args, keys);
  if (together) score(args, keys, b, h, first * args.bq, rows, room);
  for (long block = first; block < last; ++block) {
    int32_t* scores = room.scores + (together ? (block - first) * args.bq * room.stride : 0);
    int32_t* x = scores;
    if (args.pooling != Pooling::none) {
      const long end = minimum((block + 1) * args.bq, args.q_len);
      const long n = seen(args, keys.map, end - 1);
      x = room.scores + ROWS * room.stride;
      auto* to = reinterpret_cast<float*>(x);
      const bool any = pool_block(args, keys, b, h, block, n, scores, together, to, room);
      const long blocks = args.visible[b * args.visible_stride + block];
      if (args.bk > 1) {
        auto* wide = reinterpret_cast<float*>(room.candidates);
        pool_keys(args, keys.map, n, blocks, to, wide);
        memcpy(to, wide, static_cast<size_t>(blocks) * sizeof(float));
      }
      const long candidates = args.bk > 1 ? blocks : n;
      if (!any)
        for (long j = 0; j < candidates; ++j) to[j] = nothing(args.pooling);
      if (args.pooled) {
        write_pooled(args, keys, b, h, block, to);
        continue;
      }
      order(to, candidates);
    }
    keep_top(args, keys, b, h, block, x, room);
  }
}

// One flag per key (attended ones) or key block: some pair in it reaches the row's level.
void flag_block(const SelectArgs& args, const Keys& keys, long b, long h, long block, int32_t* flags,
                const Room& room) {
  const long start = block * args.bq, stop = minimum(start + args.bq, args.q_len);
  const float bound = static_cast<float>(args.width) * 127.0f * 127.0f;
  const long n = seen(args, keys.map, stop - 1);
  memset(flags, 0, static_cast<size_t>(n) * sizeof(int32_t));
  for (long slab = start; slab < stop; slab += ROWS) {
    const long rows = minimum(ROWS, stop - slab);
    score(args, keys, b, h, slab, rows, room);
    for (long r = 0; r < rows; ++r) {
      const int32_t* x = room.scores + r * room.stride;
      const long mine = seen(args, keys.map, slab + r);
      if (!mine) continue;
      const float scale = row_scale(args, b, h, slab + r);
      const int32_t level = first_reaching(args.thresholds[h], scale, bound);
      int32_t top = x[0];
      for (long j = 0; j < mine; ++j) {
        flags[j] |= x[j] >= level;
        top = x[j] > top ? x[j] : top;
      }
      long best = 0;
      while (x[best] != top) ++best;
      flags[best] = 1;
    }
  }
  if (args.bk == 1) return;
  const long blocks = args.visible[b * args.visible_stride + block];
  for (long j = 0; j < blocks; ++j) {
    const long from = attended_before(keys.map, j * args.bk);
    const long upto = minimum(attended_before(keys.map, minimum((j + 1) * args.bk, args.kv_len)), n);
    int32_t any = 0;
    for (long i = from; i < upto; ++i) any |= flags[i];
    room.candidates[j] = any;
  }
  memcpy(flags, room.candidates, static_cast<size_t>(blocks) * sizeof(int32_t));
}

void select_above(const SelectArgs& args, const Keys& keys, long b, long h, long first, long last,
                  const Room& room) {
  const long blocks = (args.q_len + args.bq - 1) / args.bq;
  for (long block = first; block < last; ++block) {
    int32_t* flags = room.scores + ROWS * room.stride;
    flag_block(args, keys, b, h, block, flags, room);
    const long n = mark(args, keys.map, b, block, flags);
    const long row = (b * args.heads + h) * blocks + block;
    if (!args.offsets) {
      args.counts[row] = count_from(flags, n, 1);
      continue;
    }
    const int64_t* offsets = args.offsets + (b * args.heads + h) * (blocks + 1) + block;
    const int32_t* place = args.bk == 1 ? keys.map.place : nullptr;
    write_top(flags, n, offsets[1] - offsets[0], 0, place, args.out + offsets[0]);
  }
}

void select_blocks(const SelectArgs& args, const Keys& keys, long b, long h, long first, long last,
                   const Room& room) {
#if SL_FAST
  if (select_fast(args, keys, b, h, first, last, room)) return;
#endif
  if (args.thresholds) select_above(args, keys, b, h, first, last, room);
  else select_top(args, keys, b, h, first, last, room);
}

}  // namespace

extern const PredictKernels predict_kernels = {begin_products, end_products, encode_rows,
                                               largest_code, small_scores, pack, select_blocks};

}  // namespace sparseloom::SL_TIER
