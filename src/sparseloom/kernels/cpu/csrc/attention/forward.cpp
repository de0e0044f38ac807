// Splits a call into items of about equal work and runs them on threads.
#include "attention/forward.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "scratch.hpp"
#include "threads.hpp"

namespace sparseloom {
namespace {

// K and V rows of one segment, in bytes: half of a common L2 cache.
constexpr int64_t SEGMENT_BYTES = 1 << 20;
// A query block costs about as much as this many kept keys beside its keys.
constexpr int64_t BLOCK_COST = 16;

int choose_segment(const ForwardArgs& a) {
  const int64_t bytes = (a.head_dim + a.value_dim) * (a.type == Type::fp32 ? 4 : 2);
  // A head that needs a little more than that is not worth cutting.
  if (a.kv_len * bytes <= 2 * SEGMENT_BYTES) return (a.kv_len + a.bk - 1) / a.bk * a.bk;
  const int64_t keys = std::max<int64_t>(SEGMENT_BYTES / bytes, 256);
  return static_cast<int>((std::min<int64_t>(keys, a.kv_len) + a.bk - 1) / a.bk * a.bk);
}

std::vector<ForwardItem> split(const ForwardArgs& a, int threads) {
  const int blocks = (a.q_len + a.bq - 1) / a.bq;
  const int64_t rows = int64_t{a.mask_batch} * a.mask_heads;
  int64_t kept = 0;
  for (int64_t i = 0; i < rows; ++i)
    kept += a.offsets[i * (blocks + 1) + blocks] - a.offsets[i * (blocks + 1)];
  kept *= a.bk;
  const int64_t repeats = int64_t{a.batch} * a.heads / rows;
  const int64_t cost = (kept + rows * blocks * BLOCK_COST) * repeats;
  // Enough items that the last ones to finish cost little, few enough that they share segments.
  const int64_t target = std::max<int64_t>(cost / (threads * int64_t{24}), 1);
  std::vector<ForwardItem> items;
  for (int b = 0; b < a.batch; ++b)
    for (int h = 0; h < a.heads; ++h) {
      const int64_t row = (a.mask_batch == 1 ? 0 : b) * int64_t{a.mask_heads} +
                          int64_t{h} * a.mask_heads / a.heads;
      const int64_t* offsets = a.offsets + row * (blocks + 1);
      int first = 0;
      int64_t sum = 0;
      for (int block = 0; block < blocks; ++block) {
        sum += (offsets[block + 1] - offsets[block]) * a.bk + BLOCK_COST;
        if (sum >= target || block + 1 == blocks) {
          items.push_back({b, h, first, block + 1});
          first = block + 1;
          sum = 0;
        }
      }
    }
  return items;
}

}  // namespace

void attention_forward(ForwardArgs args, int threads) {
  args.segment = choose_segment(args);
  const ForwardKernels& kernels = active_forward_kernels();
  const auto items = split(args, threads);
  const int64_t size = kernels.scratch(args).total;
  const int workers = std::max(1, std::min<int>(threads, static_cast<int>(items.size())));
  const bool importance = args.key_importance || args.head_importance;
  std::atomic<size_t> next{0};
  std::mutex adding;
  parallel(workers, [&](int) {
    Scratch<float> memory(size);
    Scratch<float> columns(importance ? args.kv_len : 0);
    Importance found{columns.data(), 0.0f};
    int64_t held = -1;
    auto flush = [&](int64_t head) {
      if (held >= 0 && held != head) {
        const std::lock_guard<std::mutex> lock(adding);
        if (args.head_importance) args.head_importance[held] += found.head;
        if (args.key_importance)
          for (int k = 0; k < args.kv_len; ++k)
            args.key_importance[held * args.kv_len + k] += found.keys[k];
      }
      if (held != head) {
        found.head = 0.0f;
        std::fill_n(found.keys, args.kv_len, 0.0f);
        held = head;
      }
    };
    for (size_t i; (i = next.fetch_add(1)) < items.size();) {
      if (importance) flush(int64_t{items[i].batch} * args.heads + items[i].head);
      kernels.run(args, items[i], memory.data(), importance ? &found : nullptr);
    }
    if (importance) flush(-2);
  });
}

}  // namespace sparseloom
