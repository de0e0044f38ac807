// Rows of a mask over threads, in parts of about the same number of kept tiles.
#include "unfused/unfused.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "scratch.hpp"
#include "threads.hpp"

namespace sparseloom {

void unfused_run(const UnfusedArgs& a, UnfusedStep step, int threads) {
  const UnfusedKernels& kernels = active_unfused_kernels();
  const auto run = step == UnfusedStep::sddmm     ? kernels.sddmm
                   : step == UnfusedStep::softmax ? kernels.softmax
                                                  : kernels.spmm;
  // A row costs something even if it keeps nothing.
  const int64_t rows = a.batch * a.heads * a.q_blocks;
  const auto kept = [&](int64_t row) {
    const int64_t* at = a.offsets + row / a.q_blocks * (a.q_blocks + 1) + row % a.q_blocks;
    return at[1] - at[0] + 1;
  };
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row) total += kept(row);
  const int64_t share = total / (16 * std::max(1, threads)) + 1;
  std::vector<int64_t> starts{0};
  int64_t gathered = 0;
  for (int64_t row = 0; row < rows; ++row) {
    gathered += kept(row);
    if (gathered >= share || row + 1 == rows) {
      starts.push_back(row + 1);
      gathered = 0;
    }
  }
  const auto parts = static_cast<int64_t>(starts.size()) - 1;
  const int workers = static_cast<int>(std::min<int64_t>(std::max(1, threads), parts));
  const auto floats = static_cast<int64_t>((kernels.scratch_bytes(a) + 63) / 64 * 16);
  Scratch<float> scratch(floats * std::max(1, workers));
  std::atomic<int64_t> next{0};
  parallel(workers, [&](int worker) {
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;)
      for (int64_t row = starts[static_cast<size_t>(part)];
           row < starts[static_cast<size_t>(part) + 1]; ++row)
        run(a, row, scratch.data() + worker * floats);
  });
}

}  // namespace sparseloom
