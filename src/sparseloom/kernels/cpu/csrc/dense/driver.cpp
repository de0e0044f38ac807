// Work split of dense attention: scratch, items, threads.
#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "dense/dense.hpp"
#include "threads.hpp"

namespace sparseloom {
namespace {

size_t line_up(size_t bytes) { return (bytes + 127) / 128 * 128; }

// Memory of a call, which the next call finds again: fresh pages cost as much as a small attention.
class Memory {
 public:
  explicit Memory(size_t bytes) : block_(kept().exchange(nullptr)) {
    if (block_ && block_->bytes >= bytes) return;
    release(block_);
    auto* at = static_cast<char*>(::operator new(bytes + HEADER, std::align_val_t{HEADER}));
    block_ = new (at) Block{bytes};
  }
  ~Memory() {
    if (block_->bytes <= MOST_KEPT) block_ = kept().exchange(block_);
    release(block_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() { return reinterpret_cast<char*>(block_) + HEADER; }

 private:
  static constexpr size_t HEADER = 128, MOST_KEPT = size_t{1} << 25;
  struct Block { size_t bytes; };

  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  static void release(Block* block) { ::operator delete(block, std::align_val_t{HEADER}); }

  Block* block_;
};

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

// Key heads that all workers share: what is left over when each takes equally many whole ones, and
// one round more; all if there are few.
int64_t shared_heads(int64_t units, int64_t threads) {
  const int64_t shared = units % threads + threads;
  return std::min(shared, units);
}

// Adds the items of a key head. Few queries share their block over the heads of a group; many start a
// block with each head, so that causality cuts whole blocks. So do those under a mask, of which each
// head has its own rows.
void add_items(const DenseArgs& a, int64_t unit, int64_t block, std::vector<DenseItem>& items) {
  const bool shared = a.q_len < block && !a.offsets;
  const int64_t group = a.heads / a.kv_heads, rows = shared ? a.q_len * group : a.q_len;
  const int64_t parts = shared ? 1 : group;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t row = 0; row < rows; row += block)
      items.push_back({unit / a.kv_heads, unit % a.kv_heads, part * rows + row,
                       std::min(block, rows - row)});
}

// All items. A worker takes most key heads whole, so that what it prepared is still in its cache;
// the last ones are shared, so that all end at about the same time.
void attend_all(const DenseArgs& a, const DenseKernels& kernels, int threads, char* heads,
                size_t head_bytes, char* scratch, size_t bytes) {
  const int64_t units = a.batch * a.kv_heads, parts = kernels.head_parts(a);
  const int64_t shared = parts ? shared_heads(units, threads) : units, own = units - shared;
  std::vector<DenseItem> items, last;
  for (int64_t unit = 0; unit < own; ++unit) add_items(a, unit, kernels.block, items);
  for (int64_t unit = own; unit < units; ++unit) add_items(a, unit, kernels.block, last);
  const auto each = own ? static_cast<int64_t>(items.size()) / own : 0;
  const auto count = static_cast<int64_t>(last.size());
  char* shared_at = heads + (own ? static_cast<size_t>(threads) * head_bytes : 0);
  const auto shared_head = [&](int64_t unit) { return shared_at + static_cast<size_t>(unit - own) * head_bytes; };

  std::atomic<int64_t> next{0}, prepared{0};
  const int64_t jobs = shared * parts + own + count;
  parallel(static_cast<int>(std::min<int64_t>(threads, jobs)), [&](int worker) {
    char* mine = heads + static_cast<size_t>(worker) * head_bytes;
    char* memory = scratch + static_cast<size_t>(worker) * bytes;
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
      if (job < shared * parts) {
        const int64_t unit = own + job / parts;
        kernels.prepare(a, unit / a.kv_heads, unit % a.kv_heads, shared_head(unit), job % parts);
        prepared.fetch_add(1, std::memory_order_release);
      } else if (job < shared * parts + own) {
        const int64_t unit = job - shared * parts;
        for (int64_t part = 0; part < parts; ++part)
          kernels.prepare(a, unit / a.kv_heads, unit % a.kv_heads, mine, part);
        for (int64_t i = unit * each; i < (unit + 1) * each; ++i)
          kernels.attend(a, items[static_cast<size_t>(i)], mine, memory);
      } else {
        while (prepared.load(std::memory_order_acquire) < shared * parts) std::this_thread::yield();
        // The last blocks see most keys under causality: long items first, short ones fill the end.
        const int64_t i = job - shared * parts - own, at = a.causal ? count - 1 - i : i;
        const DenseItem& item = last[static_cast<size_t>(at)];
        kernels.attend(a, item, shared_head(item.batch * a.kv_heads + item.kv_head), memory);
      }
    }
  });
}

// Which sizes of segments some run asks for.
int used_means(const DenseArgs& a) {
  if (!a.offsets) return 0;
  const int64_t rows = a.mask_batch * a.mask_heads;
  const int64_t blocks = (a.q_len + MASK_QUERIES - 1) / MASK_QUERIES;
  int used = 0;
  for (int64_t i = 0; i < a.offsets[rows * (blocks + 1) - 1]; ++i) used |= 1 << a.runs[i].log2;
  return used & ~1;
}

}  // namespace

void dense_forward(const DenseArgs& args, DenseType type, int threads) {
  DenseArgs a = args;
  a.means = used_means(a);
  const DenseKernels& kernels = *active_dense_table().of[static_cast<int>(type)];
  threads = std::max(1, threads);
  const int64_t units = a.batch * a.kv_heads;
  const size_t head_bytes = line_up(kernels.head_bytes(a)), bytes = line_up(kernels.scratch_bytes(a));
  // One key head for each worker, and the shared ones.
  const auto heads = static_cast<size_t>(threads + std::min<int64_t>(units, 2 * threads));
  Memory memory(heads * head_bytes + static_cast<size_t>(threads) * bytes);
  char* scratch = memory.data() + heads * head_bytes;
  attend_all(a, kernels, threads, memory.data(), head_bytes, scratch, bytes);
  if (!a.columns) return;

  const int64_t blocks = (a.kv_len + kernels.block - 1) / kernels.block;
  share(a.batch * a.heads * blocks, threads, scratch, bytes, [&](int64_t i, void* mine) {
    const int64_t first = i % blocks * kernels.block, head = i / blocks;
    kernels.columns(a, {head / a.heads, head % a.heads, first,
                        std::min<int64_t>(kernels.block, a.kv_len - first)}, mine);
  });
}

}  // namespace sparseloom
