// The largest k of n 16-bit integers, exactly; of equal ones the first. (`top.hpp` for 32 bits.)
#pragma once

#include "stream.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

SL_INLINE __mmask32 first32(long n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1;
}

// How many of the n numbers are at least `level`. What lies behind them, up to a multiple of 64,
// is the lowest number there is, and level is not.
static long count_from16(const int16_t* x, long n, int level) {
  const __m512i wanted = _mm512_set1_epi16(static_cast<int16_t>(level));
  long a = 0, b = 0;
  for (long i = 0; i < n; i += 64) {
    a += __builtin_popcount(_mm512_cmpge_epi16_mask(_mm512_load_si512(x + i), wanted));
    b += __builtin_popcount(_mm512_cmpge_epi16_mask(_mm512_load_si512(x + i + 32), wanted));
  }
  return a + b;
}

// The highest level that at least k numbers reach, and how many do; 1 <= k <= n.
static int find_level16(const int16_t* x, long n, long k, Guess& guess, long* reached) {
  int low = -32767, high = 32768;  // count(low) >= k > count(high)
  long at_low = n, at_high = 0;
  int level = guess.level;
  for (int step = 0;; ++step) {
    if (level <= low) level = low + 1;
    if (level >= high) level = high - 1;
    const long count = count_from16(x, n, level);
    if (count >= k) low = level, at_low = count;
    else high = level, at_high = count;
    if (count == k || high - low == 1) break;
    const bool both = low > -32767 && high < 32768;
    if (step > 5 || (both && high - low < 8)) {
      level = low + (high - low) / 2;
    } else if (both) {
      const float share = (static_cast<float>(at_low - k) + 0.5f) / static_cast<float>(at_low - at_high);
      level = low + static_cast<int>(share * static_cast<float>(high - low) + 0.5f);
    } else {
      const float gap = static_cast<float>(count - k) / guess.slope;
      // A little too far, so that the answer lies between two probes.
      const int jump = static_cast<int>(1.3f * (gap < 8192 ? gap > -8192 ? gap : -8192 : 8192));
      level = level + jump + (count >= k ? 1 : -1);
    }
  }
  if (at_low > at_high && high < 32768 && low > -32767)
    guess.slope = 0.5f * guess.slope +
                  0.5f * static_cast<float>(at_low - at_high) / static_cast<float>(high - low);
  if (guess.slope < 1e-3f) guess.slope = 1e-3f;
  guess.level = low;
  *reached = at_low;
  return low;
}

// Writes the places of the k largest of n, ascending, named by `place` where it is given.
static void write_top16(const int16_t* x, long n, long k, Guess& guess, const int32_t* place,
                        int32_t* out) {
  long reached = n;
  const int level = k < n ? find_level16(x, n, k, guess, &reached) : -32768;
  const bool tied = reached > k;
  long ties = tied ? k - (level == 32767 ? 0 : count_from16(x, n, level + 1)) : 0;
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(level));
  const __m512i ramp = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17,
                                        16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  long written = 0;
  for (long i = 0; i < n; i += 32) {
    const __m512i some = _mm512_load_si512(x + i);
    __mmask32 in = _mm512_mask_cmpge_epi16_mask(first32(n - i), some, limit);
    if (tied) {
      unsigned equal = _mm512_mask_cmpeq_epi16_mask(in, some, limit);
      in &= ~equal;
      for (; equal && ties > 0; equal &= equal - 1, --ties) in |= equal & -equal;
    }
    const int count = __builtin_popcount(in);
    const auto half = static_cast<__mmask16>(in), rest = static_cast<__mmask16>(in >> 16);
    __m512i low, high;
    int low_count = count < 16 ? count : 16;
    if (place) {
      low_count = __builtin_popcount(half);
      low = _mm512_maskz_compress_epi32(half, _mm512_maskz_loadu_epi32(half, place + i));
      high = _mm512_maskz_compress_epi32(rest, _mm512_maskz_loadu_epi32(rest, place + i + 16));
    } else {
      const __m512i names = _mm512_maskz_compress_epi16(in, ramp);
      const __m512i start = _mm512_set1_epi32(static_cast<int>(i));
      low = _mm512_add_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(names)), start);
      high = _mm512_add_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(names, 1)), start);
    }
    if (written + 32 <= k) {
      _mm512_storeu_si512(out + written, low);
      if (count > low_count) _mm512_storeu_si512(out + written + low_count, high);
    } else {
      _mm512_mask_storeu_epi32(out + written, static_cast<__mmask16>(first32(low_count)), low);
      _mm512_mask_storeu_epi32(out + written + low_count,
                               static_cast<__mmask16>(first32(count - low_count)), high);
    }
    written += count;
  }
}

}  // namespace sparseloom::SL_TIER

#endif
