// Hidden states to codes of q and k: quantise, multiply, rotate, quantise again.
#pragma once

#include "product.hpp"

namespace sparseloom::SL_TIER {

// Keeps a compiler from fusing a product into a sum: the reference rounds in between.
SL_INLINE F rounded(F a) {
#if SL_AVX2
  asm("" : "+v"(a.v));
#elif defined(__x86_64__)
  asm("" : "+x"(a.v));
#elif defined(__aarch64__)
  asm("" : "+w"(a.v));
#endif
  return a;
}

// The nearest integers of n numbers in [-127, 127], ties to even, as bytes exclusive-or `flip`.
SL_INLINE void store_codes(int8_t* p, F a, int n, int8_t flip) {
  int8_t wide[W];
#if SL_AVX512
  const __m128i codes = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)),
                                      _mm_set1_epi8(flip));
  if (n == W) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    return;
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(wide), codes);
#elif SL_AVX2
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i codes = _mm_xor_si128(_mm_packs_epi16(half, half), _mm_set1_epi8(flip));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(wide), codes);
#else
  float shifted[W];
  store(shifted, a + set1(12582912.0f));
  for (int i = 0; i < W; ++i)
    wide[i] = static_cast<int8_t>(static_cast<int32_t>(to_bits(shifted[i]) - 0x4b400000u) ^ flip);
#endif
  memcpy(p, wide, static_cast<size_t>(n));
}

SL_INLINE F to_floats(const int32_t* p, int n) {
#if SL_AVX512
  return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(first(n), p))};
#elif SL_AVX2
  return {_mm256_cvtepi32_ps(n == W ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                    : _mm256_maskload_epi32(p, first(n)))};
#else
  F a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = static_cast<float>(p[i]);
  return a;
#endif
}

SL_INLINE int lanes(long left) { return left < W ? static_cast<int>(left) : W; }
constexpr float INFINITE = __builtin_inff();
// 1 where a number is +inf or NaN, else 0 (-inf becomes the lowest code).
SL_INLINE F odd(F a) { return where_less(a, set1(INFINITE), zero(), set1(1.0f)); }
SL_INLINE F clamp(F a, F most) { return min(max(a, zero() - most), most); }

template <class T>
static F quantise_row(const T* x, const EncodeArgs& args, int8_t* codes) {
  const F scale = set1(args.input_scale), most = set1(args.most);
  F bad = zero();
  for (long i = 0; i < args.hidden_size; i += W) {
    const int n = lanes(args.hidden_size - i);
    const F value = (n == W ? load(x + i) : load_n(x + i, n)) / scale;
    bad = bad + odd(value);
    store_codes(codes + i, clamp(value, most), n, BIAS);
  }
  return bad;
}

// Scale of least squared error for codes -1, 0, 1 (`quantize.py`, `_best_ternary`).
static float ternary_scale(const float* low, long width, float top) {
  float* sorted = static_cast<float*>(__builtin_alloca(static_cast<size_t>(width) * sizeof(float)));
  for (long i = 0; i < width; ++i) {
    const float size = __builtin_fabsf(low[i] / top);
    long at = i;
    for (; at > 0 && sorted[at - 1] < size; --at) sorted[at] = sorted[at - 1];
    sorted[at] = size;
  }
  double sum = 0;
  float best = -1, chosen = 0;
  for (long n = 1; n <= width; ++n) {
    sum += static_cast<double>(sorted[n - 1]);
    const float total = static_cast<float>(sum), count = static_cast<float>(n);
    const float square = rounded(set1(total * total)).v[0];
    const float gain = square / count;
    if (gain > best) {
      best = gain;
      chosen = total / count;
    }
  }
  const float scale = chosen * top;
  return scale > 0 ? scale : top;
}

static void rotate(float* low, long pairs, const float* cosines, const float* sines,
                   const int64_t* chosen) {
  for (long j = 0; j < pairs; ++j) {
    const F c = set1(cosines[chosen[j]]), s = set1(sines[chosen[j]]);
    const F a = set1(low[j]), b = set1(low[pairs + j]);
    float first[W], second[W];
    store(first, rounded(a * c) - rounded(b * s));
    store(second, rounded(b * c) + rounded(a * s));
    low[j] = first[0];
    low[pairs + j] = second[0];
  }
}

static bool encode_rows(const EncodeArgs& args, long b, long first_row, long count, int8_t* codes,
                        int32_t* products, float* low) {
  F bad = zero();
  for (long r = 0; r < count; ++r) {
    const long at = b * args.batch_stride + (first_row + r) * args.row_stride;
    int8_t* to = codes + r * args.depth;
    if (args.dtype == 0) bad = bad + quantise_row(static_cast<const float*>(args.hidden) + at, args, to);
    else if (args.dtype == 1) bad = bad + quantise_row(static_cast<const Bf16*>(args.hidden) + at, args, to);
    else bad = bad + quantise_row(static_cast<const Fp16*>(args.hidden) + at, args, to);
  }
  product(codes, args.depth, args.weights, args.sums, args.columns / PANEL, products, args.columns);
  const long width = args.width, half = args.heads * width;
  const F most = set1(args.most);
  for (long r = 0; r < count; ++r) {
    const long l = first_row + r;
    for (long c = 0; c < 2 * half; c += W) {
      const int n = lanes(2 * half - c);
      store_n(low + c, to_floats(products + r * args.columns + c, n) * load_n(args.scale + c, n), n);
    }
    if (args.cos) {
      const long at = b * args.rotary_batch_stride + l * args.rotary_row_stride;
      for (long g = 0; g < 2 * args.heads; ++g)
        rotate(low + g * width, args.pairs, args.cos + at, args.sin + at, args.chosen);
    }
    for (long h = 0; h < args.heads; ++h) {
      const long place = (b * args.heads + h) * args.length + l;
      const float *q = low + h * width, *k = low + half + h * width;
      F top = zero();
      for (long i = 0; i < width; i += W) {
        const F size = abs(load_n(q + i, lanes(width - i)));
        bad = bad + odd(size) + odd(abs(load_n(k + i, lanes(width - i))));
        top = max(top, size);
      }
      float scale = largest(top) / args.most;
      if (!(scale > 0)) scale = 1;
      if (args.bits == 2) scale = ternary_scale(q, width, scale);
      args.q_scale[place] = scale * args.unit;
      const F q_scale = set1(scale), k_scale = set1(args.key_scale[h]);
      for (long i = 0; i < width; i += W) {
        const int n = lanes(width - i);
        store_codes(args.q + place * width + i, clamp(load_n(q + i, n) / q_scale, most), n, 0);
        store_codes(args.k + place * width + i, clamp(load_n(k + i, n) / k_scale, most), n, 0);
      }
    }
  }
  return sum(bad) == 0.0f;
}

}  // namespace sparseloom::SL_TIER
