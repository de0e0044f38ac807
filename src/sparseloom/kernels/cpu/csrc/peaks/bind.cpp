#include <nanobind/nanobind.h>

#include <cstdint>

namespace nb = nanobind;

namespace sparseloom {

int64_t peak_ops(int kind);
double peak_arithmetic(int kind, int64_t count, int threads);
double peak_read(const char* from, int64_t bytes, int rounds, int threads, bool shared);

void bind_peaks(nb::module_& m) {
  m.def("peak_ops", peak_ops);
  m.def("peak_arithmetic", peak_arithmetic, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "peak_read",
      [](uintptr_t from, int64_t bytes, int rounds, int threads, bool shared) {
        return peak_read(reinterpret_cast<const char*>(from), bytes, rounds, threads, shared);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace sparseloom
