// Small codes with AVX2: products in 16 bits, and masses of blocks of rows.
//
// The instruction that multiplies bytes takes unsigned by signed ones and adds pairs: codes of keys
// are packed with their largest added, two of a key side by side, [depth / 2][16][2] in a panel, and
// sums start from what that adds. A row's codes are stored twice, as broadcasts take four bytes. The
// keys of a panel stand such that widening interleaves their sums to the right order.
#pragma once

#include "pool.hpp"

#if SL_PAIRS

namespace sparseloom::SL_TIER {

constexpr long GROUP = 4;  // rows that are multiplied at once, with the keys of two panels

SL_INLINE bool fits_pairs(long width, int largest, int largest_q) {
  return largest && largest_q && largest < 128 && 2 * largest * largest_q * width <= 32767;
}

// Where a key stands in its panel.
SL_INLINE long column_of(long key) {
  const long quarter = key / 4 % 4;
  return (quarter == 1 ? 2 : quarter == 2 ? 1 : quarter) * 4 + key % 4;
}

static void pack_pairs(const int8_t* codes, long width, const Keys& keys, long first_panel,
                       long last_panel, int8_t* packed) {
  const KeyMap& map = keys.map;
  for (long panel = first_panel; panel < last_panel; ++panel) {
    int8_t* to = packed + panel * keys.depth * PANEL;
    memset(to, 0, static_cast<size_t>(keys.depth * PANEL));
    for (long c = 0; c < PANEL && panel * PANEL + c < map.count; ++c) {
      const long key = panel * PANEL + c;
      const int8_t* from = codes + (map.place ? map.place[key] : key) * width;
      for (long i = 0; i < width; ++i)
        to[i / 2 * 2 * PANEL + column_of(c) * 2 + i % 2] = static_cast<int8_t>(from[i] + keys.largest);
    }
  }
}

// What rows of pairs are multiplied by, and from what their sums start.
struct PairRows {
  const int8_t* codes;  // (ROWS, 2 · depth)
  int16_t start[ROWS];
};

static PairRows pair_rows(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                          long count, int8_t* to) {
  PairRows rows{to, {}};
  memset(to, 0, static_cast<size_t>(2 * ROWS * keys.depth));
  for (long r = 0; r < count; ++r, to += 2 * keys.depth) {
    const int8_t* from = args.q + ((b * args.heads + h) * args.q_len + first + r) * args.width;
    int total = 0;
    for (long i = 0; i < args.width; ++i) {
      to[i / 2 * 4 + i % 2] = to[i / 2 * 4 + 2 + i % 2] = from[i];
      total += from[i];
    }
    rows.start[r] = static_cast<int16_t>(-keys.largest * total);
  }
  return rows;
}

// each(key, row, sums of 16 keys) for the rows first ... first + 3 and the keys `from` (a multiple of
// 32) ... upto - 1, rounded up to 32.
template <class Each>
SL_INLINE void multiply_pairs(const PairRows& rows, long first, const Keys& keys, long from,
                              long upto, Each each) {
  const long depth = keys.depth;
  const int8_t* a = rows.codes + first * 2 * depth;
  for (long key = from; key < upto; key += 2 * PANEL) {
    const int8_t* b = keys.codes + key * depth;
    __m256i sum[GROUP][2];
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; ++i) sum[i][0] = sum[i][1] = _mm256_set1_epi16(rows.start[first + i]);
    for (long at = 0; at < depth; at += 2) {
      const auto* column = reinterpret_cast<const __m256i*>(b + at * PANEL);
      const auto* next = reinterpret_cast<const __m256i*>(b + (depth + at) * PANEL);
      const __m256i left = _mm256_loadu_si256(column), right = _mm256_loadu_si256(next);
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; ++i) {
        const __m256i row = _mm256_set1_epi32(four(a + (i * depth + at) * 2));
        sum[i][0] = _mm256_add_epi16(sum[i][0], _mm256_maddubs_epi16(left, row));
        sum[i][1] = _mm256_add_epi16(sum[i][1], _mm256_maddubs_epi16(right, row));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; ++i) {
      each(key, i, sum[i][0]);
      each(key + PANEL, i, sum[i][1]);
    }
  }
}

static void score_pairs(const PairRows& rows, long count, const Keys& keys, long n, int32_t* scores,
                        long stride) {
  for (long first = 0; first < count; first += GROUP)
    multiply_pairs(rows, first, keys, 0, n, [&](long key, int i, __m256i sums) SL_LAMBDA {
      auto* to = reinterpret_cast<__m256i*>(scores + (first + i) * stride + key);
      _mm256_storeu_si256(to, _mm256_srai_epi32(_mm256_unpacklo_epi16(sums, sums), 16));
      _mm256_storeu_si256(to + 1, _mm256_srai_epi32(_mm256_unpackhi_epi16(sums, sums), 16));
    });
}

// ---------------------------------------------------------------- masses

// 2^x to a relative 1e-4, for -126 <= x <= 127.
SL_INLINE F exp2_near(F x) {
  const F magic = set1(12582912.0f);
  const F shifted = x + magic, f = x - (shifted - magic);
  F p = fma(set1(0.05517167f), f, set1(0.24261113f));
  p = fma(p, f, set1(0.69326099f));
  p = fma(p, f, set1(0.99992807f));
  return scale_by_power(p, zero(), shifted);
}

// Rows of which masses are wanted. A row's exponents are taken below the bound of its scores, as
// the largest one is not known yet. They stay in the range of fp32; a row whose scores lie so far
// below the bound that what it shares out becomes imprecise shows in its sum.
struct MassRows {
  long seen[ROWS] = {};  // keys that each one sees; 0: it has no say
  float unit[ROWS] = {}, base[ROWS] = {};
  long most = 0, voting = 0;
  bool clamp = false;  // exponents may lie below those of fp32
};
constexpr float HIGHEST_POWER = 100, LOWEST_POWER = -120, LEAST_SUM = 1e-27f;  // 2^-90

// False: the bound is too far away, or steps between scores are too large.
static bool mass_rows(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                      long count, MassRows& mass) {
  for (long r = 0; r < count; ++r) {
    if (args.voters && !args.voters[b * args.voters_stride + first + r]) continue;
    const long row = (b * args.heads + h) * args.q_len + first + r;
    mass.seen[r] = seen(args, keys.map, first + r);
    if (!mass.seen[r]) continue;
    if (mass.seen[r] > mass.most) mass.most = mass.seen[r];
    ++mass.voting;
    int sizes = 0;
    const int8_t* codes = args.q + row * args.width;
    for (long i = 0; i < args.width; ++i) sizes += codes[i] < 0 ? -codes[i] : codes[i];
    mass.unit[r] = args.q_scale[row] * args.k_scale[h] * LOG2E;
    const float bound = static_cast<float>(sizes * keys.largest) * mass.unit[r];
    if (!(bound < 1000.0f && mass.unit[r] >= 0.0f && mass.unit[r] < 8.0f)) return false;
    const float base = bound > HIGHEST_POWER ? HIGHEST_POWER - bound : 0.0f;
    mass.clamp |= base - bound < LOWEST_POWER;
    // Rounding moves all exponents of the row by the same, at most 4, and shares cancel that.
    mass.base[r] = base - (8388608.0f + 32768.0f) * mass.unit[r];
  }
  return true;
}

// e[key] of one row and the keys from ... upto - 1, from their scores; returns their sum. ALL: it sees
// all of these keys.
//
// A score of 16 bits, 2^15 added, is the low half of a float from 2^23 on; `base` takes 2^23 + 2^15
// off again.
template <bool CLAMP, bool ALL>
static F exponentials(const int16_t* scores, long from, long upto, const MassRows& mass, long row,
                      float* e) {
  const F ramp = {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)};
  const F unit = set1(mass.unit[row]), base = set1(mass.base[row]);
  const __m256i above = _mm256_set1_epi16(0x4b00);
  F sums[2] = {zero(), zero()};
  for (long key = from; key < upto; key += PANEL) {
    const __m256i some = _mm256_load_si256(reinterpret_cast<const __m256i*>(scores + key - from));
    const __m256i halves[2] = {_mm256_unpacklo_epi16(some, above), _mm256_unpackhi_epi16(some, above)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      F power = fma(F{_mm256_castsi256_ps(halves[half])}, unit, base);
      if (CLAMP) power = max(power, set1(-126.0f));
      F x = exp2_near(power);
      if (!ALL) {
        const F left = set1(static_cast<float>(mass.seen[row] - key - half * W));
        x = where_less(ramp, left, x, zero());
      }
      sums[half] = sums[half] + x;
      store(e + key + half * W, x);
    }
  }
  return sums[0] + sums[1];
}

// e[row][key] of GROUP rows, and the sum of each.
static void exponentials(const PairRows& rows, long first, const Keys& keys, const MassRows& mass,
                         float* e, long stride, float* total) {
  constexpr long SOME = 512;  // keys whose scores stay in the nearest cache
  alignas(32) int16_t scores[GROUP][SOME];
  F sums[GROUP] = {zero(), zero(), zero(), zero()};
  for (long from = 0; from < mass.most; from += SOME) {
    const long upto = mass.most - from < SOME ? mass.most : from + SOME;
    multiply_pairs(rows, first, keys, from, upto, [&](long key, int i, __m256i some) SL_LAMBDA {
      _mm256_store_si256(reinterpret_cast<__m256i*>(scores[i] + key - from), some);
    });
    for (int i = 0; i < GROUP; ++i) {
      float* to = e + (first + i) * stride;
      const long row = first + i;
      const bool all = upto % PANEL == 0 && upto <= mass.seen[row];
      const auto run = mass.clamp ? all ? exponentials<true, true> : exponentials<true, false>
                                  : all ? exponentials<false, true> : exponentials<false, false>;
      sums[i] = sums[i] + run(scores[i], from, upto, mass, row, to);
    }
  }
  for (int i = 0; i < GROUP; ++i) total[first + i] = sum(sums[i]);
}

// to[j] += sum of weight · e over COUNT rows.
template <int COUNT>
static void weigh(const float* e, long stride, const float* weight, long n, float* to) {
  F w[COUNT];
  for (int r = 0; r < COUNT; ++r) w[r] = set1(weight[r]);
  for (long j = 0; j < n; j += W) {
    F sums = load(to + j);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r) sums = fma(load(e + r * stride + j), w[r], sums);
    store(to + j, sums);
  }
}

// to[j] += masses of up to 16 rows of a block; `voting` counts those that have a say. False: not in
// this way, and nothing was added.
static bool add_mass16(const SelectArgs& args, const Keys& keys, long b, long h, long first,
                       long count, const Room& room, float* to, long& voting) {
  auto* e = reinterpret_cast<float*>(room.scores);
  MassRows mass;
  if (!mass_rows(args, keys, b, h, first, count, mass)) return false;
  if (!mass.voting) return true;
  PairRows rows = pair_rows(args, keys, b, h, first, count, room.rows);
  for (int16_t& start : rows.start) start = static_cast<int16_t>(start ^ -0x8000);
  float total[ROWS], weight[ROWS] = {};
  for (long r = 0; r < count; r += GROUP)
    exponentials(rows, r, keys, mass, e, room.stride, total);
  for (long r = 0; r < count; ++r) {
    if (!mass.seen[r]) continue;
    if (!(total[r] > LEAST_SUM)) return false;
    weight[r] = 1.0f / total[r];
  }
  for (long r = 0; r < count; r += 2 * GROUP)
    if (r + GROUP < count) weigh<2 * GROUP>(e + r * room.stride, room.stride, weight + r, mass.most, to);
    else weigh<GROUP>(e + r * room.stride, room.stride, weight + r, mass.most, to);
  voting += mass.voting;
  return true;
}

}  // namespace sparseloom::SL_TIER

#endif
