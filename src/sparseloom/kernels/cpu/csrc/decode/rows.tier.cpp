// What happens to one row of scores: softmax, the largest ones, conversions.
#include "decode.hpp"
#include "../pack.hpp"
#include "lanes.hpp"

namespace sparseloom::SL_TIER {
namespace {

constexpr float INF = __builtin_inff();

void accumulate(const float* scores, int64_t n, float* maximum, float* total) {
  F top = set1(-INF);
  int64_t i = 0;
  for (; i + W <= n; i += W) top = max(top, load(scores + i));
  float highest = largest(top);
  for (; i < n; ++i) highest = scores[i] > highest ? scores[i] : highest;
  if (highest > *maximum) {
    F change = exp2(set1(*maximum - highest));
    float lanes[W];
    store(lanes, change);
    *total *= lanes[0];
    *maximum = highest;
  }
  const float shift = *maximum == -INF ? 0.0f : *maximum;
  F sums = zero();
  for (i = 0; i + W <= n; i += W) sums = sums + exp2(load(scores + i) - set1(shift));
  *total += sum(sums);
  if (i < n) {
    float lanes[W];
    const int left = static_cast<int>(n - i);
    store(lanes, exp2(load_n(scores + i, left) - set1(shift)));
    for (int lane = 0; lane < left; ++lane) *total += lanes[lane];
  }
}

void weigh(const float* scores, int64_t n, float maximum, float factor, float* weights) {
  const F shift = set1(maximum == -INF ? 0.0f : maximum), times = set1(factor);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(weights + i, exp2(load(scores + i) - shift) * times);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(weights + i, exp2(load_n(scores + i, left) - shift) * times, left);
  }
}

void finish(float* scores, const float* dots, int64_t n, bool add, float offset,
            const float* factors, int64_t stride, const int32_t* list, int64_t first) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = (dots[i] + offset) * (factors ? factors[(list ? list[i] : first + i) * stride] : 1);
    scores[i] = add ? scores[i] + x : x;
  }
}

// ---------------------------------------------------------------- lists of keys

template <class Index>
int64_t compact_list(const Index* keep, int64_t n, int64_t kv_len, const uint8_t* padding,
                     int32_t* list, int64_t* wrong) {
  int64_t count = 0, i = 0;
#if SL_AVX512
  // Entries of -1 to kv_len - 1 are 0 to kv_len after adding 1, and all others larger.
  for (; !padding && i + 8 <= n; i += 8) {
    __m512i key;
    if constexpr (sizeof(Index) == 8) key = _mm512_loadu_si512(keep + i);
    else key = _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i*)(keep + i)));
    const __m512i next = _mm512_add_epi64(key, _mm512_set1_epi64(1));
    if (_mm512_cmpgt_epu64_mask(next, _mm512_set1_epi64(kv_len))) break;
    const __mmask8 in = _mm512_test_epi64_mask(next, next);
    const int found = __builtin_popcount(in);
    const __m512i packed = _mm512_maskz_compress_epi64(in, key);
    _mm256_mask_storeu_epi32(list + count, static_cast<__mmask8>((1u << found) - 1),
                             _mm512_cvtepi64_epi32(packed));
    count += found;
  }
#elif SL_AVX2
  for (; !padding && i + 8 <= n; i += 8) {
    __m256i refused, key;
    if constexpr (sizeof(Index) == 8) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep + i));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep + i + 4));
      const __m256i least = _mm256_set1_epi64x(-1), beyond = _mm256_set1_epi64x(kv_len - 1);
      const auto outside = [&](__m256i x) SL_LAMBDA {
        return _mm256_or_si256(_mm256_cmpgt_epi64(least, x), _mm256_cmpgt_epi64(x, beyond));
      };
      refused = _mm256_or_si256(outside(first), outside(second));
      const __m256 halves =
          _mm256_shuffle_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), 0x88);
      key = _mm256_permute4x64_epi64(_mm256_castps_si256(halves), 0xd8);
    } else {
      key = load8(keep + i);
      refused = _mm256_or_si256(
          _mm256_cmpgt_epi32(_mm256_set1_epi32(-1), key),
          _mm256_cmpgt_epi32(key, _mm256_set1_epi32(static_cast<int32_t>(kv_len - 1))));
    }
    if (set_of(refused)) break;
    const unsigned in = set_of(_mm256_cmpgt_epi32(key, _mm256_set1_epi32(-1)));
    store8(list + count, packed(key, in));
    count += __builtin_popcount(in);
  }
#endif
  for (; i < n; ++i) {
    const int64_t key = keep[i];
    if (key < -1 || key >= kv_len) {
      *wrong = i;
      return 0;
    }
    list[count] = static_cast<int32_t>(key);
    count += key >= 0 && (!padding || padding[key]);
  }
  return count;
}

int64_t compact(const void* keep, bool is_64, int64_t n, int64_t kv_len, const uint8_t* padding,
                int32_t* list, int64_t* wrong) {
  return is_64 ? compact_list(static_cast<const int64_t*>(keep), n, kv_len, padding, list, wrong)
               : compact_list(static_cast<const int32_t*>(keep), n, kv_len, padding, list, wrong);
}

// ---------------------------------------------------------------- the largest scores

// Floats in their order as integers; -0 comes right before 0.
SL_INLINE int32_t rank_of(float x) {
  const uint32_t bits = to_bits(x);
  return static_cast<int32_t>(bits >> 31 ? bits ^ 0x7fffffffu : bits);
}
SL_INLINE float of_rank(int32_t rank) {
  const uint32_t bits = static_cast<uint32_t>(rank);
  return from_bits(bits >> 31 ? bits ^ 0x7fffffffu : bits);
}

int64_t count_above(const float* x, int64_t n, float limit) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] > limit;
  return count;
}

// Moves the numbers in (low, high] from x to `to` (which may be x); returns how many.
int64_t take_between(const float* x, int64_t n, float low, float high, float* to) {
  int64_t kept = 0, i = 0;
#if SL_AVX512
  const __m512 a = _mm512_set1_ps(low), b = _mm512_set1_ps(high);
  for (; i + W <= n; i += W) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 in =
        _mm512_cmp_ps_mask(v, a, _CMP_GT_OQ) & _mm512_cmp_ps_mask(v, b, _CMP_LE_OQ);
    // Never beyond what has been read, so x and `to` may be the same.
    _mm512_storeu_ps(to + kept, _mm512_maskz_compress_ps(in, v));
    kept += __builtin_popcount(in);
  }
#elif SL_AVX2
  const __m256 a = _mm256_set1_ps(low), b = _mm256_set1_ps(high);
  for (; i + W <= n; i += W) {
    const F v = load(x + i);
    const unsigned in = set_of(
        _mm256_and_ps(_mm256_cmp_ps(v.v, a, _CMP_GT_OQ), _mm256_cmp_ps(v.v, b, _CMP_LE_OQ)));
    store(to + kept, packed(v, in));  // never beyond what has been read, here either
    kept += __builtin_popcount(in);
  }
#endif
  for (; i < n; ++i) {
    const float v = x[i];
    to[kept] = v;
    kept += v > low && v <= high;
  }
  return kept;
}

// The budget-th largest number, 1 <= budget <= n; *above is how many are larger. Halves the range
// of values, at first between the smallest and the largest number, and now and then drops the
// candidates outside it.
float threshold_of(const float* scores, int64_t n, int64_t budget, float* scratch,
                   int64_t* above) {
  float high = -INF, low = INF;
  F tops = set1(-INF), bottoms = set1(INF);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F x = load(scores + i);
    tops = max(tops, x);
    bottoms = min(bottoms, x);
  }
  high = largest(tops);
  low = -largest(zero() - bottoms);
  for (; i < n; ++i) {
    high = scores[i] > high ? scores[i] : high;
    low = scores[i] < low ? scores[i] : low;
  }
  // The answer is in (low, high]: below every number, in the order of floats, comes the next one.
  int32_t low_rank = rank_of(low), high_rank = rank_of(high);
  if (low_rank > rank_of(-INF)) --low_rank;
  const float* x = scores;
  int64_t left = n, beyond = 0;  // `beyond`: numbers above every candidate
  *above = 0;
  for (int step = 1; static_cast<int64_t>(high_rank) - low_rank > 1; ++step) {
    low = of_rank(low_rank);
    high = of_rank(high_rank);
    const int64_t middle_rank = (static_cast<int64_t>(low_rank) + high_rank) >> 1;
    int32_t at = static_cast<int32_t>(middle_rank);
    if (step <= 12) {
      const float middle = 0.5f * low + 0.5f * high;
      if (middle > low && middle < high) at = rank_of(middle);
    }
    const int64_t count = beyond + count_above(x, left, of_rank(at));
    if (count >= budget) {
      low_rank = at;
    } else {
      high_rank = at;
      *above = count;
    }
    if (step % 3 == 0 && left > 4 * W) {
      left = take_between(x, left, of_rank(low_rank), of_rank(high_rank), scratch);
      x = scratch;
      beyond = *above;
    }
  }
  return of_rank(high_rank);
}

int64_t select(float* scores, int64_t n, int64_t budget, const int32_t* list, int32_t* positions,
               float* scratch) {
  int64_t above = 0;
  const float limit = threshold_of(scores, n, budget, scratch, &above);
  int64_t equal = budget - above, kept = 0, i = 0;  // so many of those equal to the limit
#if SL_AVX512
  const __m512 bound = _mm512_set1_ps(limit);
  __m512i where = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + W <= n; i += W) {
    const __m512 v = _mm512_loadu_ps(scores + i);
    __mmask16 in = _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ);
    __mmask16 ties = _mm512_cmp_ps_mask(v, bound, _CMP_EQ_OQ);
    if (__builtin_expect(ties != 0, 0))
      for (; ties && equal > 0; ties &= static_cast<__mmask16>(ties - 1), --equal)
        in |= static_cast<__mmask16>(ties & -ties);
    if (in) {
      const int count = __builtin_popcount(in);
      const __m512i at = list ? _mm512_loadu_si512(list + i) : where;
      _mm512_mask_storeu_ps(scores + kept, first(count), _mm512_maskz_compress_ps(in, v));
      _mm512_mask_storeu_epi32(positions + kept, first(count),
                               _mm512_maskz_compress_epi32(in, at));
      kept += count;
    }
    where = _mm512_add_epi32(where, _mm512_set1_epi32(W));
  }
#elif SL_AVX2
  const __m256 bound = _mm256_set1_ps(limit);
  __m256i where = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + W <= n; i += W) {
    const F v = load(scores + i);
    unsigned in = set_of(_mm256_cmp_ps(v.v, bound, _CMP_GT_OQ));
    unsigned ties = set_of(_mm256_cmp_ps(v.v, bound, _CMP_EQ_OQ));
    for (; ties && equal > 0; ties &= ties - 1, --equal) in |= ties & -ties;
    // Whole vectors: never beyond what has been read of this row.
    store(scores + kept, packed(v, in));
    store8(positions + kept, packed(list ? load8(list + i) : where, in));
    kept += __builtin_popcount(in);
    where = _mm256_add_epi32(where, _mm256_set1_epi32(W));
  }
#endif
  for (; i < n; ++i) {
    const float v = scores[i];
    const bool tie = v == limit && equal > 0;
    if (v > limit || tie) {
      equal -= tie;
      scores[kept] = v;
      positions[kept++] = list ? list[i] : static_cast<int32_t>(i);
    }
  }
  return kept;
}

// ---------------------------------------------------------------- conversions

template <class T>
void widen_from(const void* from, int64_t n, float* to) {
  const T* p = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(p[i]);
}

void widen(Element element, const void* from, int64_t n, float* to) {
  if (element == Element::bf16) widen_from<Bf16>(from, n, to);
  else if (element == Element::f16) widen_from<Fp16>(from, n, to);
  else widen_from<float>(from, n, to);
}

template <class T>
void narrow_to(const float* from, int64_t n, void* to) {
  T* p = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) from_float(from[i], p[i]);
}

void narrow(Element element, const float* from, int64_t n, void* to) {
  if (element == Element::bf16) narrow_to<Bf16>(from, n, to);
  else if (element == Element::f16) narrow_to<Fp16>(from, n, to);
  else narrow_to<float>(from, n, to);
}

}  // namespace

extern const RowKernels decode_rows = {compact, accumulate, weigh, finish, select, widen, narrow};

}  // namespace sparseloom::SL_TIER
