#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "attention/forward.hpp"

namespace nb = nanobind;

namespace sparseloom {

void attention_forward(ForwardArgs args, int threads);

namespace {

// Address, and the strides of batch, head and row.
using PyView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

View view(const PyView& v) {
  return {reinterpret_cast<void*>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "attention_forward",
      [](int type, PyView query, PyView key, PyView value, PyView out, int batch, int heads,
         int kv_heads, int q_len, int kv_len, int head_dim, int value_dim, uintptr_t indices,
         uintptr_t offsets, int mask_batch, int mask_heads, int bq, int bk, uintptr_t key_padding,
         bool causal, float scale, uintptr_t lse, uintptr_t key_importance,
         uintptr_t head_importance, uint64_t seed, uint32_t threshold, float factor,
         int threads) {
        const ForwardArgs args{static_cast<Type>(type), view(query), view(key), view(value),
                               view(out), batch, heads, kv_heads, q_len, kv_len, head_dim,
                               value_dim, pointer<const int32_t>(indices),
                               pointer<const int64_t>(offsets), mask_batch, mask_heads, bq, bk,
                               pointer<const uint8_t>(key_padding), causal, scale,
                               pointer<float>(lse), pointer<float>(key_importance),
                               pointer<float>(head_importance), {seed, threshold, factor}, 0};
        const nb::gil_scoped_release release;
        attention_forward(args, threads);
      });
}

}  // namespace sparseloom
