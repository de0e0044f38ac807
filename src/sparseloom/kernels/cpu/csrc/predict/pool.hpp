// Scores of a block's rows to one score per key (`methods/pooling.py` has the rules).
#pragma once

#include "encode.hpp"

namespace sparseloom::SL_TIER {

SL_INLINE long attended_before(const KeyMap& map, long key) { return map.before ? map.before[key] : key; }

// Attended keys that query `row` may see.
SL_INLINE long seen(const SelectArgs& args, const KeyMap& map, long row) {
  if (!args.causal) return map.count;
  long keys = row + 1 + args.kv_len - args.q_len;
  keys = keys < 0 ? 0 : keys > args.kv_len ? args.kv_len : keys;
  return attended_before(map, keys);
}

SL_INLINE int32_t largest_of(const int32_t* x, long n) {
  int32_t top = INT32_MIN;
  for (long i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// to[j] += softmax over the first n scores, all times `scale`. `x` is overwritten.
static void add_mass(int32_t* x, long n, float scale, float* to) {
  auto* e = reinterpret_cast<float*>(x);
  const F unit = set1(scale * LOG2E), top = set1(static_cast<float>(largest_of(x, n)) * scale * LOG2E);
  F total = zero();
  for (long j = 0; j < n; j += W) {
    const int m = lanes(n - j);
    const F value = exp2(to_floats(x + j, m) * unit - top);
    store_n(e + j, value, m);
    total = total + load_n(e + j, m);
  }
  const F share = set1(1.0f / sum(total));
  for (long j = 0; j < n; j += W) {
    const int m = lanes(n - j);
    store_n(to + j, fma(load_n(e + j, m), share, load_n(to + j, m)), m);
  }
}

// to[j] = max(to[j], the score minus the row's largest, in standard deviations of the row).
static void raise_to_row(const int32_t* x, long n, float scale, float* to) {
  int64_t total = 0;
  for (long j = 0; j < n; ++j) total += x[j];
  const float mean = static_cast<float>(static_cast<double>(total) / static_cast<double>(n));
  F squares = zero();
  for (long j = 0; j < n; j += W) {
    const int m = lanes(n - j);
    float some[W] = {};
    store_n(some, to_floats(x + j, m) - set1(mean), m);
    const F centred = load(some);
    squares = fma(centred, centred, squares);
  }
  const float deviation = __builtin_sqrtf(sum(squares) / static_cast<float>(n));
  // The scale of a row cancels, but for rows whose scores are all the same.
  const float floor = 1.17549435e-38f / (scale > 0 ? scale : 1.0f);
  const F unit = set1(1.0f / (deviation > floor ? deviation : floor));
  const F top = set1(static_cast<float>(largest_of(x, n)));
  for (long j = 0; j < n; j += W) {
    const int m = lanes(n - j);
    const F below = (to_floats(x + j, m) - top) * unit;
    store_n(to + j, max(load_n(to + j, m), below), m);
  }
}

static void add_scaled(const int32_t* x, long n, float scale, float* to) {
  for (long j = 0; j < n; j += W) {
    const int m = lanes(n - j);
    store_n(to + j, fma(to_floats(x + j, m), set1(scale), load_n(to + j, m)), m);
  }
}

// Smallest integer whose score reaches the level; INT32_MAX if none does.
SL_INLINE int32_t first_reaching(float level, float scale, float bound) {
  const float about = level / scale;
  if (!(about < bound)) return INT32_MAX;  // also where level is NaN
  if (about < -bound) return INT32_MIN;
  int32_t d = static_cast<int32_t>(about) - 2;
  while (static_cast<float>(d) * scale < level) ++d;
  return d;
}

// Numbers as integers that compare alike.
SL_INLINE int32_t ordered(float x) {
  const int32_t bits = static_cast<int32_t>(to_bits(x + 0.0f));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

static void order(float* x, long n) {
  for (long i = 0; i < n; ++i) {
    const int32_t rank = ordered(x[i]);
    memcpy(x + i, &rank, sizeof rank);
  }
}

}  // namespace sparseloom::SL_TIER
