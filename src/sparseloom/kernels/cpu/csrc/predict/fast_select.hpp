// Query blocks of up to 16 rows by `fast.hpp`: scores, pooling by mass, the best keys.
#pragma once

#include "fast.hpp"
#include "pool.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

constexpr int16_t MUST16 = 32767, NEVER16 = -32768;

// Whether these blocks can go this way at all; whether their numbers can, shows on the way.
SL_INLINE bool fast_blocks(const SelectArgs& args, const Keys& keys) {
  return keys.offset && args.bk == 1 && args.bq <= ROWS && !args.thresholds &&
         (args.pooling == Pooling::none || args.pooling == Pooling::mass);
}

// Rows of q times the largest factor that keeps D in range, and what shifts D to where it should be.
// False: an exponential of these scores would not fit in fp16.
static bool fast_rows(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                      long count, int8_t* codes, FastRows& rows) {
  memset(codes, 0, static_cast<size_t>(ROWS * keys.depth));
  rows.count = count;
  rows.codes = codes;
  rows.clamp = false;
  rows.least = keys.map.count;
  rows.most = 0;
  for (long r = 0; r < ROWS; ++r) {
    rows.seen[r] = 0;
    rows.start[r] = 0;
    if (r >= count) continue;
    const long row = first + r;
    const int8_t* from = args.q + ((b * args.heads + h) * args.q_len + row) * args.width;
    int8_t* to = codes + r * keys.depth;
    const long mine = seen(args, keys.map, row);
    if (mine > rows.most) rows.most = mine;
    int total = 0, sizes = 0;
    for (long i = 0; i < args.width; ++i) {
      total += from[i];
      sizes += from[i] < 0 ? -from[i] : from[i];
    }
    if (args.pooling == Pooling::none) {
      rows.start[r] = -keys.offset * total;
      memcpy(to, from, static_cast<size_t>(args.width));
      rows.seen[r] = mine;
      if (mine < rows.least) rows.least = mine;
      continue;
    }
    if (!mine || (args.voters && !args.voters[b * args.voters_stride + row])) continue;
    const int bound = sizes * keys.largest;
    const int fits = bound ? HIGHEST / bound : 1, limit = 127 / keys.largest_q;
    const int factor = fits < 1 ? 1 : fits < limit ? fits : limit;
    for (long i = 0; i < args.width; ++i) to[i] = static_cast<int8_t>(factor * from[i]);
    rows.start[r] = HIGHEST - factor * (bound + keys.offset * total);
    rows.clamp |= HIGHEST - 2 * factor * bound < LOWEST;
    const float scale = args.q_scale[(b * args.heads + h) * args.q_len + row] * args.k_scale[h];
    rows.step[r] = scale * LOG2E / static_cast<float>(factor);
    if (!(rows.step[r] <= 0.6f)) return false;
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

static void write_pooled16(const SelectArgs& args, const Keys& keys, long b, long h, long block,
                           const int16_t* x, float unit) {
  const long blocks = (args.q_len + args.bq - 1) / args.bq;
  float* to = args.pooled + ((b * args.heads + h) * blocks + block) * args.kv_len;
  for (long j = 0; j < args.kv_len; ++j) to[j] = -INFINITE;
  const long n = attended_before(keys.map, args.visible[b * args.visible_stride + block]);
  for (long i = 0; i < n; ++i) {
    Fp16 bits;
    memcpy(&bits, x + i, 2);
    to[keys.map.place ? keys.map.place[i] : i] = to_float(bits) * unit;
  }
}

// False: not in this way.
template <int DEPTH>
static bool select_fast(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                        long last, const Room& room) {
  if (!fast_blocks(args, keys)) return false;
  const long start = first * args.bq;
  const long stop = last * args.bq < args.q_len ? last * args.bq : args.q_len;
  FastRows rows;
  if (!fast_rows(args, keys, b, h, start, stop - start, room.rows, rows)) return false;
  if (!rows.most) return true;  // nothing to keep
  const long groups = (rows.most + 31) / 32;

  if (args.pooling == Pooling::none) {
    auto* x = reinterpret_cast<int16_t*>(room.scores);
    const long stride = round_up(rows.most, 64) + 32;
    for (long g = 0; g < groups; ++g) {
      const Group<DEPTH> group(keys, g);
      for (int r = 0; r < rows.count; ++r)
        _mm512_store_si512(x + r * stride + g * 32, words(group, rows, r));
    }
    for (long block = first; block < last; ++block)
      keep_top16(args, keys, b, h, block, x + (block - first) * stride, room);
    return true;
  }

  auto* e = reinterpret_cast<uint16_t*>(room.scores);
  auto* x = reinterpret_cast<int16_t*>(room.candidates);
  int top[ROWS];
  float total[ROWS], weight[ROWS];
  Tables tables;
  bool done = false;
  for (long every = 16; !done && every; every = every == 16 ? 1 : 0) {
    find_largest<DEPTH>(keys, rows, groups <= 32 ? 1 : every, top);
    if (!in_range(rows, top)) return false;
    make_tables(rows, top, tables);
    done = rows.clamp ? exponentials<DEPTH, true>(keys, rows, tables, e, total)
                      : exponentials<DEPTH, false>(keys, rows, tables, e, total);
  }
  if (!done) return false;
  const float whole = args.bq <= 8 ? 4096.0f : 2048.0f;  // what a row shares out
  for (int r = 0; r < ROWS; ++r) weight[r] = rows.seen[r] ? whole / total[r] : 0.0f;
  for (long block = first; block < last; ++block) {
    const long from = (block - first) * args.bq;
    const long count = from + args.bq < rows.count ? args.bq : rows.count - from;
    const long n = attended_before(keys.map, args.visible[b * args.visible_stride + block]);
    weigh(e, (n + 31) / 32, from, count, weight, x);
    if (args.pooled) write_pooled16(args, keys, b, h, block, x, 1 / whole);
    else keep_top16(args, keys, b, h, block, x, room);
  }
  return true;
}

}  // namespace sparseloom::SL_TIER

#endif
