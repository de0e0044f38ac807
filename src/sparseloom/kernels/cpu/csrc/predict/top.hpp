// The largest k of n numbers, exactly; of equal ones the first.
#pragma once

#include "../pack.hpp"

namespace sparseloom::SL_TIER {

// How many of the n numbers are at least `level`.
static long count_from(const int32_t* x, long n, int32_t level) {
  long count = 0, i = 0;
#if SL_AVX512
  const __m512i wanted = _mm512_set1_epi32(level);
  for (; i + 16 <= n; i += 16)
    count += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + i), wanted));
  if (i < n)
    count += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(
        first(static_cast<int>(n - i)), _mm512_maskz_loadu_epi32(first(static_cast<int>(n - i)), x + i),
        wanted));
  return count;
#elif SL_AVX2
  __m256i below = _mm256_setzero_si256();
  const __m256i wanted = _mm256_set1_epi32(level);
  for (const long whole = n / 8 * 8; i < whole; i += 8) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    below = _mm256_sub_epi32(below, _mm256_cmpgt_epi32(wanted, some));
  }
  int32_t parts[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), below);
  count = i;
  for (const int32_t part : parts) count -= part;
#endif
  for (; i < n; ++i) count += x[i] >= level;
  return count;
}

// The numbers in [low, high], packed to `to`, which has room for n + 16.
static long gather_range(const int32_t* x, long n, int32_t low, int32_t high, int32_t* to) {
  long count = 0, i = 0;
#if SL_AVX512
  const __m512i from = _mm512_set1_epi32(low), upto = _mm512_set1_epi32(high);
  for (; i < n; i += 16) {
    const __mmask16 there = first(n - i < 16 ? static_cast<int>(n - i) : 16);
    const __m512i some = _mm512_maskz_loadu_epi32(there, x + i);
    const __mmask16 in = _mm512_mask_cmpge_epi32_mask(_mm512_mask_cmple_epi32_mask(there, some, upto), some, from);
    _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(in, some));
    count += __builtin_popcount(in);
  }
  return count;
#elif SL_AVX2
  const __m256i from = _mm256_set1_epi32(low), upto = _mm256_set1_epi32(high);
  for (; i + 8 <= n; i += 8) {
    const __m256i some = load8(x + i);
    const unsigned in =
        0xff & ~set_of(_mm256_or_si256(_mm256_cmpgt_epi32(from, some), _mm256_cmpgt_epi32(some, upto)));
    store8(to + count, packed(some, in));
    count += __builtin_popcount(in);
  }
#endif
  for (; i < n; ++i) {
    to[count] = x[i];
    count += x[i] >= low && x[i] <= high;
  }
  return count;
}

// The k-th largest of n, 1 <= k <= n, by halving the range of values.
static int32_t kth_by_halving(const int32_t* x, long n, long k) {
  int32_t low = x[0], high = x[0];
  for (long i = 1; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  while (low < high) {  // count(low) >= k > count(high + 1)
    const int32_t middle =
        static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
    if (count_from(x, n, middle) >= k) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The k-th largest of n, 1 <= k <= n. A sample tells about where it is; only what lies near is
// looked at again. `room` has space for n + 16.
static int32_t kth_largest(const int32_t* x, long n, long k, int32_t* room) {
  constexpr long sample = 256;
  if (n <= 4 * sample) return kth_by_halving(x, n, k);
  const long step = n / 16;
  for (long part = 0; part < 16; ++part) memcpy(room + part * 16, x + part * step, 16 * sizeof(int32_t));
  const float share = static_cast<float>(k) / static_cast<float>(n), at = share * sample;
  const long margin = 4 + static_cast<long>(3 * __builtin_sqrtf(at * (1 - share)));
  const long upper = static_cast<long>(at) - margin, lower = static_cast<long>(at) + margin;
  const int32_t high = upper < 1 ? INT32_MAX : kth_by_halving(room, sample, upper);
  const int32_t low = lower > sample ? INT32_MIN : kth_by_halving(room, sample, lower);
  const long above = high == INT32_MAX ? 0 : count_from(x, n, high + 1);
  const long near = gather_range(x, n, low, high, room);
  if (above < k && k <= above + near) return kth_by_halving(room, near, k - above);
  return kth_by_halving(x, n, k);
}

// Writes the places of the k largest of n, ascending, named by `place` where it is given.
static void write_top(const int32_t* x, long n, long k, int32_t level, const int32_t* place,
                      int32_t* out) {
  long written = 0, ties = k - (level == INT32_MAX ? 0 : count_from(x, n, level + 1));
#if SL_AVX512
  const __m512i limit = _mm512_set1_epi32(level);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (long i = 0; i < n && written < k; i += 16) {
    const __mmask16 there = first(n - i < 16 ? static_cast<int>(n - i) : 16);
    const __m512i some = _mm512_maskz_loadu_epi32(there, x + i);
    __mmask16 in = _mm512_mask_cmpgt_epi32_mask(there, some, limit);
    unsigned equal = _mm512_mask_cmpeq_epi32_mask(there, some, limit);
    for (; equal && ties > 0; equal &= equal - 1, --ties)
      in = static_cast<__mmask16>(in | (equal & -equal));
    const int count = __builtin_popcount(in);
    const __m512i names = place ? _mm512_maskz_loadu_epi32(there, place + i) : index;
    const __m512i chosen = _mm512_maskz_compress_epi32(in, names);
    if (written + 16 <= k) _mm512_storeu_si512(out + written, chosen);
    else _mm512_mask_storeu_epi32(out + written, first(count), chosen);
    written += count;
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#else
  long i = 0;
#if SL_AVX2
  const __m256i limit = _mm256_set1_epi32(level);
  __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + 8 <= n && written < k; i += 8) {
    const __m256i some = load8(x + i);
    unsigned in = set_of(_mm256_cmpgt_epi32(some, limit));
    unsigned equal = ties > 0 ? set_of(_mm256_cmpeq_epi32(some, limit)) : 0;
    for (; equal && ties > 0; equal &= equal - 1, --ties) in |= equal & -equal;
    const __m256i chosen = packed(place ? load8(place + i) : index, in);
    const int count = __builtin_popcount(in);
    if (written + 8 <= k) {
      store8(out + written, chosen);
    } else {
      int32_t last[8];
      store8(last, chosen);
      memcpy(out + written, last, static_cast<size_t>(count) * sizeof(int32_t));
    }
    written += count;
    index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
  }
#endif
  for (; i < n && written < k; ++i) {
    const bool tie = x[i] == level && ties > 0;
    out[written] = place ? place[i] : static_cast<int32_t>(i);
    written += x[i] > level || tie;
    ties -= tie;
  }
#endif
}

}  // namespace sparseloom::SL_TIER
