// Blocks of up to 16 rows whose scores fit in 16 bits, with AMX and AVX512-FP16.
//
// Scores are D = m·q·k - base. Masses: D <= 511 for every key. With D = 32·a + b an exponential
// 2^(step·D) is the product of two numbers out of tables of 32, one by a and one by b, which vectors
// of 32 numbers look up in one instruction each: relative error at most 2^-10.
// The tables are scaled by the row's largest score among some keys; a much larger one elsewhere
// overflows, which is seen in the row's sum, and the rows are done again with the largest of all.
#pragma once

#include "top16.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

constexpr int HIGHEST = 511, LOWEST = -512;
constexpr int16_t MUST16 = 32767, NEVER16 = -32768;
constexpr float OCTAVES = 17;  // how far below the largest score others have to be right
constexpr long FLUSH = 8;      // slabs whose exponentials are summed in fp16

struct FastRows {
  long count;           // rows that are there
  long seen[ROWS];      // keys that each one sees; 0: it has no say
  float step[ROWS];     // octaves per unit of D
  int bound[ROWS];      // of |q·k|, with q times m
  int32_t start[ROWS];  // what sums of products start from: -base
  long least, most;     // the smallest and largest of `seen`
  bool clamp;           // D may lie below LOWEST
  SL_INLINE long slabs() const { return (most + SLAB - 1) / SLAB; }
  SL_INLINE long whole() const { return least / SLAB; }  // slabs that all rows see all of
};

struct alignas(64) Tables {
  uint16_t coarse[ROWS][32], fine[ROWS][32];
};

// Sizes of codes added up.
static int sum_of_sizes(const int8_t* x, long n) {
  __m512i total = _mm512_setzero_si512();
  for (long i = 0; i < n; i += 64) {
    const __mmask64 there = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i size = _mm512_abs_epi8(_mm512_maskz_loadu_epi8(there, x + i));
    total = _mm512_add_epi64(total, _mm512_sad_epu8(size, _mm512_setzero_si512()));
  }
  return static_cast<int>(_mm512_reduce_add_epi64(total));
}

static void scale_codes(const int8_t* from, long n, int factor, int8_t* to) {
  const __m512i by = _mm512_set1_epi16(static_cast<int16_t>(factor));
  for (long i = 0; i < n; i += 32) {
    const __mmask32 there = first32(n - i);
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, from + i));
    _mm256_mask_storeu_epi8(to + i, there, _mm512_cvtepi16_epi8(_mm512_mullo_epi16(wide, by)));
  }
}

SL_INLINE int largest16(__m512i x) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16), high = _mm512_srai_epi32(x, 16);
  return _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
}

// The largest D of each row among every `every`-th slab and the last ones.
static void find_largest(Stream& stream, const FastRows& rows, long every, int* top) {
  __m512i most[ROWS];
  for (auto& m : most) m = _mm512_set1_epi16(NEVER16);
  const long slabs = rows.slabs(), whole = rows.whole();
  stream.some(slabs, every, [&](long slab, int r, const int32_t* scores) SL_LAMBDA {
    __m512i all = most[r];
    for (int i = 0; i < 4; ++i) {
      const __mmask32 there = slab < whole ? ~0u : first32(rows.seen[r] - slab * SLAB - 32 * i);
      all = _mm512_mask_max_epi16(all, there, all, words(scores, i));
    }
    most[r] = all;
  });
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

// A row's exponentials, from scores as `words` makes them.
template <bool CLAMP>
SL_INLINE __m512h exponential(__m512i d, __m512i coarse, __m512i fine) {
  if (CLAMP) d = _mm512_max_epi16(d, _mm512_set1_epi16(LOWEST));
  return _mm512_mul_ph(
      _mm512_castsi512_ph(_mm512_permutexvar_epi16(_mm512_srli_epi16(d, 5), coarse)),
      _mm512_castsi512_ph(_mm512_permutexvar_epi16(d, fine)));
}

SL_INLINE __m512 both_halves(__m512h x) {
  const __m512i bits = _mm512_castph_si512(x);
  return _mm512_add_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
}

// e[slab][row][SLAB] and the sum of each row. False: a sum is not finite.
template <bool CLAMP>
static bool exponentials(Stream& stream, const FastRows& rows, const Tables& tables, uint16_t* e,
                         float* total) {
  __m512h sums[ROWS];
  __m512 wide[ROWS];
  for (auto& s : sums) s = _mm512_setzero_ph();
  for (auto& w : wide) w = _mm512_setzero_ps();
  const long slabs = rows.slabs(), whole = rows.whole();
  stream.each(slabs, [&](long slab, int r, const int32_t* scores) SL_LAMBDA {
    const __m512i coarse = _mm512_load_si512(tables.coarse[r]);
    const __m512i fine = _mm512_load_si512(tables.fine[r]);
    __m512h x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = exponential<CLAMP>(words(scores, i), coarse, fine);
    if (slab >= whole)
      for (int i = 0; i < 4; ++i)
        x[i] = _mm512_castsi512_ph(_mm512_maskz_mov_epi16(
            first32(rows.seen[r] - slab * SLAB - 32 * i), _mm512_castph_si512(x[i])));
    uint16_t* to = e + (slab * ROWS + r) * SLAB;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_ph(to + 32 * i, x[i]);
    const __m512h all = _mm512_add_ph(_mm512_add_ph(x[0], x[1]), _mm512_add_ph(x[2], x[3]));
    if (slab % FLUSH) {
      sums[r] = _mm512_add_ph(sums[r], all);
    } else {
      wide[r] = _mm512_add_ps(wide[r], both_halves(sums[r]));
      sums[r] = all;
    }
  });
  bool finite = true;
  for (int r = 0; r < ROWS; ++r) {
    total[r] = _mm512_reduce_add_ps(_mm512_add_ps(wide[r], both_halves(sums[r])));
    finite &= total[r] < __builtin_inff();
  }
  return finite;
}

// x[j] = sum of weight · e over `count` rows from `first`, as bits of fp16 numbers (at least 0).
static void weigh(const uint16_t* e, long slabs, long first, long count, const float* weight,
                  int16_t* x) {
  __m512h w[ROWS];
  for (long r = 0; r < count; ++r) w[r] = _mm512_set1_ph(static_cast<_Float16>(weight[first + r]));
  e += first * SLAB;
  for (long slab = 0; slab < slabs; ++slab, e += ROWS * SLAB, x += SLAB) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* from = e + 32 * i;
      __m512h a = _mm512_mul_ph(_mm512_load_ph(from), w[0]);
      if (count == 8) {
        __m512h b = _mm512_mul_ph(_mm512_load_ph(from + SLAB), w[1]);
#pragma GCC unroll 3
        for (int r = 2; r < 8; r += 2) {
          a = _mm512_fmadd_ph(_mm512_load_ph(from + r * SLAB), w[r], a);
          b = _mm512_fmadd_ph(_mm512_load_ph(from + (r + 1) * SLAB), w[r + 1], b);
        }
        a = _mm512_add_ph(a, b);
      } else {
        __m512h b = _mm512_setzero_ph();
        long r = 1;
        for (; r + 1 < count; r += 2) {
          b = _mm512_fmadd_ph(_mm512_load_ph(from + r * SLAB), w[r], b);
          a = _mm512_fmadd_ph(_mm512_load_ph(from + (r + 1) * SLAB), w[r + 1], a);
        }
        if (r < count) b = _mm512_fmadd_ph(_mm512_load_ph(from + r * SLAB), w[r], b);
        a = _mm512_add_ph(a, b);
      }
      _mm512_store_ph(x + 32 * i, a);
    }
  }
}

}  // namespace sparseloom::SL_TIER

#endif
