#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>

#include "backward.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace sparseloom {
namespace {

// (address, batch stride, head stride, row stride, type)
using Strided = std::array<int64_t, 5>;

template <class T>
T* address(int64_t at) { return reinterpret_cast<T*>(static_cast<uintptr_t>(at)); }

BackwardTensor tensor(const Strided& t) {
  return {{address<void>(t[0]), t[1], t[2], t[3]}, static_cast<Type>(t[4])};
}

void run_backward(Strided query, Strided key, Strided value, Strided out, Strided grad_out,
                  int64_t lse, int64_t grad_lse, int64_t grad_key_importance,
                  std::array<int64_t, 3> grads, std::array<int64_t, 7> sizes, int64_t indices,
                  int64_t offsets, std::array<int64_t, 4> mask, int64_t key_padding, bool causal,
                  double scale, uint64_t seed, uint32_t threshold, double factor, bool dropped,
                  int threads) {
  BackwardCall c{};
  c.query = tensor(query), c.key = tensor(key), c.value = tensor(value);
  c.out = tensor(out), c.grad_out = tensor(grad_out);
  c.lse = address<const float>(lse);
  c.grad_lse = address<const float>(grad_lse);
  c.grad_key_importance = address<const float>(grad_key_importance);
  c.grad_query = address<void>(grads[0]);
  c.grad_key = address<void>(grads[1]);
  c.grad_value = address<void>(grads[2]);
  c.batch = sizes[0], c.heads = sizes[1], c.kv_heads = sizes[2], c.q_len = sizes[3];
  c.kv_len = sizes[4], c.head_dim = sizes[5], c.value_dim = sizes[6];
  c.indices = address<const int32_t>(indices);
  c.offsets = address<const int64_t>(offsets);
  c.mask_batch = mask[0], c.mask_heads = mask[1], c.block_q = mask[2], c.block_k = mask[3];
  c.key_padding = address<const uint8_t>(key_padding);
  c.causal = causal, c.dropped = dropped;
  c.scale = static_cast<float>(scale);
  c.drop = {seed, threshold, static_cast<float>(factor)};
  nb::gil_scoped_release released;
  backward(c, threads);
}

}  // namespace

void bind_backward(nb::module_& m) {
  m.def("backward", run_backward, "query"_a, "key"_a, "value"_a, "out"_a, "grad_out"_a, "lse"_a,
        "grad_lse"_a, "grad_key_importance"_a, "grads"_a, "sizes"_a, "indices"_a, "offsets"_a,
        "mask"_a, "key_padding"_a, "causal"_a, "scale"_a, "seed"_a, "threshold"_a, "factor"_a,
        "dropped"_a, "threads"_a);
}

}  // namespace sparseloom
