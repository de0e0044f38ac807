// Pooling by "max" over scores of 16 bits: the largest distance, over a block's rows, of a score from
// the largest of its row, in standard deviations of the row (`methods/pooling.py`).
//
// The rows are multiplied twice: for their largest scores, sums and sums of squares, which are exact,
// and for x = (D - top) · m, by 15-bit fixed point numbers m in proportion to 1/deviation; x is off
// by one at most, and a standard deviation is some hundreds of it.
#pragma once

#include "fast.hpp"

#if SL_FAST

namespace sparseloom::SL_TIER {

struct Spread {
  int top[ROWS];           // largest score
  double deviation[ROWS];  // in units of D
};

SL_INLINE __m512i add_wide(__m512i total, __m512i x) {
  return _mm512_add_epi64(
      _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(x))),
      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1)));
}

static void find_spread(Stream& stream, const FastRows& rows, Spread& spread) {
  __m512i most[ROWS], sums[ROWS], squares[ROWS], all[ROWS], all_squares[ROWS];
  int bound = 1;
  for (int r = 0; r < ROWS; ++r) {
    most[r] = _mm512_set1_epi16(NEVER16);
    sums[r] = squares[r] = all[r] = all_squares[r] = _mm512_setzero_si512();
    if (rows.bound[r] > bound) bound = rows.bound[r];
  }
  const long whole = rows.whole();
  const long flush = INT32_MAX / (8l * bound * bound);  // slabs whose squares fit in 32 bits
  long left = flush;
  const __m512i ones = _mm512_set1_epi16(1);
  stream.each(rows.slabs(), [&](long slab, int r, const int32_t* scores) SL_LAMBDA {
    __m512i top = most[r], sum = sums[r], square = squares[r];
    if (slab < whole) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i d = words(scores, i);
        top = _mm512_max_epi16(top, d);
        sum = _mm512_dpwssd_epi32(sum, d, ones);
        square = _mm512_dpwssd_epi32(square, d, d);
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        const __mmask32 there = first32(rows.seen[r] - slab * SLAB - 32 * i);
        const __m512i d = _mm512_maskz_mov_epi16(there, words(scores, i));
        top = _mm512_mask_max_epi16(top, there, top, d);
        sum = _mm512_dpwssd_epi32(sum, d, ones);
        square = _mm512_dpwssd_epi32(square, d, d);
      }
    }
    most[r] = top;
    if (left > 1) {
      sums[r] = sum;
      squares[r] = square;
    } else {
      all[r] = add_wide(all[r], sum);
      all_squares[r] = add_wide(all_squares[r], square);
      sums[r] = squares[r] = _mm512_setzero_si512();
    }
    if (r == ROWS - 1) left = left > 1 ? left - 1 : flush;
  });
  for (int r = 0; r < ROWS; ++r) {
    const auto n = static_cast<__int128>(rows.seen[r]);
    const __int128 sum = _mm512_reduce_add_epi64(add_wide(all[r], sums[r]));
    const __int128 square = _mm512_reduce_add_epi64(add_wide(all_squares[r], squares[r]));
    spread.top[r] = largest16(most[r]);
    spread.deviation[r] =
        n ? __builtin_sqrt(static_cast<double>(n * square - sum * sum)) / static_cast<double>(n) : 0;
  }
}

// x[block][stride] of the blocks of `bq` rows; rows.start has to hold -top, and NOTHING for rows
// that have no say. `factor`: m of each row.
constexpr int32_t NOTHING = -(1 << 30);

static void raise(Stream& stream, const FastRows& rows, long bq, const int16_t* factor, int16_t* x,
                  long stride) {
  bool begins[ROWS], ends[ROWS];
  int16_t* to[ROWS];
  for (long r = 0; r < ROWS; ++r) {
    begins[r] = r % bq == 0;
    ends[r] = r < rows.count && (r % bq == bq - 1 || r == rows.count - 1);
    to[r] = x + r / bq * stride;
  }
  const long whole = rows.whole();
  const __m512i never = _mm512_set1_epi16(NEVER16);
  __m512i a = never, b = never, c = never, d = never;
  stream.each(rows.slabs(), [&](long slab, int r, const int32_t* scores) SL_LAMBDA {
    const __m512i by = _mm512_set1_epi16(factor[r]);
    __m512i w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) w[i] = _mm512_mulhrs_epi16(words(scores, i), by);
    if (slab >= whole)
      for (int i = 0; i < 4; ++i)
        w[i] = _mm512_mask_mov_epi16(never, first32(rows.seen[r] - slab * SLAB - 32 * i), w[i]);
    if (begins[r]) {
      a = w[0], b = w[1], c = w[2], d = w[3];
    } else {
      a = _mm512_max_epi16(a, w[0]), b = _mm512_max_epi16(b, w[1]);
      c = _mm512_max_epi16(c, w[2]), d = _mm512_max_epi16(d, w[3]);
    }
    if (ends[r]) {
      int16_t* place = to[r] + slab * SLAB;
      _mm512_store_si512(place, a), _mm512_store_si512(place + 32, b);
      _mm512_store_si512(place + 64, c), _mm512_store_si512(place + 96, d);
    }
  });
}

// What x counts one standard deviation of a row as: a power of two, so that blocks that follow each
// other are alike; 0 where no row of the block varies. Fills the factors of the block's rows.
static double factors(const FastRows& rows, const Spread& spread, long from, long count,
                      int16_t* factor) {
  double least = 0;
  for (long r = from; r < from + count; ++r) {
    const double deviation = rows.seen[r] ? spread.deviation[r] : 0;
    if (deviation > 0 && (least <= 0 || deviation < least)) least = deviation;
  }
  double unit = least > 0 ? 16384.0 : 0.0;
  while (unit > least) unit /= 2;
  for (long r = from; r < from + count; ++r) {
    factor[r] = 32767;  // of NOTHING
    if (rows.seen[r])
      factor[r] = spread.deviation[r] > 0
                      ? static_cast<int16_t>(32767 * (unit / spread.deviation[r]) + 0.5)
                      : static_cast<int16_t>(0);
  }
  return unit * 32767 / 32768;
}

}  // namespace sparseloom::SL_TIER

#endif
