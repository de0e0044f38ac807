// Means over segments of keys, which stand for them under a mask with runs of means.
#pragma once

#include "dense/mask.hpp"
#include "simd.hpp"

namespace sparseloom::SL_TIER::dense {

// A chunk of MASK_KEYS segments of 2^log2 keys. Segments behind the last key have none.
struct Segments {
  int log2;
  int64_t first, end;     // key of the first segment, keys of the call
  const uint8_t* attend;  // of the batch entry, or null

  Segments(const DenseArgs& a, int64_t batch, const Places& places, int64_t place)
      : log2(places.log2(place)),
        first((place - places.first[log2]) * MASK_KEYS << log2),
        end(a.kv_len),
        attend(a.attend ? a.attend + batch * a.kv_len : nullptr) {}

  int64_t key(int64_t segment) const { return first + (segment << log2); }

  // Keys of a segment that are there and not padding.
  int count(int64_t segment) const {
    const int64_t begin = key(segment), size = int64_t{1} << log2;
    const int64_t live = end - begin < size ? end - begin : size;
    if (live <= 0) return 0;
    if (!attend) return static_cast<int>(live);
    int count = 0;
    for (int64_t j = begin; j < begin + live; ++j) count += attend[j] != 0;
    return count;
  }
};

// What the weight of each segment, log2 of its keys, lacks to that of a whole one: 0 or less, -inf
// where there are none. Returns whether some segment has keys.
static inline bool missing_weights(const Segments& s, float* missing) {
  bool some = false;
  for (int i = 0; i < MASK_KEYS; ++i) {
    const int count = s.count(i);
    some = some || count > 0;
    missing[i] = count == 1 << s.log2 ? 0.0f
                 : count == 0         ? -__builtin_inff()
                                      : __builtin_log2f(static_cast<float>(count)) -
                                            static_cast<float>(s.log2);
  }
  return some;
}

// out[segment * stride + d], d < dim: the means of rows, whose first is that of key 0; 0 where there
// are no keys. Rows of padding are not read.
template <class T, class Out>
static inline void pool_rows(const Segments& s, const T* rows, int64_t row, int64_t dim, Out* out,
                             int64_t stride) {
  for (int i = 0; i < MASK_KEYS; ++i) {
    const int count = s.count(i), size = 1 << s.log2;
    const T* live[1 << (LOG2S - 1)];
    if (count == size) {
      for (int j = 0; j < size; ++j) live[j] = rows + (s.key(i) + j) * row;
    } else {
      for (int64_t j = s.key(i), n = 0; n < count; ++j)
        if (!s.attend || s.attend[j]) live[n++] = rows + j * row;
    }
    const F share = set1(count ? 1.0f / static_cast<float>(count) : 0.0f);
    Out* to = out + i * stride;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      F sum = zero();
      for (int j = 0; j < count; ++j) sum = sum + load(live[j] + d);
      store(to + d, sum * share);
    }
    if (d < dim) {
      F sum = zero();
      for (int j = 0; j < count; ++j) sum = sum + load_n(live[j] + d, static_cast<int>(dim - d));
      store_n(to + d, sum * share, static_cast<int>(dim - d));
    }
  }
}

}  // namespace sparseloom::SL_TIER::dense
