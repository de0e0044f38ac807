// What one core reaches at most: arithmetic in registers, and reading memory.
#pragma once

#include <cstdint>

#include "dispatch.hpp"

namespace sparseloom {

// Each runs its loop `count` times and leaves something of the result in `out` (64 bytes), so that
// no compiler drops the work. The numbers beside them are operations per count, a multiply and an
// add counted as two; 0 where the tier has no such instruction.
struct PeakKernels {
  void (*fp32)(int64_t count, void* out);
  int64_t fp32_ops;
  void (*bf16)(int64_t count, void* out);
  int64_t bf16_ops;
  void (*int8)(int64_t count, void* out);
  int64_t int8_ops;
  // Reads `bytes` (a multiple of 512) at `from`.
  void (*read)(const void* from, int64_t bytes, void* out);
};

SL_TABLE(PeakKernels, peak_kernels)

}  // namespace sparseloom
