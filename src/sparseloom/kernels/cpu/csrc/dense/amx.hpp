// What the AMX kernels of dense attention share: where things lie, products of tiles, masks.
//
// Tiles of 16 x 16 hold scores S^T = K Q^T (a row per key, a column per query), probabilities P^T in
// pairs of keys as bf16, and sums O^T = V^T P^T. Items are 32 queries, keys come in chunks of 32.
// Vector instructions stand between the products of tiles, a few after each: then the tile unit and
// the vector units work at once.
#pragma once

#include "dense/tiles.hpp"

namespace sparseloom::SL_TIER::dense {

constexpr int64_t KB = 64;         // keys of a block: what its stages touch stays in the first cache
constexpr int CHUNKS = KB / CHUNK;  // of a block

// Scores of |s| < LIMIT (in units of log2) need no maximum: powers relative to LIMIT - HIGH reach
// from 2^-100 to 2^HIGH, and neither they nor their sums leave the range of fp32.
constexpr float HIGH = 40.0f, LIMIT = 70.0f;

struct Sizes {
  int64_t depth;   // chunks of head_dim
  int64_t widths;  // tiles of value_dim, an even number
  int64_t chunks;  // of the keys
};

SL_INLINE Sizes sizes(const DenseArgs& a) {
  return {(a.head_dim + CHUNK - 1) / CHUNK, (a.value_dim + 31) / 32 * 2,
          (a.kv_len + CHUNK - 1) / CHUNK};
}

// Tiles of keys and of values, per key head and chunk: 2 * depth and widths.
SL_INLINE int64_t chunk_tiles(const Sizes& z) { return 2 * z.depth + z.widths; }

struct Heads { const Bf16 *key, *value; };

SL_INLINE Heads find_heads(const DenseArgs& a, int64_t batch, int64_t kv_head) {
  return {static_cast<const Bf16*>(a.key.data) + batch * a.key.batch + kv_head * a.key.head,
          static_cast<const Bf16*>(a.value.data) + batch * a.value.batch + kv_head * a.value.head};
}

// Rows of 32 queries, 128 bytes.
constexpr int64_t ROW = 128, LANES = 32;

struct Memory {
  char* lanes;       // queries: depth x 2 tiles of pairs
  float* scores[2];  // KB rows
  char* powers[2];   // KB / 2 rows of pairs
  float* acc;        // 16 * widths rows
};

SL_INLINE Memory layout(const DenseArgs& a, void* memory) {
  char* at = static_cast<char*>(memory);
  Memory m;
  m.lanes = at;
  at += 2 * sizes(a).depth * TILE;
  for (int i = 0; i < 2; ++i, at += KB * ROW) m.scores[i] = reinterpret_cast<float*>(at);
  for (int i = 0; i < 2; ++i, at += KB / 2 * ROW) m.powers[i] = at;
  m.acc = reinterpret_cast<float*>(at);
  return m;
}

// Two by two tiles at `at`, tiles 0 ... 3.
SL_INLINE void load_sums(const float* at) {
  _tile_loadd(0, at, ROW);
  _tile_loadd(1, at + 16, ROW);
  _tile_loadd(2, at + 16 * LANES, ROW);
  _tile_loadd(3, at + 16 * LANES + 16, ROW);
}

SL_INLINE void store_sums(float* at) {
  _tile_stored(0, at, ROW);
  _tile_stored(1, at + 16, ROW);
  _tile_stored(2, at + 16 * LANES, ROW);
  _tile_stored(3, at + 16 * LANES + 16, ROW);
}

// Tiles 0 ... 3 += (two tiles one above the other) (two tiles side by side), with some of the
// vector work after each product.
template <class Vectors>
SL_INLINE void multiply(const char* upper, const char* lower, const char* left, const char* right,
                        int64_t stride, Vectors& vectors) {
  _tile_loadd(4, upper, 64);
  _tile_loadd(6, left, stride);
  _tile_dpbf16ps(0, 4, 6);
  vectors.some();
  _tile_loadd(7, right, stride);
  _tile_dpbf16ps(1, 4, 7);
  vectors.some();
  _tile_loadd(5, lower, 64);
  _tile_dpbf16ps(2, 5, 6);
  vectors.some();
  _tile_dpbf16ps(3, 5, 7);
  vectors.some();
}

constexpr int BOTH = 3;  // halves of the lanes

// Some chunks of keys, by number, and which halves of the lanes keep each of them.
struct Block {
  int64_t at[CHUNKS];
  int kept[CHUNKS];
  int chunks;
  bool masked;
};

// -inf where keys of a chunk are padding, past the end, later than the query sees, or not kept.
static inline void forbid_rows(const Queries<Bf16>& lanes, const uint8_t* attend, int64_t chunk, int kept, float* scores) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  const int64_t j0 = chunk * CHUNK;
  if (kept != BOTH)
    for (int j = 0; j < CHUNK; ++j) _mm512_store_ps(scores + j * LANES + (kept == 1 ? 16 : 0), never);
  if (lanes.least >= j0 + CHUNK - 1 && !attend) return;
  for (int j = 0; j < CHUNK; ++j, scores += LANES) {
    const int64_t key = j0 + j;
    if (key > lanes.most || (attend && !attend[key])) {
      _mm512_store_ps(scores, never);
      _mm512_store_ps(scores + 16, never);
    } else if (key > lanes.least) {
      for (int lane = 0; lane < LANES; ++lane)
        if (lanes.limit[lane] < key) scores[lane] = -__builtin_inff();
    }
  }
}

// The blocks of keys that some query of an item may see, one after the other.
struct Blocks {
  const Queries<Bf16>& lanes;
  const uint8_t* attend;
  bool masked;
  KeptTiles tiles;       // under a mask
  int64_t chunk = -1;

  Blocks(const DenseArgs& a, const DenseItem& item, const Queries<Bf16>& lanes, const uint8_t* attend)
      : lanes(lanes), attend(attend), masked(a.indices) {
    if (masked) tiles = kept_tiles(a, item);
  }

  // The next chunk; false after the last one that some lane sees and keeps.
  SL_INLINE bool advance(int& kept) {
    if (masked) {
      chunk = tiles.next(kept);
      // Lanes without a query keep what the others do.
      if (tiles.rows == 1) kept = BOTH;
    } else {
      ++chunk;
      kept = BOTH;
    }
    return chunk >= 0 && chunk * CHUNK <= lanes.most;
  }

  SL_INLINE Block take() {
    Block block = {};
    for (int kept; block.chunks < CHUNKS && advance(kept);) {
      const int64_t first = chunk * CHUNK, left = lanes.most + 1 - first;
      const int64_t live = count_attended(attend, first, left < CHUNK ? left : CHUNK);
      if (live == 0) continue;
      block.masked |= live < CHUNK || lanes.least < first + CHUNK - 1 || kept != BOTH;
      block.at[block.chunks] = chunk;
      block.kept[block.chunks++] = kept;
    }
    return block;
  }
};

// Vector work spread evenly over a number of products.
struct Spread {
  int left, products, gain, credit;
  SL_INLINE Spread(int work, int over) : left(work), products(over), gain(work), credit(0) {}
  SL_INLINE bool due() {
    if (credit < products) return false;
    credit -= products;
    return true;
  }
};

// Scores are not multiplied before their maximum is taken, so the factor must be positive: the sign
// of the scale goes into the queries, and 0 becomes a number that no score makes visible.
SL_INLINE float positive_factor(const DenseArgs& a) {
  const float c = __builtin_fabsf(a.scale) * LOG2E;
  return c < 1e-37f ? 1e-37f : c;
}

// Writes out, lse and magnitude from the sums acc; the powers were relative to 2^top.
void finish_rows(const DenseArgs& a, const Queries<Bf16>& lanes, const __m512 top[2],
                 const __m512 sum[2], const float* acc);

// Attention where no score can leave the range of the powers: see bounded.tier.cpp.
void attend_bounded(const DenseArgs& a, const DenseItem& item, const Queries<Bf16>& lanes,
                    const char* tiles, const Memory& m, const __m512 bound[2]);

void column_sums(const DenseArgs& a, const DenseColumns& item, void* memory);

}  // namespace sparseloom::SL_TIER::dense
