#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "decode/decode.hpp"
#include "decode/store.hpp"

namespace nb = nanobind;

namespace sparseloom {
namespace {

// Address, element, and the strides of batch, head and row in bytes.
using PyCached = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;
// Address, and the strides of batch, head, row and dimension in elements.
using PyFactors = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;
// batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim
using PySizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// Address, whether 64 bits wide, heads (0: no list), length
using PyKeep = std::tuple<uintptr_t, bool, int64_t, int64_t>;
// Address (0: none) and stride of the batch
using PyPadding = std::tuple<uintptr_t, int64_t>;
// low bits, fill of the low bits
using PyPlanes = std::tuple<int, float>;
// out, key importance, head importance, keys read, values read, refetched
using PyOutputs =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Cached cached(const PyCached& t) {
  const auto& [data, element, batch, head, row] = t;
  return {reinterpret_cast<const char*>(data), static_cast<Element>(element), batch, head, row};
}

Factors factors(const PyFactors& t) {
  const auto& [data, batch, head, row, dim] = t;
  return {reinterpret_cast<const float*>(data), batch, head, row, dim};
}

int64_t run(PySizes sizes, PyCached query, PyCached key, PyCached key_low, PyCached value,
            PyFactors key_scale, PyFactors value_scale, PyKeep keep, PyPadding padding,
            PyPlanes planes, float scale, double value_keep, double progressive, bool renormalise,
            bool causal, PyOutputs outputs, int threads) {
  Decode call;
  std::tie(call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim,
           call.value_dim) = sizes;
  call.query = cached(query);
  call.key = cached(key);
  call.key_low = cached(key_low);
  call.value = cached(value);
  call.key_scale = factors(key_scale);
  call.value_scale = factors(value_scale);
  call.keep = reinterpret_cast<const void*>(std::get<0>(keep));
  call.keep_is_64 = std::get<1>(keep);
  call.keep_heads = std::get<2>(keep);
  call.kept = std::get<3>(keep);
  call.padding = reinterpret_cast<const uint8_t*>(std::get<0>(padding));
  call.padding_stride = std::get<1>(padding);
  call.scale = scale;
  std::tie(call.low_bits, call.fill) = planes;
  call.value_keep = value_keep;
  call.progressive = progressive;
  call.renormalise = renormalise;
  call.causal = causal;
  const auto& [out, key_importance, head_importance, keys_read, values_read, refetched] = outputs;
  call.out = reinterpret_cast<void*>(out);
  call.key_importance = reinterpret_cast<float*>(key_importance);
  call.head_importance = reinterpret_cast<float*>(head_importance);
  call.keys_read = reinterpret_cast<int64_t*>(keys_read);
  call.values_read = reinterpret_cast<int64_t*>(values_read);
  call.refetched = reinterpret_cast<uint8_t*>(refetched);
  call.threads = threads;
  const nb::gil_scoped_release release;
  return decode(call);
}

// batch, heads, rows, dim; bits and how many of them are in the low plane
using PyRows = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using PyBits = std::tuple<int, int>;

bool run_store(PyRows sizes, PyCached from, PyFactors scale, PyBits bits, PyCached high,
               PyCached low) {
  Store call;
  std::tie(call.batch, call.heads, call.rows, call.dim) = sizes;
  call.from = cached(from);
  call.scale = factors(scale);
  std::tie(call.bits, call.low_bits) = bits;
  call.high = cached(high);
  call.low = cached(low);
  const nb::gil_scoped_release release;
  return store(call);
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("decode", run);
  m.def("store", run_store);
}

}  // namespace sparseloom
