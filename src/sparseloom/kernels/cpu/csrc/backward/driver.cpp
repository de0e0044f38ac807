// Work for the threads: heads that share a key head, cut into parts of equal work where the heads
// alone would leave a thread idle. The parts of a head sum its key and value gradients apart; they
// are added in order, so that a thread count always gives the same bits.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "backward.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace sparseloom {
namespace {

constexpr int64_t CACHE_BYTES = 1 << 20;  // of the L2 cache, for the records of keys
constexpr double BLOCK_COST = 16;         // of a query block, in keys
constexpr double MERGE_COST = 0.5;        // of one key's partial gradients, in pairs

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The pairs of each query block, in units of one row of a tile and one key.
class Costs {
 public:
  explicit Costs(const BackwardCall& c) : c_(c) {}

  double block(int64_t b, int64_t h, int64_t block) const {
    const int64_t rows = std::min(c_.block_q, c_.q_len - block * c_.block_q);
    double keys = 0;
    if (c_.offsets) {
      const int64_t head = (c_.mask_batch == 1 ? 0 : b) * c_.mask_heads + h * c_.mask_heads / c_.heads;
      const int64_t* at = c_.offsets + head * (c_.q_blocks + 1) + block;
      keys = static_cast<double>((at[1] - at[0]) * c_.block_k);
    } else {
      const int64_t seen = c_.causal ? c_.kv_len - c_.q_len + block * c_.block_q + rows : c_.kv_len;
      keys = static_cast<double>(std::max<int64_t>(0, seen));
    }
    return (keys + BLOCK_COST) * static_cast<double>(rows);
  }

 private:
  const BackwardCall& c_;
};

struct Planned {
  BackwardItem item;
  double cost;
};

// The time of the busiest thread if each takes the largest item that is left.
double makespan(std::vector<double> costs, int threads) {
  std::sort(costs.rbegin(), costs.rend());
  std::vector<double> busy(static_cast<size_t>(threads), 0.0);
  for (double cost : costs) *std::min_element(busy.begin(), busy.end()) += cost;
  return *std::max_element(busy.begin(), busy.end());
}

int choose_parts(const BackwardCall& c, const std::vector<double>& heads, int threads) {
  double total = 0;
  for (double cost : heads) total += cost;
  const int64_t most = std::min<int64_t>(4 * threads, c.heads / c.kv_heads * c.q_blocks);
  int best = 1;
  double shortest = -1;
  for (int parts = 1; parts <= most; ++parts) {
    std::vector<double> costs;
    for (double cost : heads) costs.insert(costs.end(), static_cast<size_t>(parts), cost / parts);
    const double merge = parts == 1 ? 0 : MERGE_COST * static_cast<double>(parts * c.kv_len);
    const double time = makespan(costs, threads) + merge * static_cast<double>(heads.size()) / threads;
    if (shortest < 0 || time < 0.98 * shortest) best = parts, shortest = time;
    if (makespan(costs, threads) <= 1.02 * total / threads) break;
  }
  return best;
}

// Each head's query blocks, cut into `parts` runs of about equal cost, some perhaps empty.
std::vector<Planned> plan(const BackwardCall& c, int threads, int& parts) {
  const Costs costs(c);
  const int64_t group = c.heads / c.kv_heads;
  std::vector<std::vector<double>> blocks;
  std::vector<double> heads;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t k = 0; k < c.kv_heads; ++k) {
      std::vector<double> each;
      double sum = 0;
      for (int64_t h = k * group; h < (k + 1) * group; ++h)
        for (int64_t i = 0; i < c.q_blocks; ++i) each.push_back(costs.block(b, h, i)), sum += each.back();
      blocks.push_back(std::move(each));
      heads.push_back(sum);
    }
  parts = choose_parts(c, heads, threads);
  std::vector<Planned> items;
  for (size_t at = 0; at < heads.size(); ++at) {
    const auto head = static_cast<int64_t>(at);
    const auto all = static_cast<int64_t>(blocks[at].size());
    int64_t first = 0;
    double done = 0;
    for (int part = 0; part < parts; ++part) {
      int64_t last = first;
      double cost = 0;
      const double until = heads[at] * (part + 1) / parts;
      while (last < all && (part == parts - 1 || done + cost < until))
        cost += blocks[at][static_cast<size_t>(last++)];
      done += cost;
      items.push_back({{head / c.kv_heads, head % c.kv_heads, first, last, nullptr, nullptr}, cost});
      first = last;
    }
  }
  return items;
}

// Few enough keys for the cache, but enough of each row's for whole chunks.
int64_t keys_at_once(const BackwardCall& c) {
  int64_t keys = std::max<int64_t>(256, CACHE_BYTES / (4 * backward_record_floats(c)));
  if (c.offsets) {
    const int64_t rows = c.mask_batch * c.mask_heads * c.q_blocks;
    const int64_t* offsets = c.offsets;
    const double kept = static_cast<double>(offsets[c.mask_batch * c.mask_heads * (c.q_blocks + 1) - 1]) *
                        static_cast<double>(c.block_k) / static_cast<double>(rows);
    const double wanted = 32.0 * static_cast<double>(c.kv_len) / std::max(1.0, kept);
    keys = std::max(keys, static_cast<int64_t>(std::min(wanted, static_cast<double>(c.kv_len))));
  }
  return rounded_up(std::min(keys, c.kv_len), c.block_k);
}

// The scratch of one worker, and where it sums key and value gradients that it must still round.
struct Worker {
  BackwardScratch scratch;
  float *grad_key, *grad_value;
  std::unique_ptr<Scratch<float>> floats;
  std::unique_ptr<Scratch<int64_t>> cursor;

  Worker(const BackwardCall& c, bool round_query, bool sum_key, bool sum_value) {
    const int64_t key = c.kv_len * c.key_width, value = c.kv_len * c.value_width;
    const int64_t query = c.q_len * c.key_width, rows = rounded_up(c.q_len, 16);
    const int64_t sizes[] = {backward_record_floats(c) * c.keys_at_once,
                             round_query ? query : 0, rows, rows, backward_tile_floats(c),
                             sum_key ? key : 0, sum_value ? value : 0};
    int64_t total = 0;
    for (int64_t size : sizes) total += rounded_up(size, 16);
    floats = std::make_unique<Scratch<float>>(total);
    cursor = std::make_unique<Scratch<int64_t>>(c.offsets ? c.q_blocks : 0);
    float* at[7];
    float* next = floats->data();
    for (int i = 0; i < 7; ++i) at[i] = sizes[i] ? next : nullptr, next += rounded_up(sizes[i], 16);
    scratch = {at[0], at[1], at[2], at[3], cursor->data(), at[4]};
    grad_key = at[5], grad_value = at[6];
  }
};

char* moved(void* out, int64_t elements, Type type) {
  return static_cast<char*>(out) + elements * element_bytes(type);
}

}  // namespace

void backward(BackwardCall c, int threads) {
  const BackwardKernels& kernels = active_backward_kernels();
  if (!c.offsets) c.block_q = std::min<int64_t>(c.q_len, 4 * kernels.lanes), c.block_k = 1;
  c.q_blocks = (c.q_len + c.block_q - 1) / c.block_q;
  c.key_width = rounded_up(c.head_dim, kernels.lanes);
  c.value_width = rounded_up(c.value_dim, kernels.lanes);
  // Sums stand in the results themselves where nothing has to be rounded, cut or added.
  const bool round_key = c.key.type != Type::fp32 || c.key_width != c.head_dim;
  const bool round_value = c.value.type != Type::fp32 || c.value_width != c.value_dim;
  c.keys_at_once = keys_at_once(c);

  int parts = 1;
  std::vector<Planned> items = plan(c, threads, parts);
  const bool own_key = round_key || parts > 1, own_value = round_value || parts > 1;
  const int64_t key_size = c.kv_len * c.key_width, value_size = c.kv_len * c.value_width;
  const auto count = static_cast<int64_t>(items.size());
  Scratch<float> key_parts(parts > 1 ? count * key_size : 0);
  Scratch<float> value_parts(parts > 1 ? count * value_size : 0);
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  std::vector<Worker> workers;
  for (int i = 0; i < threads; ++i)
    workers.emplace_back(c, round_key, round_key && parts == 1, round_value && parts == 1);

  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return items[a].cost > items[b].cost; });
  const auto finish = [&](const float* key, const float* value, int64_t head) {
    if (own_key)
      kernels.finish(key, parts, key_size, c.kv_len, c.key_width, c.head_dim, c.key.type,
                     moved(c.grad_key, head * c.kv_len * c.head_dim, c.key.type));
    if (own_value)
      kernels.finish(value, parts, value_size, c.kv_len, c.value_width, c.value_dim, c.value.type,
                     moved(c.grad_value, head * c.kv_len * c.value_dim, c.value.type));
  };
  std::atomic<size_t> next{0};
  parallel(threads, [&](int worker) {
    const Worker& mine = workers[static_cast<size_t>(worker)];
    for (size_t at; (at = next.fetch_add(1)) < items.size();) {
      BackwardItem& item = items[order[at]].item;
      const auto place = static_cast<int64_t>(order[at]);
      const int64_t head = item.b * c.kv_heads + item.kv_head;
      item.grad_key = parts > 1 ? key_parts.data() + place * key_size
                      : own_key ? mine.grad_key
                                : static_cast<float*>(c.grad_key) + head * key_size;
      item.grad_value = parts > 1   ? value_parts.data() + place * value_size
                        : own_value ? mine.grad_value
                                    : static_cast<float*>(c.grad_value) + head * value_size;
      kernels.run(c, item, mine.scratch);
      if (parts == 1) finish(item.grad_key, item.grad_value, head);
    }
  });
  if (parts == 1) return;
  std::atomic<int64_t> done{0};
  parallel(threads, [&](int) {
    for (int64_t head; (head = done.fetch_add(1)) < c.batch * c.kv_heads;)
      finish(key_parts.data() + head * parts * key_size, value_parts.data() + head * parts * value_size, head);
  });
}

}  // namespace sparseloom
