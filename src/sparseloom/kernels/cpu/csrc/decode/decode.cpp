// The driver of one decoding step: lists of keys, scores in pieces, softmax, values in pieces.
#include "decode/decode.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "decode/scratch.hpp"
#include "threads.hpp"

namespace sparseloom {
namespace {

constexpr int TILE = 256;   // keys whose scores or values are worked on at once
constexpr int GROUP = 16;   // query rows that go over a tile together
constexpr int64_t SMALLEST_PIECE = 512;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896f;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A piece of a unit: a range of its keys, and what they give for one of its rows.
struct Partial {
  float maximum = -INF, sum = 0;
  int64_t keys = 0;
};

struct Row {
  float maximum = -INF, sum = 0;
  int64_t keys = 0, budget = 0;
  int pieces = 0;  // how many sums of values to add up, from `first_piece` on
  int64_t first_piece = 0;
  bool refetched = false;
};

// The query rows that read the same keys: all queries of the heads that share a key head, or of one
// head where each has its own list of keys.
class Step {
 public:
  explicit Step(const Decode& call);
  int64_t run();

 private:
  const Decode& c;
  const TileKernels& tiles = active_decode_tiles();
  const RowKernels& kernels = active_decode_rows();
  int64_t read_heads, units, unit_rows, rows, longest, pieces, ld;
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
  int64_t fill_list(int64_t unit, int32_t* list);
  void prepare_queries();
  void score_piece(int64_t item, bool only_low, float* scratch);
  void combine(bool refetched_only);
  void attend_piece(int64_t item, float* scratch);
  void add_importance(int64_t head);
  void choose(int64_t row, float* scratch);
  void value_piece(int64_t item, int64_t row0, int64_t n, const int32_t* list, int64_t first,
                   int64_t count, float* scratch);
  void finish_head(int64_t head, float* scratch);
  int64_t head_of(int64_t unit) const { return unit % read_heads * (c.kv_heads) / read_heads; }
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
  void mask_future(int64_t unit, int64_t row, const int32_t* list, int64_t first, int64_t n,
                   float* out, Partial& partial) const;
};

Step::Step(const Decode& call) : c(call) {
  read_heads = c.keep_heads == c.heads ? c.heads : c.kv_heads;
  units = c.batch * read_heads;
  rows = c.batch * c.heads * c.q_len;
  unit_rows = rows / units;
  longest = c.keep_heads ? c.kept : c.kv_len;
  two_planes = c.key_low.data != nullptr;
  causal = c.causal && c.q_len > 1;
  prune = c.value_keep >= 0;
  // Several pieces per thread even out what the threads get done.
  const int64_t wanted = (4 * c.threads + units - 1) / units;
  pieces = std::max<int64_t>(1, std::min(wanted, longest / SMALLEST_PIECE));
  ld = round_up(longest, 16) + 16;
  query_width = round_up(c.head_dim, 16);
  low_width = 2 * round_up(c.head_dim / 2, 16);
  value_width = round_up(c.value_dim, 16);
}

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

// ---------------------------------------------------------------- which keys

template <class Index>
int64_t first_wrong(const Index* keep, int64_t n, int64_t kv_len) {
  // Most lists are right: one pass without branches, then the search.
  bool wrong = false;
  for (int64_t i = 0; i < n; ++i) wrong |= keep[i] < -1 || keep[i] >= kv_len;
  if (wrong)
    for (int64_t i = 0; i < n; ++i)
      if (keep[i] < -1 || keep[i] >= kv_len) return i;
  return -1;
}

template <class Index>
int64_t compact(const Index* keep, int64_t n, const uint8_t* padding, int32_t* list) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Index key = keep[i];
    list[count] = static_cast<int32_t>(key);
    count += key >= 0 && (!padding || padding[key]);
  }
  return count;
}

int64_t Step::fill_list(int64_t unit, int32_t* list) {
  const int64_t b = unit / read_heads, h = c.keep_heads == 1 ? 0 : unit % read_heads;
  const uint8_t* padding = c.padding ? c.padding + b * c.padding_stride : nullptr;
  if (c.keep_heads) {
    const int64_t at = (b * c.keep_heads + h) * c.kept;
    return c.keep_is_64
               ? compact(static_cast<const int64_t*>(c.keep) + at, c.kept, padding, list)
               : compact(static_cast<const int32_t*>(c.keep) + at, c.kept, padding, list);
  }
  int64_t count = 0;
  for (int64_t key = 0; key < c.kv_len; ++key) {
    list[count] = static_cast<int32_t>(key);
    count += padding[key] != 0;
  }
  return count;
}

int64_t Step::make_lists() {
  list_of.assign(units, nullptr);
  count_of.assign(units, longest);
  if (!c.keep_heads && !c.padding) return -1;
  if (c.keep_heads) {
    const int64_t n = c.batch * c.keep_heads * c.kept;
    std::atomic<int64_t> wrong{n};
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(c.threads, n >> 14));
    each(parts, n, [&](int64_t part, float*) {
      const int64_t begin = n * part / parts, size = n * (part + 1) / parts - begin;
      int64_t at = c.keep_is_64
                       ? first_wrong(static_cast<const int64_t*>(c.keep) + begin, size, c.kv_len)
                       : first_wrong(static_cast<const int32_t*>(c.keep) + begin, size, c.kv_len);
      if (at < 0) return;
      at += begin;
      for (int64_t old = wrong.load(); at < old && !wrong.compare_exchange_weak(old, at);) {}
    });
    if (wrong.load() < n) return wrong.load();
  }
  // One list per batch entry where the heads share theirs.
  const bool shared = !c.keep_heads || c.keep_heads == 1;
  const int64_t count = shared ? c.batch : units, step = shared ? read_heads : 1;
  lists.resize(count * (longest + 1));
  each(count, count * longest, [&](int64_t i, float*) {
    int32_t* list = lists.data() + i * (longest + 1);
    const int64_t n = fill_list(i * step, list);
    for (int64_t unit = i * step; unit < (i + 1) * step; ++unit) {
      // All keys in order need no list.
      list_of[unit] = !c.keep_heads && n == c.kv_len ? nullptr : list;
      count_of[unit] = n;
    }
  });
  return -1;
}

// ---------------------------------------------------------------- scores

// Queries in fp32 times all factors that their scores share, so that scores are powers of two; for
// the low plane each half is padded on its own.
void Step::prepare_queries() {
  const int64_t dim = c.head_dim, half = dim / 2;
  queries.resize(rows * query_width);
  query_sums.resize(rows);
  if (two_planes) low_queries.resize(rows * low_width);
  const float high_factor = std::ldexp(1.0f, c.low_bits);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t unit = row / unit_rows, head = row / c.q_len % c.heads;
    const char* from = c.query.data + row / (c.heads * c.q_len) * c.query.batch +
                       head * c.query.head + row % c.q_len * c.query.row;
    float* to = queries.data() + row * query_width;
    kernels.widen(c.query.element, from, dim, to);
    std::fill(to + dim, to + query_width, 0.0f);
    const float* factors = factors_of(c.key_scale, unit);
    float common = c.scale * LOG2E;
    if (factors && c.key_scale.row == 0 && c.key_scale.dim == 0) common *= *factors;
    for (int64_t d = 0; d < dim; ++d) to[d] *= common;
    if (c.key_scale.dim)
      for (int64_t d = 0; d < dim; ++d) to[d] *= factors[d * c.key_scale.dim];
    float sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += to[d];
    query_sums.data()[row] = sum;
    if (two_planes) {
      float* low = low_queries.data() + row * low_width;
      std::fill(low, low + low_width, 0.0f);
      std::copy(to, to + half, low);
      std::copy(to + half, to + dim, low + low_width / 2);
      for (int64_t d = 0; d < dim; ++d) to[d] *= high_factor;
    }
  }
}

Rows Step::rows_of(const Cached& tensor, int64_t unit, const int32_t* list, int64_t first,
                   int64_t count, int64_t end) const {
  const char* data = tensor.data + unit / read_heads * tensor.batch + head_of(unit) * tensor.head;
  return {data,  tensor.row, list ? list + first : nullptr, first, end - first,
          static_cast<int>(count)};
}

// Hides the keys that come after the row's token, and counts the others.
void Step::mask_future(int64_t unit, int64_t row, const int32_t* list, int64_t first, int64_t n,
                       float* out, Partial& partial) const {
  (void)unit;
  const int64_t limit = c.kv_len - c.q_len + row % c.q_len;
  if (!list) {
    const int64_t seen = std::clamp<int64_t>(limit + 1 - first, 0, n);
    std::fill(out + seen, out + n, -INF);
    partial.keys += seen;
    return;
  }
  int64_t seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool hidden = list[first + i] > limit;
    out[i] = hidden ? -INF : out[i];
    seen += !hidden;
  }
  partial.keys += seen;
}

// Scores of one piece for its rows: from the high plane, or from both, or, for the rows that fetch
// the low plane now, what that adds.
void Step::score_piece(int64_t item, bool only_low, float* scratch) {
  const int64_t unit = item / pieces, piece = item % pieces;
  const int32_t* list = list_of[unit];
  int64_t begin, end;
  piece_range(count_of[unit], piece, begin, end);
  const bool low_too = two_planes && !only_low && c.progressive < 0;
  const float* token_factors = c.key_scale.row ? factors_of(c.key_scale, unit) : nullptr;
  const float fill = two_planes && !low_too ? c.fill : 0.0f;

  const float *high_query[GROUP], *low_query[GROUP];
  float *out[GROUP], *dots[GROUP];
  for (int64_t first = begin; first < end; first += TILE) {
    const int64_t n = std::min<int64_t>(TILE, end - first);
    for (int64_t r = 0; r < unit_rows;) {
      int64_t group[GROUP];
      int size = 0;
      for (; r < unit_rows && size < GROUP; ++r) {
        const int64_t row = unit * unit_rows + r;
        if (only_low && !row_state[row].refetched) continue;
        group[size] = row;
        high_query[size] = queries.data() + row * query_width;
        low_query[size] = two_planes ? low_queries.data() + row * low_width : nullptr;
        out[size] = scores.data() + row * ld + first;
        dots[size] = scratch + size * TILE;
        ++size;
      }
      if (size == 0) break;
      const int dim = static_cast<int>(c.head_dim);
      if (!only_low) {
        const bool plain = fill == 0 && !token_factors;
        tiles.scores[static_cast<int>(c.key.element)](
            {rows_of(c.key, unit, list, first, n, end), dim, size, high_query, plain ? out : dots});
        if (!plain)
          for (int i = 0; i < size; ++i)
            kernels.finish(out[i], dots[i], n, false, fill * query_sums.data()[group[i]],
                           token_factors, c.key_scale.row, list ? list + first : nullptr, first);
      }
      if (only_low || low_too) {
        tiles.scores[static_cast<int>(c.key_low.element)](
            {rows_of(c.key_low, unit, list, first, n, end), dim, size, low_query, dots});
        const float less = only_low ? -c.fill : 0.0f;
        for (int i = 0; i < size; ++i)
          kernels.finish(out[i], dots[i], n, true, less * query_sums.data()[group[i]],
                         token_factors, c.key_scale.row, list ? list + first : nullptr, first);
      }
      for (int i = 0; i < size; ++i) {
        Partial& partial = partials[item * unit_rows + group[i] % unit_rows];
        if (causal) mask_future(unit, group[i], list, first, n, out[i], partial);
        else partial.keys += n;
        kernels.accumulate(out[i], n, &partial.maximum, &partial.sum);
      }
    }
  }
}

// The softmax of each row from its pieces.
void Step::combine(bool refetched_only) {
  for (int64_t row = 0; row < rows; ++row) {
    Row& state = row_state[row];
    if (refetched_only && !state.refetched) continue;
    const int64_t unit = row / unit_rows;
    float maximum = -INF, sum = 0;
    int64_t keys = 0;
    for (int64_t p = 0; p < pieces; ++p) {
      const Partial& partial = partials[(unit * pieces + p) * unit_rows + row % unit_rows];
      maximum = std::max(maximum, partial.maximum);
      keys += partial.keys;
    }
    for (int64_t p = 0; p < pieces; ++p) {
      const Partial& partial = partials[(unit * pieces + p) * unit_rows + row % unit_rows];
      if (partial.maximum > -INF) sum += partial.sum * std::exp2(partial.maximum - maximum);
    }
    state.maximum = maximum;
    state.sum = sum;
    state.keys = keys;
    state.budget = keys;
    if (prune) {
      // The small term undoes representation error, as in 0.29 * 100 = 28.999...
      const double budget = std::floor(static_cast<double>(keys) * c.value_keep + 1e-9);
      state.budget = std::min(keys, std::max<int64_t>(1, static_cast<int64_t>(budget)));
    }
  }
}

// ---------------------------------------------------------------- values

// Adds the values of `count` keys, weighted by the probabilities of n rows from row0 on, into the
// sums of piece `item`.
void Step::value_piece(int64_t item, int64_t row0, int64_t n, const int32_t* list, int64_t first,
                       int64_t count, float* scratch) {
  const int64_t unit = row0 / unit_rows;
  const float* factors = c.value_scale.row ? factors_of(c.value_scale, unit) : nullptr;
  float *weights[GROUP], *out[GROUP];
  const int64_t end = first + count;
  for (int64_t at = first; at < end; at += TILE) {
    const int64_t size = std::min<int64_t>(TILE, end - at);
    for (int64_t r0 = 0; r0 < n; r0 += GROUP) {
      const int group = static_cast<int>(std::min<int64_t>(GROUP, n - r0));
      for (int i = 0; i < group; ++i) {
        const int64_t row = row0 + r0 + i;
        const Row& state = row_state[row];
        weights[i] = scratch + i * TILE;
        out[i] = sums.data() + (item * n + r0 + i) * value_width;
        kernels.weigh(scores.data() + row * ld + at, size, state.maximum,
                      state.sum > 0 ? 1 / state.sum : 0.0f, weights[i]);
        if (factors)
          for (int64_t k = 0; k < size; ++k)
            weights[i][k] *= factors[(list ? list[at + k] : at + k) * c.value_scale.row];
      }
      tiles.values[static_cast<int>(c.value.element)](
          {rows_of(c.value, unit, list, at, size, end), static_cast<int>(c.value_dim), group,
           weights, out});
    }
  }
}

// Moves the scores that read their values to the front of the row.
void Step::choose(int64_t row, float* scratch) {
  Row& state = row_state[row];
  const int64_t unit = row / unit_rows;
  if (state.budget > 0)
    state.budget = kernels.select(scores.data() + row * ld, count_of[unit], state.budget,
                                  list_of[unit], chosen.data() + row * ld, scratch);
}

// Probabilities summed over the queries of a head, before any value is pruned.
void Step::add_importance(int64_t head) {
  const int64_t unit = head * c.q_len / unit_rows;
  const int32_t* list = list_of[unit];
  float* into = c.key_importance + head * c.kv_len;
  float weights[TILE];
  for (int64_t first = 0; first < count_of[unit]; first += TILE) {
    const int64_t n = std::min<int64_t>(TILE, count_of[unit] - first);
    for (int64_t row = head * c.q_len; row < (head + 1) * c.q_len; ++row) {
      const Row& state = row_state[row];
      kernels.weigh(scores.data() + row * ld + first, n, state.maximum,
                    state.sum > 0 ? 1 / state.sum : 0.0f, weights);
      for (int64_t i = 0; i < n; ++i) into[list ? list[first + i] : first + i] += weights[i];
    }
  }
}

// Sums over the pieces, scaled and converted; statistics.
void Step::finish_head(int64_t head, float* scratch) {
  float importance = 0;
  const int64_t unit = head * c.q_len / unit_rows;
  const float* factors = factors_of(c.value_scale, unit);
  const int64_t width = c.query.element == Element::f32 ? 4 : 2;
  for (int64_t row = head * c.q_len; row < (head + 1) * c.q_len; ++row) {
    const Row& state = row_state[row];
    float* total = scratch;
    const int64_t per_piece = prune ? 1 : unit_rows, at = prune ? 0 : row % unit_rows;
    const int64_t job = prune ? row : unit;
    std::fill(total, total + c.value_dim, 0.0f);
    for (int64_t p = 0; p < pieces; ++p) {
      const float* from = sums.data() + ((job * pieces + p) * per_piece + at) * value_width;
      for (int64_t d = 0; d < c.value_dim; ++d) total[d] += from[d];
    }
    float common = 1;
    if (c.renormalise && prune) {
      float left = 0;
      for (int64_t first = 0; first < state.budget; first += TILE) {
        float weights[TILE];
        const int64_t n = std::min<int64_t>(TILE, state.budget - first);
        kernels.weigh(scores.data() + row * ld + first, n, state.maximum, 1 / state.sum, weights);
        for (int64_t i = 0; i < n; ++i) left += weights[i];
      }
      if (left > 0) common = 1 / left;
    }
    if (factors && !c.value_scale.row && !c.value_scale.dim) common *= *factors;
    for (int64_t d = 0; d < c.value_dim; ++d) total[d] *= common;
    if (factors && c.value_scale.dim)
      for (int64_t d = 0; d < c.value_dim; ++d) total[d] *= factors[d * c.value_scale.dim];
    for (int64_t d = 0; d < c.value_dim; ++d) importance += std::fabs(total[d]);
    kernels.narrow(c.query.element, total, c.value_dim,
                   static_cast<char*>(c.out) + row * c.value_dim * width);
    if (c.keys_read) {
      c.keys_read[row] = state.keys;
      c.values_read[row] = state.budget;
      c.refetched[row] = state.refetched;
    }
  }
  if (c.head_importance) c.head_importance[head] = importance;
}

// ---------------------------------------------------------------- the step

int64_t Step::run() {
  work_size = GROUP * TILE + round_up(prune ? ld : 0, 16) + value_width;
  work.resize(work_size * c.threads);
  const int64_t wrong = make_lists();
  if (wrong >= 0) return wrong;
  prepare_queries();
  scores.resize(rows * ld);
  partials.assign(units * pieces * unit_rows, {});
  row_state.assign(rows, {});

  const int64_t key_cost = units * longest * c.head_dim;
  each(units * pieces, key_cost,
       [&](int64_t item, float* scratch) { score_piece(item, false, scratch); });
  combine(false);
  if (two_planes && c.progressive >= 0) {
    std::vector<int64_t> flat;
    for (int64_t row = 0; row < rows; ++row) {
      Row& state = row_state[row];
      state.refetched = state.sum > 0 && 1.0 / state.sum < c.progressive;
      const int64_t unit = row / unit_rows;
      if (!state.refetched) continue;
      for (int64_t p = 0; p < pieces; ++p)
        partials[(unit * pieces + p) * unit_rows + row % unit_rows] = {};
      if (flat.empty() || flat.back() != unit) flat.push_back(unit);
    }
    if (!flat.empty()) {
      const int64_t items = static_cast<int64_t>(flat.size()) * pieces;
      each(items, key_cost, [&](int64_t i, float* scratch) {
        score_piece(flat[i / pieces] * pieces + i % pieces, true, scratch);
      });
      combine(true);
    }
  }
  if (c.key_importance)
    each(c.batch * c.heads, rows * longest * 8,
         [&](int64_t head, float*) { add_importance(head); });

  const int64_t jobs = prune ? rows : units, job_rows = prune ? 1 : unit_rows;
  sums.resize(jobs * pieces * job_rows * value_width);
  std::fill(sums.data(), sums.data() + sums.size(), 0.0f);
  if (prune) {
    chosen.resize(rows * ld);
    each(rows, rows * longest * 8, [&](int64_t row, float* scratch) { choose(row, scratch); });
  }
  each(jobs * pieces, jobs * longest * c.value_dim, [&](int64_t item, float* scratch) {
    const int64_t job = item / pieces;
    int64_t begin, end;
    piece_range(prune ? row_state[job].budget : count_of[job], item % pieces, begin, end);
    value_piece(item, job * job_rows, job_rows, prune ? chosen.data() + job * ld : list_of[job],
                begin, end - begin, scratch);
  });
  each(c.batch * c.heads, rows * c.value_dim * pieces,
       [&](int64_t head, float* scratch) { finish_head(head, scratch); });
  return -1;
}

}  // namespace

int64_t decode(const Decode& call) { return Step(call).run(); }

}  // namespace sparseloom
