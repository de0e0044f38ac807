// Column sums of the probabilities with AMX tiles: the scores once more, now relative to the
// log-sum-exp of their row.
#include "tier.hpp"

#if SL_AMX

#include "dense/amx.hpp"

namespace sparseloom::SL_TIER::dense {
namespace {

// Probabilities of a chunk of queries, summed. Here the lanes are keys and the rows queries.
struct Columns {
  const float* scores;
  const float* lse;
  int64_t seen;  // keys of the block that the next query sees
  bool causal;
  __m512 factor, sum0, sum1;
  Spread spread;

  SL_INLINE void one() {
    const float norm = *lse == -__builtin_inff() ? __builtin_inff() : *lse * LOG2E;
    const uint32_t mask = seen >= LANES ? ~0u : seen <= 0 ? 0u : (1u << seen) - 1;
    const __m512 centre = _mm512_set1_ps(norm);
    const F p0 = power(F{_mm512_fmsub_ps(_mm512_load_ps(scores), factor, centre)});
    const F p1 = power(F{_mm512_fmsub_ps(_mm512_load_ps(scores + 16), factor, centre)});
    sum0 = _mm512_mask_add_ps(sum0, static_cast<__mmask16>(mask), sum0, p0.v);
    sum1 = _mm512_mask_add_ps(sum1, static_cast<__mmask16>(mask >> 16), sum1, p1.v);
    scores += LANES;
    ++lse;
    seen += causal;
    --spread.left;
  }
  SL_INLINE void some() {
    spread.credit += spread.gain;
    while (spread.due()) one();
  }
};

}  // namespace

void column_sums(const DenseArgs& a, const DenseColumns& item, void* memory) {
  const Sizes z = sizes(a);
  const Memory m = layout(a, memory);
  const int count = static_cast<int>(item.count);
  const int64_t shift = a.kv_len - a.q_len;
  const Heads h = find_heads(a, item.batch, item.head / (a.heads / a.kv_heads));
  const Bf16* keys[LANES];
  for (int i = 0; i < count; ++i) keys[i] = h.key + (item.first + i) * a.key.row;
  pack_pairs(keys, count, a.head_dim, z.depth, a.scale < 0, m.lanes);
  const Bf16* queries = static_cast<const Bf16*>(a.query.data) + item.batch * a.query.batch +
                        item.head * a.query.head;
  const float* lse = a.lse + (item.batch * a.heads + item.head) * a.q_len;
  const __m512 c = _mm512_set1_ps(positive_factor(a));
  char* tiles = reinterpret_cast<char*>(m.acc);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
  set_tiles();
  const int64_t start = a.causal && item.first > shift ? item.first - shift : 0;
  int rows = 0;  // of the chunk before, whose scores are ready
  for (int64_t i0 = start, turn = 0; i0 < a.q_len || rows; i0 += CHUNK, turn ^= 1) {
    const int64_t left = a.q_len - i0, done = rows ? i0 - CHUNK : 0;
    Columns work = {m.scores[turn ^ 1], lse + done,
                    a.causal ? done + shift + 1 - item.first : LANES, a.causal, c, sum0, sum1,
                    Spread(rows, 4 * static_cast<int>(z.depth))};
    if (left > 0) {
      for (int half = 0; half < 2; ++half)
        copy_tiles(queries + (i0 + half * 16) * a.query.row, a.query.row, left - half * 16,
                   a.head_dim, z.depth, tiles + half * z.depth * TILE);
      asm volatile("" ::: "memory");  // what tiles load must have been stored
      zero_tiles();
      for (int64_t d = 0; d < z.depth; ++d)
        multiply(tiles + d * TILE, tiles + (z.depth + d) * TILE, m.lanes + 2 * d * TILE,
                 m.lanes + (2 * d + 1) * TILE, 64, work);
    }
    while (work.spread.left > 0) work.one();
    sum0 = work.sum0;
    sum1 = work.sum1;
    if (left > 0) store_sums(m.scores[turn]);
    rows = left < 0 ? 0 : left < CHUNK ? static_cast<int>(left) : CHUNK;
  }
  _tile_release();
  float total[LANES];
  _mm512_storeu_ps(total, sum0);
  _mm512_storeu_ps(total + 16, sum1);
  float* out = a.columns + (item.batch * a.heads + item.head) * a.kv_len + item.first;
  const uint8_t* attended = a.attend ? a.attend + item.batch * a.kv_len + item.first : nullptr;
  for (int i = 0; i < count; ++i) out[i] = attended && !attended[i] ? 0.0f : total[i];
}

}  // namespace sparseloom::SL_TIER::dense
#endif
