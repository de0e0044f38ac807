// By `fast.hpp`: scores of query blocks of up to 16 rows, pooling by mass or max, the best keys; of
// larger blocks, and blocks of keys, the masses.
#pragma once

#include "fast_max.hpp"
#include "pool.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

// Whether these blocks can go this way at all; whether their numbers can, shows on the way.
SL_INLINE bool fast_blocks(const SelectArgs& args, const Keys& keys) {
  return keys.small && args.bk == 1 && args.bq <= ROWS && !args.thresholds &&
         args.pooling != Pooling::mean;
}

// Rows of q, for pooled ones times the largest factor that keeps D in range, and what shifts D to
// where it should be. False: an exponential of these scores would not fit in fp16.
static bool fast_rows(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                      long count, int8_t* codes, FastRows& rows) {
  memset(codes, 0, static_cast<size_t>(ROWS * ROW_PARTS * keys.depth));
  rows.count = count;
  rows.clamp = false;
  rows.least = keys.map.count;
  rows.most = 0;
  const bool mass = args.pooling == Pooling::mass;
  for (long r = 0; r < ROWS; ++r) {
    rows.seen[r] = 0;
    rows.start[r] = 0;
    rows.bound[r] = 0;
    rows.step[r] = 0;
    if (r >= count) continue;
    const long row = first + r;
    const int8_t* from = args.q + ((b * args.heads + h) * args.q_len + row) * args.width;
    int8_t* to = codes + (r * ROW_PARTS + 1) * keys.depth;
    const long mine = seen(args, keys.map, row);
    if (mine > rows.most) rows.most = mine;
    const bool pooled = args.pooling != Pooling::none;
    if (pooled && (!mine || (args.voters && !args.voters[b * args.voters_stride + row]))) continue;
    int factor = 1;
    if (pooled) {
      const int bound = sum_of_sizes(from, args.width) * keys.largest;
      const int fits = bound ? (mass ? HIGHEST : 16383) / bound : 1;
      const int limit = 127 / keys.largest_q;
      factor = fits < 1 ? 1 : fits < limit ? fits : limit;
      rows.bound[r] = factor * bound;
    }
    scale_codes(from, args.width, factor, to);
    if (mass) {
      rows.start[r] = HIGHEST - rows.bound[r];
      rows.clamp |= HIGHEST - 2 * rows.bound[r] < LOWEST;
      const float scale = args.q_scale[(b * args.heads + h) * args.q_len + row] * args.k_scale[h];
      rows.step[r] = scale * LOG2E / static_cast<float>(factor);
      if (!(rows.step[r] <= 0.6f)) return false;
    }
    rows.seen[r] = mine;
    if (mine < rows.least) rows.least = mine;
  }
  if (rows.least > rows.most) rows.least = rows.most;
  return true;
}

static bool in_range(const FastRows& rows, const int* top) {
  if (!rows.clamp) return true;
  for (int r = 0; r < ROWS; ++r)
    if (rows.seen[r] && rows.step[r] * static_cast<float>(top[r] - LOWEST) < OCTAVES) return false;
  return true;
}

// Forced keys, and an end that searches may run into.
static void mark16(const SelectArgs& args, const KeyMap& map, long b, long block, long n,
                   int16_t* x) {
  const long visible = args.visible[b * args.visible_stride + block];
  long from = args.diagonal[2 * block], upto = args.diagonal[2 * block + 1];
  from = from < args.kv_len ? from : args.kv_len;
  upto = upto < visible ? upto : visible;
  if (upto > from) {
    const long end = attended_before(map, upto);
    for (long j = attended_before(map, from); j < end; ++j) x[j] = MUST16;
  }
  for (long j = n; j < round_up(n, 64); ++j) x[j] = NEVER16;
}

static void keep_top16(const SelectArgs& args, const Keys& keys, long b, long h, long block,
                       int16_t* x, const Room& room) {
  const long budget = args.budget[b * args.budget_stride + block];
  if (budget <= 0) return;
  const long blocks = (args.q_len + args.bq - 1) / args.bq;
  const int64_t* offsets = args.offsets + (b * args.heads + h) * (blocks + 1);
  const long n = attended_before(keys.map, args.visible[b * args.visible_stride + block]);
  mark16(args, keys.map, b, block, n, x);
  write_top16(x, n, budget, *room.guess, keys.map.place, args.out + offsets[block]);
}

// The block's x as fp32 numbers: `value` of each.
template <class Value>
static void write_pooled16(const SelectArgs& args, const Keys& keys, long b, long h, long block,
                           const int16_t* x, Value value) {
  const long blocks = (args.q_len + args.bq - 1) / args.bq;
  float* to = args.pooled + ((b * args.heads + h) * blocks + block) * args.kv_len;
  for (long j = 0; j < args.kv_len; ++j) to[j] = -INFINITE;
  const long n = attended_before(keys.map, args.visible[b * args.visible_stride + block]);
  for (long i = 0; i < n; ++i) to[keys.map.place ? keys.map.place[i] : i] = value(x[i]);
}

static void select_none16(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                          const FastRows& rows, const Room& room) {
  auto* x = reinterpret_cast<int16_t*>(room.scores);
  const long stride = rows.slabs() * SLAB + 32;
  Stream stream(keys.codes, keys.depth, room.rows, rows.start);
  stream.each(rows.slabs(), [&](long slab, int r, const int32_t* scores) SL_LAMBDA {
    int16_t* to = x + r * stride + slab * SLAB;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(to + 32 * i, words(scores, i));
  });
  for (long r = 0; r < rows.count; ++r) keep_top16(args, keys, b, h, first + r, x + r * stride, room);
}

// e[slab][row][SLAB] of the rows and the sum of each. False: they would not fit in fp16.
static bool row_exponentials(const Keys& keys, const FastRows& rows, const Room& room, uint16_t* e,
                             float* total) {
  int top[ROWS];
  Tables tables;
  Stream stream(keys.codes, keys.depth, room.rows, rows.start);
  for (long every = rows.slabs() > 8 ? 8 : 1; every; every = every == 8 ? 1 : 0) {
    find_largest(stream, rows, every, top);
    if (!in_range(rows, top)) return false;
    make_tables(rows, top, tables);
    if (rows.clamp ? exponentials<true>(stream, rows, tables, e, total)
                   : exponentials<false>(stream, rows, tables, e, total))
      return true;
  }
  return false;
}

// What a row shares out, so that sums of `count` rows stay in the range of fp16.
SL_INLINE float share(long count) { return count <= 8 ? 4096.0f : 2048.0f; }

static bool select_mass16(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                          long last, const FastRows& rows, const Room& room) {
  auto* e = reinterpret_cast<uint16_t*>(room.scores);
  auto* x = reinterpret_cast<int16_t*>(room.candidates);
  float total[ROWS], weight[ROWS];
  if (!row_exponentials(keys, rows, room, e, total)) return false;
  const float whole = share(args.bq);
  for (int r = 0; r < ROWS; ++r) weight[r] = rows.seen[r] ? whole / total[r] : 0.0f;
  for (long block = first; block < last; ++block) {
    const long from = (block - first) * args.bq;
    const long count = from + args.bq < rows.count ? args.bq : rows.count - from;
    const long n = attended_before(keys.map, args.visible[b * args.visible_stride + block]);
    weigh(e, (n + SLAB - 1) / SLAB, from, count, weight, x);
    if (args.pooled) {
      write_pooled16(args, keys, b, h, block, x, [&](int16_t bits) {
        return to_float(Fp16{static_cast<uint16_t>(bits)}) / whole;
      });
      continue;
    }
    keep_top16(args, keys, b, h, block, x, room);
  }
  return true;
}

// to[j] += masses of up to 16 rows of a larger block; `voting` counts those that have a say. False:
// not in this way, and nothing was added.
static bool add_mass16(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                       long count, const Room& room, float* to, long& voting) {
  auto* e = reinterpret_cast<uint16_t*>(room.scores);
  auto* x = reinterpret_cast<int16_t*>(room.candidates);
  FastRows rows;
  float total[ROWS], weight[ROWS];
  if (!fast_rows(args, keys, b, h, first, count, room.rows, rows)) return false;
  if (!rows.most) return true;
  if (!row_exponentials(keys, rows, room, e, total)) return false;
  const float whole = share(count);
  for (int r = 0; r < ROWS; ++r) {
    weight[r] = rows.seen[r] ? whole / total[r] : 0.0f;
    voting += rows.seen[r] > 0;
  }
  weigh(e, rows.slabs(), 0, count, weight, x);
  const F unit = set1(1.0f / whole);
  for (long j = 0; j < rows.slabs() * SLAB; j += W)
    store(to + j, fma(load(reinterpret_cast<const Fp16*>(x) + j), unit, load(to + j)));
  return true;
}

static void select_max16(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                         long last, FastRows& rows, const Room& room) {
  auto* x = reinterpret_cast<int16_t*>(room.scores);
  const long stride = rows.slabs() * SLAB + 32;
  Spread spread;
  {
    Stream stream(keys.codes, keys.depth, room.rows, rows.start);
    find_spread(stream, rows, spread);
  }
  int16_t factor[ROWS] = {};
  double unit[ROWS] = {};
  for (long from = 0; from < rows.count; from += args.bq)
    unit[from / args.bq] = factors(
        rows, spread, from, from + args.bq < rows.count ? args.bq : rows.count - from, factor);
  for (int r = 0; r < ROWS; ++r) rows.start[r] = rows.seen[r] ? -spread.top[r] : NOTHING;
  Stream stream(keys.codes, keys.depth, room.rows, rows.start);
  raise(stream, rows, args.bq, factor, x, stride);
  for (long block = first; block < last; ++block, x += stride) {
    if (args.pooled) {
      const double one = unit[block - first];
      write_pooled16(args, keys, b, h, block, x, [&](int16_t i) {
        return one > 0 ? static_cast<float>(i / one) : 0.0f;
      });
      continue;
    }
    keep_top16(args, keys, b, h, block, x, room);
  }
}

// False: not in this way.
static bool select_fast(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                        long last, const Room& room) {
  if (!fast_blocks(args, keys)) return false;
  const long start = first * args.bq;
  const long stop = last * args.bq < args.q_len ? last * args.bq : args.q_len;
  FastRows rows;
  if (!fast_rows(args, keys, b, h, start, stop - start, room.rows, rows)) return false;
  if (!rows.most) return true;  // nothing to keep
  if (args.pooling == Pooling::mass) return select_mass16(args, keys, b, h, first, last, rows, room);
  if (args.pooling == Pooling::max) select_max16(args, keys, b, h, first, last, rows, room);
  else select_none16(args, keys, b, h, first, rows, room);
  return true;
}

}  // namespace sparseloom::SL_TIER

#endif
