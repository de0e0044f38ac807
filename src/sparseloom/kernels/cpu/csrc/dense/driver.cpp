// Work split of dense attention: scratch, items, threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "dense/mask.hpp"
#include "threads.hpp"

namespace sparseloom {
namespace {

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<void, Free>;

size_t line_up(size_t bytes) { return (bytes + 127) / 128 * 128; }

Memory allocate(size_t bytes) { return Memory{::operator new(bytes, std::align_val_t{64})}; }

// Calls work(item, scratch of the worker) for items 0 ... count - 1, the next free worker the next.
template <class Work>
void share(int64_t count, int threads, char* scratch, size_t bytes, Work&& work) {
  std::atomic<int64_t> next{0};
  const int workers = static_cast<int>(std::min<int64_t>(threads, count));
  parallel(workers, [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      work(i, scratch + static_cast<size_t>(worker) * bytes);
  });
}

// Few queries share their block over the heads of a group; many start a block with each head, so
// that causality cuts whole blocks. So do those under a mask, of which each head has its own rows.
std::vector<DenseItem> query_items(const DenseArgs& a, int64_t block) {
  const bool shared = a.q_len < block && !a.indices;
  const int64_t group = a.heads / a.kv_heads, rows = shared ? a.q_len * group : a.q_len;
  const int64_t parts = shared ? 1 : group;
  std::vector<DenseItem> items;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t row = 0; row < rows; row += block)
          items.push_back({b, h, part * rows + row, std::min(block, rows - row)});
  return items;
}

}  // namespace

// How many times faster a kept pair is here than gathered, measured on AVX-512 in fp32 at 64 dims.
constexpr double ADVANTAGE = 1.5;

bool dense_suits_mask(const DenseArgs& a, DenseType type) {
  const int64_t block = active_dense_table().of[static_cast<int>(type)]->block;
  if (block <= MASK_QUERIES) return true;
  int64_t kept = 0, computed = 0;
  for (int64_t b = 0; b < a.mask_batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t first = 0; first < a.q_len; first += block) {
        KeptTiles tiles(a, b, h, first, std::min(block, a.q_len - first));
        for (int r = 0; r < tiles.rows; ++r) kept += tiles.end[r] - tiles.row[r];
        for (int some; tiles.next(some) >= 0;) computed += tiles.rows;
      }
  return static_cast<double>(computed) <= ADVANTAGE * static_cast<double>(kept);
}

void dense_forward(const DenseArgs& a, DenseType type, int threads) {
  const DenseKernels& kernels = *active_dense_table().of[static_cast<int>(type)];
  threads = std::max(1, threads);
  const Memory shared = allocate(kernels.shared_bytes(a) + 64);
  const size_t bytes = line_up(kernels.scratch_bytes(a));
  const Memory memory = allocate(bytes * static_cast<size_t>(threads));
  auto* scratch = static_cast<char*>(memory.get());
  share(kernels.shared_parts(a), threads, scratch, bytes,
        [&](int64_t part, void*) { kernels.prepare(a, shared.get(), part); });

  // The last blocks see most keys under causality: long items first, short ones fill the end.
  const std::vector<DenseItem> items = query_items(a, kernels.block);
  const auto count = static_cast<int64_t>(items.size());
  share(count, threads, scratch, bytes, [&](int64_t i, void* mine) {
    const int64_t at = a.causal ? count - 1 - i : i;
    kernels.attend(a, items[static_cast<size_t>(at)], shared.get(), mine);
  });
  if (!a.columns) return;

  const int64_t blocks = (a.kv_len + kernels.block - 1) / kernels.block;
  share(a.batch * a.heads * blocks, threads, scratch, bytes, [&](int64_t i, void* mine) {
    const int64_t first = i % blocks * kernels.block, head = i / blocks;
    kernels.columns(a, {head / a.heads, head % a.heads, first,
                        std::min<int64_t>(kernels.block, a.kv_len - first)}, mine);
  });
}

}  // namespace sparseloom
