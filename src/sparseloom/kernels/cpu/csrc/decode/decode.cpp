// Values in pieces, results, and the order of the steps.
#include <cmath>

#include "decode/step.hpp"

namespace sparseloom {
namespace decoding {

// ---------------------------------------------------------------- values

// The weighted sums of one piece of the values that a job reads: those of a unit, or, where each
// row chose its own, those of a row.
void Step::value_piece(int64_t item, float* scratch) {
  const int64_t job = item / pieces, n = job_rows, row0 = job * n, unit = row0 / unit_rows;
  const int32_t* list = prune ? chosen.data() + job * ld : list_of[unit];
  int64_t begin, end;
  piece_range(prune ? row_state[job].budget : count_of[unit], item % pieces, begin, end);
  const float* factors = c.value_scale.row ? factors_of(c.value_scale, unit) : nullptr;
  float *weights[GROUP], *out[GROUP];
  std::fill_n(sums.data() + item * n * value_width, n * value_width, 0.0f);
  for (int64_t at = begin; at < end; at += TILE) {
    const int64_t size = std::min<int64_t>(TILE, end - at);
    for (int64_t r0 = 0; r0 < n; r0 += GROUP) {
      const int group = static_cast<int>(std::min<int64_t>(GROUP, n - r0));
      for (int i = 0; i < group; ++i) {
        const Row& state = row_state[row0 + r0 + i];
        weights[i] = scratch + i * TILE;
        out[i] = sums.data() + (item * n + r0 + i) * value_width;
        kernels.weigh(scores.data() + (row0 + r0 + i) * ld + at, size, state.maximum,
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
    const int64_t job = row / job_rows, at = row % job_rows;
    std::fill(total, total + c.value_dim, 0.0f);
    for (int64_t p = 0; p < pieces; ++p) {
      const float* from = sums.data() + ((job * pieces + p) * job_rows + at) * value_width;
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

// Everything for one unit: no thread waits for another.
void Step::whole_unit(int64_t unit, float* scratch) {
  const int64_t head0 = unit * unit_rows / c.q_len, head1 = (unit + 1) * unit_rows / c.q_len;
  score_piece(unit, false, scratch);
  if (softmax(unit, false)) {
    score_piece(unit, true, scratch);
    softmax(unit, true);
  }
  if (c.key_importance)
    for (int64_t head = head0; head < head1; ++head) add_importance(head);
  const int64_t job0 = unit * unit_rows / job_rows, job1 = (unit + 1) * unit_rows / job_rows;
  for (int64_t job = job0; job < job1; ++job) {
    if (prune) choose(job, scratch);
    value_piece(job, scratch);
  }
  for (int64_t head = head0; head < head1; ++head) finish_head(head, scratch);
}

// Few units: the threads share each of them, and wait for one another between the steps.
void Step::all_units_in_steps() {
  const int64_t heads = c.batch * c.heads, key_cost = units * longest * c.head_dim;
  each(units * pieces, key_cost,
       [&](int64_t item, float* scratch) { score_piece(item, false, scratch); });
  std::vector<int64_t> flat;
  for (int64_t unit = 0; unit < units; ++unit)
    if (softmax(unit, false)) flat.push_back(unit);
  each(static_cast<int64_t>(flat.size()) * pieces, key_cost, [&](int64_t i, float* scratch) {
    score_piece(flat[i / pieces] * pieces + i % pieces, true, scratch);
  });
  for (int64_t unit : flat) softmax(unit, true);
  if (c.key_importance)
    each(heads, rows * longest * 8, [&](int64_t head, float*) { add_importance(head); });
  if (prune)
    each(rows, rows * longest * 8, [&](int64_t row, float* scratch) { choose(row, scratch); });
  const int64_t jobs = rows / job_rows;
  each(jobs * pieces, jobs * longest * c.value_dim,
       [&](int64_t item, float* scratch) { value_piece(item, scratch); });
  each(heads, rows * c.value_dim * pieces,
       [&](int64_t head, float* scratch) { finish_head(head, scratch); });
}

int64_t Step::run() {
  work_size = GROUP * TILE + (prune ? ld : 0) + value_width;
  work.resize(work_size * c.threads);
  const int64_t wrong = make_lists();
  if (wrong >= 0) return wrong;
  prepare_queries();
  scores.resize(rows * ld);
  if (prune) chosen.resize(rows * ld);
  sums.resize(rows * pieces * value_width);
  partials.assign(units * pieces * unit_rows, {});
  row_state.assign(rows, {});
  if (pieces > 1) all_units_in_steps();
  else
    each(units, units * longest * c.head_dim,
         [&](int64_t unit, float* scratch) { whole_unit(unit, scratch); });
  return -1;
}

}  // namespace decoding

int64_t decode(const Decode& call) { return decoding::Step(call).run(); }

}  // namespace sparseloom
