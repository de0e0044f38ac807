#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "unfused/unfused.hpp"

namespace nb = nanobind;

namespace sparseloom {
namespace {

// Address, and the strides of batch, head and row.
using PyView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// Addresses of indices and offsets; batch, heads, query blocks, bq, bk, q_len, kv_len.
using PyMask = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t>;

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

DenseView view(const PyView& v) {
  return {pointer<const void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

}  // namespace

void bind_unfused(nb::module_& m) {
  m.def("unfused", [](int step, const PyMask& mask, PyView query, PyView key, int64_t kv_heads,
                      int64_t dim, uintptr_t from, uintptr_t to, uintptr_t attend, float scale,
                      bool causal, int threads) {
    const UnfusedArgs args{pointer<const int32_t>(std::get<0>(mask)),
                           pointer<const int64_t>(std::get<1>(mask)),
                           std::get<2>(mask), std::get<3>(mask), std::get<4>(mask),
                           std::get<5>(mask), std::get<6>(mask), std::get<7>(mask),
                           std::get<8>(mask), view(query), view(key), kv_heads, dim,
                           pointer<const float>(from), pointer<float>(to),
                           pointer<const uint8_t>(attend), scale, causal};
    const nb::gil_scoped_release release;
    unfused_run(args, static_cast<UnfusedStep>(step), threads);
  });
}

}  // namespace sparseloom
