#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace sparseloom {

void bind_attention(nb::module_&) {}

}  // namespace sparseloom
