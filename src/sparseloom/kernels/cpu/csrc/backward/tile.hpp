// Gradients from one tile of R query rows: the scores are made again from the log-sum-exp.
//
//   P = exp(S - lse)    dP = dO Vᵀ ∘ drop + dKeyImportance    dS = P ∘ (dP - δ) · scale
//   dQ += dS K          dK += dSᵀ Q                           dV += (P ∘ drop)ᵀ dO
//
// with δ the row sum of P ∘ dP, which is dO · out where no importance is differentiated.
#pragma once

#include "backward.hpp"
#include "keys.hpp"
#include "products.hpp"

namespace sparseloom::SL_TIER {

// What lies together for each key, so that a key costs one entry of the TLB: its row of K, of V, of
// dK and of dV. One line is left free between keys: power-of-two distances share few cache sets.
struct Record {
  int value, grad_key, grad_value;
  int64_t size;

  explicit Record(const BackwardCall& c)
      : value(static_cast<int>(c.key_width)),
        grad_key(static_cast<int>(c.key_width + c.value_width)),
        grad_value(static_cast<int>(2 * c.key_width + c.value_width)),
        size(backward_record_floats(c)) {}
};

// One head of one item, everything in fp32.
struct Head {
  float* records;                   // of the keys from first_key on: see Record
  int64_t first_key;
  float* grad_query;                // row 0 of the head; stride: the key width
  const float *lse2, *delta;        // by row; lse2 is +inf where a row has no key
  const float* grad_key_importance; // by key, or null
  const uint8_t* padding;
  int64_t b, h;
};

// The rows of a tile, whole: rows past the end are 0.
struct Rows {
  const float *query, *grad_out;
  int query_stride, grad_out_stride;
  float* grad_query;  // stride: the key width
};

// What lies behind BackwardScratch.tile.
struct Buffers {
  float *query, *grad_query, *grad_out;   // rows that cannot be used in place
  float *packed_query, *packed_grad_out;
  float *p, *ds, *drop, *bias;            // by key and row
  float *lse2, *delta;
  int32_t* keys;
  float* records[BACKWARD_CHUNK];         // of the keys

  Buffers(float* at, int64_t key_width, int64_t value_width) {
    const auto take = [&at](int64_t n) { float* p = at; at += n; return p; };
    query = take(BACKWARD_ROWS * key_width);
    grad_query = take(BACKWARD_ROWS * key_width);
    packed_query = take(BACKWARD_ROWS * key_width);
    grad_out = take(BACKWARD_ROWS * value_width);
    packed_grad_out = take(BACKWARD_ROWS * value_width);
    p = take(BACKWARD_ROWS * BACKWARD_CHUNK);
    ds = take(BACKWARD_ROWS * BACKWARD_CHUNK);
    drop = take(BACKWARD_ROWS * BACKWARD_CHUNK);
    bias = take(BACKWARD_ROWS * BACKWARD_CHUNK);
    lse2 = take(BACKWARD_ROWS);
    delta = take(BACKWARD_ROWS);
    keys = reinterpret_cast<int32_t*>(take(2 * BACKWARD_CHUNK));
  }
};

// Key j is seen by the rows i >= j - shift: the scores of the others become -inf.
template <int R>
SL_INLINE void hide_later_keys(float* s, const int32_t* keys, int n, int64_t row0, int64_t shift) {
  for (int k = n - 1; k >= 0 && keys[k] > row0 + shift; --k) {
    const int64_t hidden = keys[k] - shift - row0;
    for (int r = 0; r < R && r < hidden; ++r) s[k * R + r] = -__builtin_inff();
  }
}

// The next keys and their records, the last one repeated up to a whole vector of scores.
template <int R>
SL_INLINE int next_keys(KeyStream& stream, const Head& head, int64_t size, Buffers& buffer) {
  const int n = stream.fill(buffer.keys, BACKWARD_CHUNK);
  for (int k = 0; k < n; ++k)
    buffer.records[k] = head.records + (buffer.keys[k] - head.first_key) * size;
  if constexpr (R < W)
    for (int k = n; n > 0 && k % (W / R) != 0; ++k) buffer.records[k] = buffer.records[n - 1];
  return n;
}

template <int R>
SL_INLINE void tile_scores(const BackwardCall& c, Buffers& buffer, int n, int64_t row0) {
  score_keys<R>(buffer.packed_query, buffer.records, 0, n, static_cast<int>(c.key_width), buffer.p);
  if (c.causal) hide_later_keys<R>(buffer.p, buffer.keys, n, row0, c.kv_len - c.q_len);
}

// From the scores in `p` and dO Vᵀ in `ds` to P ∘ drop in `p` and dS in `ds`.
template <int R, bool Extras>
SL_INLINE void differentiate_softmax(const BackwardCall& c, Buffers& buffer, int n) {
  const F lse2 = repeat<R>(buffer.lse2), delta = repeat<R>(buffer.delta);
  const F scale = set1(c.scale), scale2 = set1(c.scale * LOG2E);
  for (int at = 0; at < n * R; at += W) {
    const F p = exp2(load(buffer.p + at) * scale2 - lse2);
    F dropped = p, dp = load(buffer.ds + at);
    if constexpr (Extras) {
      const F drop = load(buffer.drop + at);
      dropped = p * drop;
      dp = fma(dp, drop, load(buffer.bias + at));
    }
    store(buffer.p + at, dropped);
    store(buffer.ds + at, p * (dp - delta) * scale);
  }
}

template <int R>
SL_INLINE void fill_extras(const BackwardCall& c, const Head& head, Buffers& buffer, int n,
                           int64_t row0) {
  const int whole = (n * R + W - 1) / W * W;
  for (int i = 0; i < whole; ++i) buffer.drop[i] = 1.0f, buffer.bias[i] = 0.0f;
  if (c.dropped) {
    const auto u = [](int64_t x) { return static_cast<uint64_t>(x); };
    const uint64_t row = dropout_row(u(head.b), u(head.h), u(c.heads), u(row0), u(c.q_len), u(c.kv_len));
    dropout_tile<R>(c.drop, row, u(c.kv_len), buffer.keys, n, buffer.drop);
  }
  if (head.grad_key_importance)
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < R; ++r) buffer.bias[k * R + r] = head.grad_key_importance[buffer.keys[k]];
}

template <int R>
SL_INLINE void load_row_sums(const Head& head, Buffers& buffer, int64_t row0, int rows) {
  for (int r = 0; r < R; ++r) {
    buffer.lse2[r] = r < rows ? head.lse2[row0 + r] : __builtin_inff();
    buffer.delta[r] = r < rows ? head.delta[row0 + r] : 0.0f;
  }
}

template <int R>
static void tile_gradients(const BackwardCall& c, const Head& head, const Rows& tile,
                           Buffers& buffer, int64_t row0, int rows, KeyStream stream) {
  const int key_width = static_cast<int>(c.key_width), value_width = static_cast<int>(c.value_width);
  const Record record(c);
  int n = next_keys<R>(stream, head, record.size, buffer);
  if (n == 0) return;
  load_row_sums<R>(head, buffer, row0, rows);
  rows_to_lanes<R>(tile.query, tile.query_stride, key_width, buffer.packed_query);
  rows_to_lanes<R>(tile.grad_out, tile.grad_out_stride, value_width, buffer.packed_grad_out);
  for (; n > 0; n = next_keys<R>(stream, head, record.size, buffer)) {
    float* const* keys = buffer.records;
    score_keys<R>(buffer.packed_grad_out, keys, record.value, n, value_width, buffer.ds);
    tile_scores<R>(c, buffer, n, row0);
    if (c.dropped || head.grad_key_importance) {
      fill_extras<R>(c, head, buffer, n, row0);
      differentiate_softmax<R, true>(c, buffer, n);
    } else {
      differentiate_softmax<R, false>(c, buffer, n);
    }
    add_values<R>(buffer.ds, keys, n, key_width, tile.grad_query, key_width);
    scatter<R>(buffer.ds, tile.query, tile.query_stride, keys, record.grad_key, n, key_width);
    scatter<R>(buffer.p, tile.grad_out, tile.grad_out_stride, keys, record.grad_value, n, value_width);
  }
}

// delta[i] += Σ_j P[i, j] dKeyImportance[j]: it needs the probabilities of whole rows.
template <int R>
static void tile_importance(const BackwardCall& c, const Head& head, const Rows& tile,
                            Buffers& buffer, int64_t row0, int rows, KeyStream stream,
                            float* delta) {
  load_row_sums<R>(head, buffer, row0, rows);
  rows_to_lanes<R>(tile.query, tile.query_stride, static_cast<int>(c.key_width), buffer.packed_query);
  for (int n; (n = next_keys<R>(stream, head, Record(c).size, buffer)) > 0;) {
    tile_scores<R>(c, buffer, n, row0);
    const F lse2 = repeat<R>(buffer.lse2), scale2 = set1(c.scale * LOG2E);
    for (int at = 0; at < n * R; at += W)
      store(buffer.p + at, exp2(load(buffer.p + at) * scale2 - lse2));
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < rows; ++r)
        delta[row0 + r] += buffer.p[k * R + r] * head.grad_key_importance[buffer.keys[k]];
  }
}

}  // namespace sparseloom::SL_TIER
