#include <nanobind/nanobind.h>

#include "facts.hpp"

namespace nb = nanobind;

namespace sparseloom {

void bind_facts(nb::module_& m) {
  m.def("tier_rank", [] { return active_tier_facts().rank; });
  m.def("tier_lanes", [] { return active_tier_facts().lanes; });
#if defined(__clang__)
  m.attr("compiler") = "Clang " __clang_version__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
}

}  // namespace sparseloom
