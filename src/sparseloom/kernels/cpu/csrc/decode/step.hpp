// The state of one decoding step. A unit is the query rows that read the same keys: all queries of
// the heads that share a key head, or of one head where each has its own list of keys. Where there
// are few units, the keys of each are cut into pieces, so that all threads have work.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "decode/decode.hpp"
#include "decode/scratch.hpp"
#include "threads.hpp"

namespace sparseloom::decoding {

constexpr int TILE = 256;  // keys whose scores or values are worked on at once
constexpr int GROUP = 16;  // query rows that go over a tile together
constexpr float INF = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A piece of a unit: a range of its keys, and what they give for one of its rows.
struct Partial {
  float maximum = -INF, sum = 0;
  int64_t keys = 0;
};

// The softmax of one query row, and how many values it reads.
struct Row {
  float maximum = -INF, sum = 0;
  int64_t keys = 0, budget = 0;
  bool refetched = false;
};

class Step {
 public:
  explicit Step(const Decode& call);
  int64_t run();

 private:
  const Decode& c;
  const TileKernels& tiles = active_decode_tiles();
  const RowKernels& kernels = active_decode_rows();
  int64_t read_heads, units, unit_rows, rows, job_rows, longest, pieces, ld;
  int64_t query_width, low_width, value_width;
  bool two_planes, causal, prune;
  Buffer<int32_t> lists, chosen;
  Buffer<float> queries, low_queries, query_sums, scores, sums, work;
  std::vector<const int32_t*> list_of;
  std::vector<int64_t> count_of;
  std::vector<Partial> partials;
  std::vector<Row> row_state;
  int64_t work_size = 0;

  template <class Body>
  void each(int64_t items, int64_t cost, Body&& body);
  int64_t make_lists();
  int64_t fill_list(int64_t unit, int32_t* list, int64_t* wrong);
  void prepare_queries();
  void score_piece(int64_t item, bool only_low, float* scratch);
  bool softmax(int64_t unit, bool after_fetch);
  void add_importance(int64_t head);
  void choose(int64_t row, float* scratch);
  void value_piece(int64_t item, float* scratch);
  void whole_unit(int64_t unit, float* scratch);
  void all_units_in_steps();
  void finish_head(int64_t head, float* scratch);
  int64_t head_of(int64_t unit) const { return unit % read_heads * c.kv_heads / read_heads; }
  Rows rows_of(const Cached& tensor, int64_t unit, const int32_t* list, int64_t first,
               int64_t count, int64_t end) const;
  const float* factors_of(const Factors& f, int64_t unit) const {
    return f.data ? f.data + unit / read_heads * f.batch + head_of(unit) * f.head : nullptr;
  }
  void piece_range(int64_t count, int64_t piece, int64_t& begin, int64_t& end) const {
    const int64_t size = round_up((count + pieces - 1) / pieces, 16);
    begin = std::min(count, piece * size);
    end = std::min(count, begin + size);
  }
  void mask_future(int64_t row, const int32_t* list, int64_t first, int64_t n,
                   float* out, Partial& partial) const;
};

// Runs body(item, scratch) for all items, on as many threads as `cost` (elements) is worth.
template <class Body>
void Step::each(int64_t items, int64_t cost, Body&& body) {
  std::atomic<int64_t> next{0};
  const int64_t worth = std::max<int64_t>(1, cost >> 15);
  const int workers = static_cast<int>(std::min({items, worth, int64_t{c.threads}}));
  parallel(workers, [&](int worker) {
    float* scratch = work.data() + worker * work_size;
    for (int64_t item; (item = next.fetch_add(1)) < items;) body(item, scratch);
  });
}

}  // namespace sparseloom::decoding
