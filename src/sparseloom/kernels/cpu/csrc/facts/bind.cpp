#include <nanobind/nanobind.h>

#include "facts.hpp"

namespace nb = nanobind;

namespace sparseloom {

void bind_facts(nb::module_& m) {
  m.def("tier_rank", [] { return active_tier_facts().rank; });
  m.def("tier_lanes", [] { return active_tier_facts().lanes; });
#if defined(__clang__)
#define SL_TEXT(x) #x
#define SL_DOTTED(a, b, c) SL_TEXT(a) "." SL_TEXT(b) "." SL_TEXT(c)
  m.attr("compiler") = "Clang " SL_DOTTED(__clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
}

}  // namespace sparseloom
