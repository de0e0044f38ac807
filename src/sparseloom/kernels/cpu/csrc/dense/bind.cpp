#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "dense/runs.hpp"

namespace nb = nanobind;

namespace sparseloom {
namespace {

// Address, and the strides of batch, head and row.
using PyView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

DenseView view(const PyView& v) {
  return {reinterpret_cast<const void*>(std::get<0>(v)), std::get<1>(v), std::get<2>(v),
          std::get<3>(v)};
}

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Mask {
  const Run* runs;
  const int64_t* offsets;
  int64_t batch, heads;
};

int64_t query_blocks(int64_t q_len) { return (q_len + MASK_QUERIES - 1) / MASK_QUERIES; }

void forward(int type, const PyView& query, const PyView& key, const PyView& value, uintptr_t out,
             int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len,
             int64_t head_dim, int64_t value_dim, uintptr_t key_padding, bool causal, float scale,
             uintptr_t lse, uintptr_t columns, uintptr_t magnitude, int threads, const Mask& mask) {
  const DenseArgs args{view(query), view(key), view(value), pointer<void>(out),
                       pointer<float>(lse), pointer<float>(columns), pointer<float>(magnitude),
                       pointer<const uint8_t>(key_padding), batch, heads, kv_heads, q_len, kv_len,
                       head_dim, value_dim, scale, causal, mask.runs, mask.offsets, mask.batch,
                       mask.heads, 0};
  const nb::gil_scoped_release release;
  dense_forward(args, static_cast<DenseType>(type), threads);
}

}  // namespace

void bind_dense(nb::module_& m) {
  m.def("dense_forward",
        [](int type, PyView query, PyView key, PyView value, uintptr_t out, int64_t batch,
           int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len, int64_t head_dim,
           int64_t value_dim, uintptr_t key_padding, bool causal, float scale, uintptr_t lse,
           uintptr_t columns, uintptr_t magnitude, int threads) {
          forward(type, query, key, value, out, batch, heads, kv_heads, q_len, kv_len, head_dim,
                  value_dim, key_padding, causal, scale, lse, columns, magnitude, threads, {});
        });
  m.def("dense_tiles_forward",
        [](int type, PyView query, PyView key, PyView value, uintptr_t out, int64_t batch,
           int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len, int64_t head_dim,
           int64_t value_dim, uintptr_t key_padding, bool causal, float scale, uintptr_t lse,
           int threads, uintptr_t indices, uintptr_t offsets, int64_t mask_batch,
           int64_t mask_heads) {
          const RunList list(pointer<const int32_t>(indices), pointer<const int64_t>(offsets),
                             mask_batch * mask_heads, query_blocks(q_len));
          forward(type, query, key, value, out, batch, heads, kv_heads, q_len, kv_len, head_dim,
                  value_dim, key_padding, causal, scale, lse, 0, 0, threads,
                  {list.runs.data(), list.offsets.data(), mask_batch, mask_heads});
        });
  // Runs of every mask head, three numbers each (see Run); shared by the batch.
  m.def("dense_runs_forward",
        [](int type, PyView query, PyView key, PyView value, uintptr_t out, int64_t batch,
           int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len, int64_t head_dim,
           int64_t value_dim, uintptr_t key_padding, bool causal, float scale, uintptr_t lse,
           int threads, uintptr_t runs, uintptr_t offsets, int64_t mask_heads) {
          forward(type, query, key, value, out, batch, heads, kv_heads, q_len, kv_len, head_dim,
                  value_dim, key_padding, causal, scale, lse, 0, 0, threads,
                  {pointer<const Run>(runs), pointer<const int64_t>(offsets), 1, mask_heads});
        });
}

}  // namespace sparseloom
