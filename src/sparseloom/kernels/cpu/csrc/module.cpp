#include <nanobind/nanobind.h>

#include "dispatch.hpp"

namespace nb = nanobind;

namespace sparseloom {
// One function per part, each in its folder's bind.cpp.
void bind_attention(nb::module_& m);
void bind_backward(nb::module_& m);
void bind_peaks(nb::module_& m);
void bind_decode(nb::module_& m);
void bind_facts(nb::module_& m);
void bind_dense(nb::module_& m);
void bind_unfused(nb::module_& m);
void bind_predict(nb::module_& m);
}  // namespace sparseloom

NB_MODULE(_native, m) {
  using namespace sparseloom;
  m.def("widest_tier", [] { return static_cast<int>(widest_tier()); });
  m.def("active_tier", [] { return static_cast<int>(active_tier()); });
  m.def("set_active_tier", [](int tier) { set_active_tier(static_cast<Tier>(tier)); });
  bind_attention(m);
  bind_backward(m);
  bind_peaks(m);
  bind_decode(m);
  bind_facts(m);
  bind_dense(m);
  bind_unfused(m);
  bind_predict(m);
}
