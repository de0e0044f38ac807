// One item: some query blocks of the heads that share a key head, one range of keys after another.
#include "backward.hpp"
#include "tile.hpp"

namespace sparseloom::SL_TIER {
namespace {

// ------------------------------------------------------------ rows of any type, as fp32

template <class T>
void widen_typed(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to, int64_t width) {
  const F one = set1(1.0f);
  for (int64_t i = 0; i < rows; ++i)
    widen_row(from + i * stride, to + i * width, static_cast<int>(dim), static_cast<int>(width), one);
}

// Rows of `width` floats from rows of `dim` elements, zeros behind them.
void widen(const BackwardTensor& t, int64_t offset, int64_t rows, int64_t dim, float* to,
           int64_t width) {
  const View& v = t.view;
  switch (t.type) {
    case Type::fp32: return widen_typed(static_cast<const float*>(v.data) + offset, v.row, rows, dim, to, width);
    case Type::bf16: return widen_typed(static_cast<const Bf16*>(v.data) + offset, v.row, rows, dim, to, width);
    case Type::fp16: return widen_typed(static_cast<const Fp16*>(v.data) + offset, v.row, rows, dim, to, width);
  }
}

template <class T>
void finish_typed(const float* parts, int64_t count, int64_t distance, int64_t rows, int64_t width,
                  int64_t dim, T* out) {
  for (int64_t i = 0; i < rows; ++i, parts += width, out += dim)
    for (int64_t d = 0; d < dim; d += W) {
      F sum = load(parts + d);
      for (int64_t k = 1; k < count; ++k) sum = sum + load(parts + k * distance + d);
      if (d + W <= dim) store(out + d, sum);
      else store_n(out + d, sum, static_cast<int>(dim - d));
    }
}

void finish(const float* parts, int64_t count, int64_t distance, int64_t rows, int64_t width,
            int64_t dim, Type type, void* out) {
  switch (type) {
    case Type::fp32: return finish_typed(parts, count, distance, rows, width, dim, static_cast<float*>(out));
    case Type::bf16: return finish_typed(parts, count, distance, rows, width, dim, static_cast<Bf16*>(out));
    case Type::fp16: return finish_typed(parts, count, distance, rows, width, dim, static_cast<Fp16*>(out));
  }
}

// ------------------------------------------------------------ one head

constexpr int64_t MOST_STRIDE = 1 << 24;  // W of them must not overflow an int

struct Run {
  const BackwardCall& c;
  const BackwardItem& item;
  const BackwardScratch& scratch;
  Buffers buffer;
  Head head;
  int64_t group_head;  // among the heads that share the key head
  const int64_t* offsets;

  Run(const BackwardCall& c, const BackwardItem& item, const BackwardScratch& scratch)
      : c(c), item(item), scratch(scratch), buffer(scratch.tile, c.key_width, c.value_width) {}

  static int64_t at(const BackwardTensor& t, int64_t b, int64_t h) {
    return b * t.view.batch + h * t.view.head;
  }

  void set_keys() {
    head.records = scratch.records;
    head.padding = c.key_padding ? c.key_padding + item.b * c.kv_len : nullptr;
    head.b = item.b;
  }

  // The keys [k0, k1) and what was summed for them so far.
  void load_keys(int64_t k0, int64_t k1, bool first_head) {
    const Record record(c);
    head.first_key = k0;
    const int64_t key = at(c.key, item.b, item.kv_head), value = at(c.value, item.b, item.kv_head);
    float* to = scratch.records;
    for (int64_t k = k0; k < k1; ++k, to += record.size) {
      widen(c.key, key + k * c.key.view.row, 1, c.head_dim, to, c.key_width);
      widen(c.value, value + k * c.value.view.row, 1, c.value_dim, to + record.value, c.value_width);
      if (first_head) {
        for (int64_t d = record.grad_key; d + W <= record.size; d += W) store(to + d, zero());
      } else {
        copy(item.grad_key + k * c.key_width, to + record.grad_key, c.key_width);
        copy(item.grad_value + k * c.value_width, to + record.grad_value, c.value_width);
      }
    }
  }

  void store_keys(int64_t k0, int64_t k1) {
    const Record record(c);
    const float* from = scratch.records;
    for (int64_t k = k0; k < k1; ++k, from += record.size) {
      copy(from + record.grad_key, item.grad_key + k * c.key_width, c.key_width);
      copy(from + record.grad_value, item.grad_value + k * c.value_width, c.value_width);
    }
  }

  static void copy(const float* from, float* to, int64_t width) {
    for (int64_t d = 0; d < width; d += W) store(to + d, load(from + d));
  }

  void set_head(int64_t h) {
    head.h = h;
    head.lse2 = scratch.lse2, head.delta = scratch.delta;
    head.grad_query = scratch.grad_query
                          ? scratch.grad_query
                          : static_cast<float*>(c.grad_query) + (item.b * c.heads + h) * c.q_len * c.head_dim;
    head.grad_key_importance =
        c.grad_key_importance ? c.grad_key_importance + (item.b * c.heads + h) * c.kv_len : nullptr;
    const int64_t mask_head = (c.mask_batch == 1 ? 0 : item.b) * c.mask_heads + h * c.mask_heads / c.heads;
    offsets = c.offsets ? c.offsets + mask_head * (c.q_blocks + 1) : nullptr;
  }

  // Row sums of the rows [first, last): lse in base 2, and δ.
  void row_sums(int64_t first, int64_t last) {
    const int64_t row = (item.b * c.heads + head.h) * c.q_len;
    for (int64_t i = first; i < last; ++i) {
      const float lse = c.lse[row + i];
      const bool empty = lse == -__builtin_inff();
      scratch.lse2[i] = empty ? __builtin_inff() : lse * LOG2E;
      const float* out = widened(c.out, i, 1, 1, c.value_dim, c.value_width, buffer.packed_grad_out).rows;
      const float* grad = widened(c.grad_out, i, 1, 1, c.value_dim, c.value_width, buffer.grad_out).rows;
      F sums = zero();
      for (int64_t d = 0; d < c.value_width; d += W) sums = fma(load(out + d), load(grad + d), sums);
      scratch.delta[i] = sum(sums) - (c.grad_lse && !empty ? c.grad_lse[row + i] : 0.0f);
    }
  }

  struct Widened { const float* rows; int stride; };

  // `wanted` rows from row i on, of which `there` exist: in place if they can be used so.
  Widened widened(const BackwardTensor& t, int64_t i, int there, int wanted, int64_t dim,
                  int64_t width, float* to) {
    const int64_t start = at(t, item.b, head.h) + i * t.view.row;
    if (t.type == Type::fp32 && dim == width && there == wanted && t.view.row < MOST_STRIDE)
      return {static_cast<const float*>(t.view.data) + start, static_cast<int>(t.view.row)};
    widen(t, start, there, dim, to, width);
    for (int64_t d = there * width; d < wanted * width; d += W) store(to + d, zero());
    return {to, static_cast<int>(width)};
  }

  // What tile rows [row0, row0 + rows) meet among the keys [k0, k1).
  KeyStream stream(int64_t row0, int rows, const int32_t* entry, const int32_t* end, int64_t k0,
                   int64_t k1) const {
    const int64_t seen = c.causal ? c.kv_len - c.q_len + row0 + rows : c.kv_len;
    const int64_t limit = seen < k1 ? seen : k1;
    if (c.offsets) return {entry, end, c.block_k, 0, 0, limit, head.padding};
    return {nullptr, nullptr, 1, k0, limit > k0 ? limit : k0, limit, head.padding};
  }

  template <int R>
  void tile(int64_t row0, int rows, const KeyStream& keys, bool importance) {
    Rows t;
    const auto query = widened(c.query, row0, rows, R, c.head_dim, c.key_width, buffer.query);
    t.query = query.rows, t.query_stride = query.stride;
    if (importance) {
      tile_importance<R>(c, head, t, buffer, row0, rows, keys, scratch.delta);
      return;
    }
    const auto grad = widened(c.grad_out, row0, rows, R, c.value_dim, c.value_width, buffer.grad_out);
    t.grad_out = grad.rows, t.grad_out_stride = grad.stride;
    float* out = head.grad_query + row0 * c.key_width;
    if (rows == R) {
      t.grad_query = out;
      tile_gradients<R>(c, head, t, buffer, row0, rows, keys);
      return;
    }
    t.grad_query = buffer.grad_query;
    for (int64_t d = 0; d < R * c.key_width; d += W)
      store(t.grad_query + d, d < rows * c.key_width ? load(out + d) : zero());
    tile_gradients<R>(c, head, t, buffer, row0, rows, keys);
    for (int64_t d = 0; d < rows * c.key_width; d += W) store(out + d, load(t.grad_query + d));
  }

  void tile_of(int64_t row0, int rows, const KeyStream& keys, bool importance) {
    if (rows == 1) return tile<1>(row0, rows, keys, importance);
    if (rows == 2) return tile<2>(row0, rows, keys, importance);
    if constexpr (W >= 8)
      if (rows > 4) {
        if constexpr (W >= 16)
          if (rows > 8) return tile<16>(row0, rows, keys, importance);
        return tile<8>(row0, rows, keys, importance);
      }
    return tile<4>(row0, rows, keys, importance);
  }

  // Query blocks [first, last) against the keys [k0, k1).
  void range(int64_t first, int64_t last, int64_t k0, int64_t k1, bool importance) {
    for (int64_t block = first; block < last; ++block) {
      const int32_t *entry = nullptr, *end = nullptr;
      if (c.offsets) {
        int64_t& cursor = scratch.cursor[block];
        const int64_t stop = offsets[block + 1], limit = (k1 + c.block_k - 1) / c.block_k;
        entry = c.indices + cursor;
        while (cursor + 16 <= stop && c.indices[cursor + 15] < limit) cursor += 16;
        while (cursor < stop && c.indices[cursor] < limit) ++cursor;
        end = c.indices + cursor;
        if (entry == end) continue;
      }
      if (block + 1 < last) prefetch_rows((block + 1) * c.block_q);
      const int64_t row_end = (block + 1) * c.block_q < c.q_len ? (block + 1) * c.block_q : c.q_len;
      for (int64_t row0 = block * c.block_q; row0 < row_end; row0 += W) {
        const int rows = row_end - row0 < W ? static_cast<int>(row_end - row0) : W;
        tile_of(row0, rows, stream(row0, rows, entry, end, k0, k1), importance);
      }
    }
  }

  // The rows of the tile after this one, which no loop has touched lately.
  void prefetch_rows(int64_t row0) const {
    const int64_t rows = c.block_q < W ? c.block_q : W;
    for (int64_t i = row0; i < row0 + rows && i < c.q_len; ++i) {
      prefetch_row(c.query, i, c.head_dim);
      prefetch_row(c.grad_out, i, c.value_dim);
      const float* sums = head.grad_query + i * c.key_width;
      for (int64_t d = 0; d < c.key_width; d += 16) prefetch(sums + d);
    }
  }

  void prefetch_row(const BackwardTensor& t, int64_t i, int64_t dim) const {
    const int64_t bytes = element_bytes(t.type), start = at(t, item.b, head.h) + i * t.view.row;
    const char* row = static_cast<const char*>(t.view.data) + start * bytes;
    for (int64_t byte = 0; byte < dim * bytes; byte += 64) prefetch(row + byte);
  }

  void rewind(int64_t first, int64_t last) {
    if (offsets) for (int64_t block = first; block < last; ++block) scratch.cursor[block] = offsets[block];
  }

  void clear_keys(int64_t k0, int64_t k1) {
    const auto keys = static_cast<size_t>(k1 - k0);
    memset(item.grad_key + k0 * c.key_width, 0, keys * static_cast<size_t>(c.key_width) * 4);
    memset(item.grad_value + k0 * c.value_width, 0, keys * static_cast<size_t>(c.value_width) * 4);
  }

  void one_head(int64_t h, int64_t first, int64_t last, bool first_head) {
    set_head(h);
    const int64_t row0 = first * c.block_q;
    const int64_t row1 = last * c.block_q < c.q_len ? last * c.block_q : c.q_len;
    row_sums(row0, row1);
    memset(head.grad_query + row0 * c.key_width, 0, static_cast<size_t>((row1 - row0) * c.key_width) * 4);
    for (int pass = head.grad_key_importance ? 0 : 1; pass < 2; ++pass) {
      rewind(first, last);
      for (int64_t k0 = 0; k0 < c.kv_len; k0 += c.keys_at_once) {
        const int64_t k1 = k0 + c.keys_at_once < c.kv_len ? k0 + c.keys_at_once : c.kv_len;
        load_keys(k0, k1, first_head);
        range(first, last, k0, k1, pass == 0);
        if (pass == 1) store_keys(k0, k1);
      }
    }
    if (scratch.grad_query) {
      const int64_t out = ((item.b * c.heads + h) * c.q_len + row0) * c.head_dim;
      finish(head.grad_query + row0 * c.key_width, 1, 0, row1 - row0, c.key_width, c.head_dim,
             c.query.type, static_cast<char*>(c.grad_query) + out * element_bytes(c.query.type));
    }
  }
};

void run(const BackwardCall& c, const BackwardItem& item, const BackwardScratch& scratch) {
  Run work(c, item, scratch);
  work.set_keys();
  const int64_t group = c.heads / c.kv_heads;
  bool first_head = true;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t first = item.first > g * c.q_blocks ? item.first - g * c.q_blocks : 0;
    const int64_t last = item.last < (g + 1) * c.q_blocks ? item.last - g * c.q_blocks : c.q_blocks;
    if (first >= last) continue;
    work.one_head(item.kv_head * group + g, first, last, first_head);
    first_head = false;
  }
  if (first_head) work.clear_keys(0, c.kv_len);
}

}  // namespace

extern const BackwardKernels backward_kernels = {W, run, finish};

}  // namespace sparseloom::SL_TIER
