// Lists of keys, scores in pieces, softmax.
#include <cmath>

#include "decode/step.hpp"

namespace sparseloom::decoding {
namespace {

constexpr int64_t SMALLEST_PIECE = 512;
constexpr float LOG2E = 1.44269504088896f;

}  // namespace

Step::Step(const Decode& call) : c(call) {
  read_heads = c.keep_heads == c.heads ? c.heads : c.kv_heads;
  units = c.batch * read_heads;
  rows = c.batch * c.heads * c.q_len;
  unit_rows = rows / units;
  longest = c.keep_heads ? c.kept : c.kv_len;
  two_planes = c.key_low.data != nullptr;
  causal = c.causal && c.q_len > 1;
  prune = c.value_keep >= 0;
  job_rows = prune ? 1 : unit_rows;
  // Several pieces per thread even out what the threads get done.
  const int64_t wanted = (4 * c.threads + units - 1) / units;
  pieces = std::max<int64_t>(1, std::min(wanted, longest / SMALLEST_PIECE));
  ld = round_up(longest, 16) + 16;
  query_width = round_up(c.head_dim, 16);
  low_width = 2 * round_up(c.head_dim / 2, 16);
  value_width = round_up(c.value_dim, 16);
}

// ---------------------------------------------------------------- which keys

int64_t Step::fill_list(int64_t unit, int32_t* list, int64_t* wrong) {
  const int64_t b = unit / read_heads, h = c.keep_heads == 1 ? 0 : unit % read_heads;
  const uint8_t* padding = c.padding ? c.padding + b * c.padding_stride : nullptr;
  if (c.keep_heads) {
    const int64_t at = (b * c.keep_heads + h) * c.kept;
    const int64_t n = kernels.compact(static_cast<const char*>(c.keep) + at * (c.keep_is_64 ? 8 : 4),
                                      c.keep_is_64, c.kept, c.kv_len, padding, list, wrong);
    if (*wrong >= 0) *wrong += at;
    return n;
  }
  int64_t count = 0;
  for (int64_t key = 0; key < c.kv_len; ++key) {
    list[count] = static_cast<int32_t>(key);
    count += padding[key] != 0;
  }
  return count;
}

// Returns the first place in `keep` that names no key, or -1.
int64_t Step::make_lists() {
  list_of.assign(units, nullptr);
  count_of.assign(units, longest);
  if (!c.keep_heads && !c.padding) return -1;
  // One list per batch entry where the heads share theirs.
  const bool shared = !c.keep_heads || c.keep_heads == 1;
  const int64_t count = shared ? c.batch : units, step = shared ? read_heads : 1;
  lists.resize(count * (longest + 1));
  std::vector<int64_t> wrong(count, -1);
  each(count, count * longest, [&](int64_t i, float*) {
    int32_t* list = lists.data() + i * (longest + 1);
    const int64_t n = fill_list(i * step, list, &wrong[i]);
    for (int64_t unit = i * step; unit < (i + 1) * step; ++unit) {
      // All keys in order need no list.
      list_of[unit] = !c.keep_heads && n == c.kv_len ? nullptr : list;
      count_of[unit] = n;
    }
  });
  for (int64_t place : wrong)
    if (place >= 0) return place;
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
void Step::mask_future(int64_t row, const int32_t* list, int64_t first, int64_t n,
                       float* out, Partial& partial) const {
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
        if (causal) mask_future(group[i], list, first, n, out[i], partial);
        else partial.keys += n;
        kernels.accumulate(out[i], n, &partial.maximum, &partial.sum);
      }
    }
  }
}

// The softmax of the rows of a unit from their pieces. At first, returns whether a row is so flat
// that it fetches the low plane, and prepares that; after it, looks at those rows only.
bool Step::softmax(int64_t unit, bool after_fetch) {
  bool flat = false;
  for (int64_t r = 0; r < unit_rows; ++r) {
    Row& state = row_state[unit * unit_rows + r];
    if (after_fetch && !state.refetched) continue;
    state.maximum = -INF;
    state.sum = 0;
    state.keys = 0;
    const auto partial = [&](int64_t p) -> Partial& {
      return partials[(unit * pieces + p) * unit_rows + r];
    };
    for (int64_t p = 0; p < pieces; ++p) {
      state.maximum = std::max(state.maximum, partial(p).maximum);
      state.keys += partial(p).keys;
    }
    for (int64_t p = 0; p < pieces; ++p)
      if (partial(p).maximum > -INF)
        state.sum += partial(p).sum * std::exp2(partial(p).maximum - state.maximum);
    state.budget = state.keys;
    if (prune) {
      // The small term undoes representation error, as in 0.29 * 100 = 28.999...
      const double budget = std::floor(static_cast<double>(state.keys) * c.value_keep + 1e-9);
      state.budget = std::min(state.keys, std::max<int64_t>(1, static_cast<int64_t>(budget)));
    }
    if (after_fetch || !two_planes || c.progressive < 0) continue;
    // The largest probability is 1 / sum.
    state.refetched = state.sum > 0 && 1.0 / state.sum < c.progressive;
    flat |= state.refetched;
    if (state.refetched)
      for (int64_t p = 0; p < pieces; ++p) partial(p) = {};
  }
  return flat;
}

}  // namespace sparseloom::decoding
