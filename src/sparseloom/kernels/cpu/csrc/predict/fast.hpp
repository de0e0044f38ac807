// Blocks of up to 16 rows whose scores fit in 16 bits, with VNNI and AVX512-FP16.
//
// Scores are D = m·q·k - base, such that D <= 511 for every key. With D = 32·a + b an exponential
// 2^(step·D) is the product of two numbers out of tables of 32, one by a and one by b, which vectors
// of 32 numbers look up in one instruction each: relative error at most 2^-10.
// The tables are scaled by the row's largest score among some keys; a much larger one elsewhere
// overflows, which is seen in the row's sum, and the rows are done again with the largest of all.
// (AMX multiplies faster, but its scores come by way of memory, which costs more than it saves.)
#pragma once

#include "top16.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

constexpr int HIGHEST = 511, LOWEST = -512;
constexpr float START = 8.0f;       // exponential of the largest score that was looked at
constexpr float OCTAVES = 17;       // how far below it scores have to be right
constexpr long FLUSH = 32;          // groups of 32 keys whose exponentials are summed in fp16

struct FastRows {
  long count;          // rows that are there
  long seen[ROWS];     // keys that each one sees; 0: it has no say
  float step[ROWS];    // octaves per unit of D
  int32_t start[ROWS];  // what sums of products start from
  const int8_t* codes;  // (ROWS, depth)
  long least, most;    // the smallest and largest of `seen`
  bool clamp;          // D may lie below LOWEST
};

struct alignas(64) Tables {
  uint16_t coarse[ROWS][32], fine[ROWS][32];
};

// A group of 32 keys; in registers where DEPTH, the depth that the compiler knows, is 16.
template <int DEPTH>
struct Group {
  const int8_t* codes;
  long depth;
  SL_INLINE Group(const Keys& keys, long group)
      : codes(keys.codes + group * 2 * PANEL * keys.depth), depth(DEPTH ? DEPTH : keys.depth) {}
  SL_INLINE __m512i even(long at) const { return _mm512_load_si512(codes + at * PANEL); }
  SL_INLINE __m512i odd(long at) const { return _mm512_load_si512(codes + (at + depth) * PANEL); }
};

template <>
struct Group<16> {
  static constexpr long depth = 16;
  __m512i held[8];
  SL_INLINE Group(const Keys& keys, long group) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) held[i] = _mm512_load_si512(keys.codes + (group * 8 + i) * 64);
  }
  SL_INLINE __m512i even(long at) const { return held[at / 4]; }
  SL_INLINE __m512i odd(long at) const { return held[4 + at / 4]; }
};

// The 32 scores of a row and a group of keys, as 16-bit integers in the order of the keys.
template <int DEPTH>
SL_INLINE __m512i words(const Group<DEPTH>& group, const FastRows& rows, int r) {
  const int8_t* row = rows.codes + r * group.depth;
  __m512i a = _mm512_set1_epi32(rows.start[r]), b = a;
#pragma GCC unroll 4
  for (long at = 0; at < group.depth; at += 4) {
    const __m512i q = _mm512_set1_epi32(four(row + at));
    a = _mm512_dpbusd_epi32(a, group.even(at), q);
    b = _mm512_dpbusd_epi32(b, group.odd(at), q);
  }
  return _mm512_packs_epi32(a, b);
}

SL_INLINE int largest16(__m512i x) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16), high = _mm512_srai_epi32(x, 16);
  return _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
}

// The largest D of each row among every `every`-th group and the last ones.
template <int DEPTH>
static void find_largest(const Keys& keys, const FastRows& rows, long every, int* top) {
  __m512i most[ROWS];
  for (auto& m : most) m = _mm512_set1_epi16(-32768);
  const long groups = (rows.most + 31) / 32, whole = rows.least / 32;
  for (long g = 0; g < groups; g = g + every < groups - 1 ? g + every : g + 1) {
    const Group<DEPTH> group(keys, g);
    if (g < whole) {
      for (int r = 0; r < ROWS; ++r) most[r] = _mm512_max_epi16(most[r], words(group, rows, r));
    } else {
      for (int r = 0; r < ROWS; ++r)
        most[r] = _mm512_mask_max_epi16(most[r], first32(rows.seen[r] - 32 * g), most[r],
                                        words(group, rows, r));
    }
  }
  for (int r = 0; r < ROWS; ++r) top[r] = largest16(most[r]);
}

SL_INLINE void store_halves(uint16_t* to, F a) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

static void make_tables(const FastRows& rows, const int* top, Tables& tables) {
  const F ramp = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  for (int r = 0; r < ROWS; ++r) {
    if (!rows.seen[r]) {
      memset(tables.coarse[r], 0, sizeof tables.coarse[r]);
      memset(tables.fine[r], 0, sizeof tables.fine[r]);
      continue;
    }
    const F step = set1(rows.step[r]), limit = set1(60.0f);
    for (int half = 0; half < 2; ++half) {
      // a = 0 ... 15, then -16 ... -1: the lowest five bits of D / 32.
      const F d = (ramp + set1(half ? -16.0f : 0.0f)) * set1(32.0f) + set1(16.0f);
      const F octaves = step * (d - set1(static_cast<float>(top[r]))) + set1(3.0f);
      store_halves(tables.coarse[r] + 16 * half, exp2(min(octaves, limit)));
      store_halves(tables.fine[r] + 16 * half, exp2(step * (ramp + set1(16.0f * half - 16.0f))));
    }
  }
}

template <int DEPTH, bool CLAMP>
SL_INLINE __m512h exponential(const Group<DEPTH>& group, const FastRows& rows,
                              const Tables& tables, int r) {
  __m512i d = words(group, rows, r);
  if (CLAMP) d = _mm512_max_epi16(d, _mm512_set1_epi16(LOWEST));
  const __m512i coarse = _mm512_permutexvar_epi16(_mm512_srli_epi16(d, 5), _mm512_load_si512(tables.coarse[r]));
  const __m512i fine = _mm512_permutexvar_epi16(d, _mm512_load_si512(tables.fine[r]));
  return _mm512_mul_ph(_mm512_castsi512_ph(coarse), _mm512_castsi512_ph(fine));
}

SL_INLINE __m512 both_halves(__m512h x) {
  const __m512i bits = _mm512_castph_si512(x);
  return _mm512_add_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
}

// e[group][row][32] and the sum of each row. False: a sum is not finite.
template <int DEPTH, bool CLAMP>
static bool exponentials(const Keys& keys, const FastRows& rows, const Tables& tables, uint16_t* e,
                         float* total) {
  __m512 wide[ROWS];
  for (auto& w : wide) w = _mm512_setzero_ps();
  const long groups = (rows.most + 31) / 32, whole = rows.least / 32;
  for (long start = 0; start < whole; start += FLUSH) {
    const long stop = start + FLUSH < whole ? start + FLUSH : whole;
    __m512h sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ph();
    for (long g = start; g < stop; ++g) {
      const Group<DEPTH> group(keys, g);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512h some = exponential<DEPTH, CLAMP>(group, rows, tables, r);
        sums[r] = _mm512_add_ph(sums[r], some);
        _mm512_store_ph(e + (g * ROWS + r) * 32, some);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) wide[r] = _mm512_add_ps(wide[r], both_halves(sums[r]));
  }
  for (long g = whole; g < groups; ++g) {
    const Group<DEPTH> group(keys, g);
    for (int r = 0; r < ROWS; ++r) {
      const __m512i some =
          _mm512_maskz_mov_epi16(first32(rows.seen[r] - 32 * g),
                                 _mm512_castph_si512(exponential<DEPTH, CLAMP>(group, rows, tables, r)));
      wide[r] = _mm512_add_ps(wide[r], both_halves(_mm512_castsi512_ph(some)));
      _mm512_store_si512(e + (g * ROWS + r) * 32, some);
    }
  }
  bool finite = true;
  for (int r = 0; r < ROWS; ++r) {
    total[r] = _mm512_reduce_add_ps(wide[r]);
    finite &= total[r] < __builtin_inff();
  }
  return finite;
}

// x[j] = sum of weight · e over `count` rows from `first`, as bits of fp16 numbers (at least 0).
static void weigh(const uint16_t* e, long groups, long first, long count, const float* weight,
                  int16_t* x) {
  __m512h w[ROWS];
  for (long r = 0; r < count; ++r) w[r] = _mm512_set1_ph(static_cast<_Float16>(weight[first + r]));
  e += first * 32;
  if (count == 8) {
    for (long g = 0; g < groups; ++g, e += ROWS * 32) {
      __m512h a = _mm512_mul_ph(_mm512_load_ph(e), w[0]), b = _mm512_mul_ph(_mm512_load_ph(e + 32), w[1]);
#pragma GCC unroll 3
      for (int r = 2; r < 8; r += 2) {
        a = _mm512_fmadd_ph(_mm512_load_ph(e + r * 32), w[r], a);
        b = _mm512_fmadd_ph(_mm512_load_ph(e + r * 32 + 32), w[r + 1], b);
      }
      _mm512_store_ph(x + g * 32, _mm512_add_ph(a, b));
    }
    return;
  }
  for (long g = 0; g < groups; ++g, e += ROWS * 32) {
    __m512h a = _mm512_setzero_ph();
    for (long r = 0; r < count; ++r) a = _mm512_fmadd_ph(_mm512_load_ph(e + r * 32), w[r], a);
    _mm512_store_ph(x + g * 32, a);
  }
}

}  // namespace sparseloom::SL_TIER

#endif
