// Splits the work over threads and owns the memory that kernels work in.
#include "predict.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../threads.hpp"

namespace sparseloom {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory on cache-line edges, and how much of it there is.
class Arena {
 public:
  template <class T>
  T* take(long count) {
    const auto bytes = static_cast<size_t>(round_up(count * static_cast<long>(sizeof(T)), 64)) + 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    held_.emplace_back(p);
    bytes_ += static_cast<long>(bytes);
    return static_cast<T*>(p);
  }
  long bytes() const { return bytes_; }

 private:
  std::vector<std::unique_ptr<void, Free>> held_;
  long bytes_ = 0;
};

// Rows that do not all start in the same cache set.
long row_stride(long n) { return round_up(n, PANELS_TOGETHER * PANEL) + 16; }

}  // namespace

long encode(const EncodeArgs& args, int threads, bool* finite) {
  const auto& kernels = active_predict_kernels();
  const long chunks = (args.length + ROWS - 1) / ROWS, items = args.batch * chunks;
  Arena arena;
  const int workers = static_cast<int>(items < threads ? items : threads);
  std::vector<int8_t*> codes;
  std::vector<int32_t*> products;
  std::vector<float*> low;
  for (int worker = 0; worker < workers; ++worker) {
    codes.push_back(arena.take<int8_t>(ROWS * args.depth));
    std::memset(codes.back(), 0, static_cast<size_t>(ROWS * args.depth));
    products.push_back(arena.take<int32_t>(ROWS * args.columns));
    low.push_back(arena.take<float>(args.columns));
  }
  std::atomic<long> next{0};
  std::atomic<bool> fine{true};
  parallel(workers, [&](int worker) {
    kernels.begin(args.depth);
    for (long item; (item = next.fetch_add(1)) < items;) {
      const long b = item / chunks, first = item % chunks * ROWS;
      const long count = args.length - first < ROWS ? args.length - first : ROWS;
      if (!kernels.encode(args, b, first, count, codes[worker], products[worker], low[worker]))
        fine = false;
    }
    kernels.end();
  });
  *finite = fine;
  return arena.bytes();
}

long select(const SelectArgs& args, int threads) {
  const auto& kernels = active_predict_kernels();
  Arena arena;
  std::vector<KeyMap> maps(static_cast<size_t>(args.batch), KeyMap{args.kv_len, nullptr, nullptr});
  if (args.key_padding) {
    const long different = args.key_padding_stride ? args.batch : 1;
    for (long b = 0; b < different; ++b) {
      auto* place = arena.take<int32_t>(args.kv_len);
      auto* before = arena.take<int32_t>(args.kv_len + 1);
      const uint8_t* real = args.key_padding + b * args.key_padding_stride;
      int32_t count = 0;
      for (long key = 0; key < args.kv_len; ++key) {
        before[key] = count;
        place[count] = static_cast<int32_t>(key);
        count += real[key] != 0;
      }
      before[args.kv_len] = count;
      maps[static_cast<size_t>(b)] = {count, place, before};
    }
    for (long b = different; b < args.batch; ++b) maps[static_cast<size_t>(b)] = maps[0];
  }

  const long pairs = args.batch * args.heads;
  const int largest = kernels.largest(args.k, pairs * args.kv_len * args.width);
  const int largest_q = kernels.largest(args.q, pairs * args.q_len * args.width);
  const bool small = kernels.small(args.width, largest, largest_q);
  const long depth = padded_depth(args.width);
  const long panels = round_up(args.kv_len, PANELS_TOGETHER * PANEL) / PANEL;
  const long size = PANEL * depth, before = PANELS_BEFORE * size;
  auto* packed = arena.take<int8_t>(pairs * panels * size + before) + before;
  std::memset(packed - before, 0, static_cast<size_t>(before));
  auto* sums = arena.take<int32_t>(pairs * panels * PANEL);
  const auto keys_of = [&](long pair) {
    return Keys{packed + pair * panels * size, sums + pair * panels * PANEL, depth, small,
                largest, largest_q, maps[static_cast<size_t>(pair / args.heads)]};
  };
  constexpr long some = 64;  // panels
  const long parts = (panels + some - 1) / some;
  std::atomic<long> next{0};
  parallel(static_cast<int>(pairs * parts < threads ? pairs * parts : threads), [&](int) {
    for (long item; (item = next.fetch_add(1)) < pairs * parts;) {
      const long pair = item / parts, from = item % parts * some;
      const Keys keys = keys_of(pair);
      kernels.pack(args.k + pair * args.kv_len * args.width, args.width, keys, from,
                   from + some < panels ? from + some : panels, const_cast<int8_t*>(keys.codes), const_cast<int32_t*>(keys.sums));
    }
  });

  const long blocks = (args.q_len + args.bq - 1) / args.bq;
  const long together = args.bq < ROWS ? ROWS / args.bq : 1;
  const long groups = (blocks + together - 1) / together, items = pairs * groups;
  const int workers = static_cast<int>(items < threads ? items : threads);
  std::vector<Room> rooms;
  std::vector<Guess> guesses(static_cast<size_t>(workers));
  const long stride = row_stride(args.kv_len);
  for (int worker = 0; worker < workers; ++worker)
    rooms.push_back({arena.take<int32_t>((ROWS + 1) * stride), arena.take<int32_t>(stride),
                     arena.take<int8_t>(ROWS * ROW_PARTS * depth), &guesses[static_cast<size_t>(worker)],
                     stride});
  next = 0;
  parallel(workers, [&](int worker) {
    kernels.begin(depth);
    for (long item; (item = next.fetch_add(1)) < items;) {
      // The last blocks of a causal call are the longest: first in, so that no thread waits long.
      const long pair = item / groups, first = (groups - 1 - item % groups) * together;
      const long last = first + together < blocks ? first + together : blocks;
      kernels.select(args, keys_of(pair), pair / args.heads, pair % args.heads, first, last,
                     rooms[static_cast<size_t>(worker)]);
    }
    kernels.end();
  });
  return arena.bytes();
}

}  // namespace sparseloom
