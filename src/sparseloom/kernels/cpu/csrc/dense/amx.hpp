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
  Places places;   // of chunks of keys and of means
};

SL_INLINE Sizes sizes(const DenseArgs& a) {
  return {(a.head_dim + CHUNK - 1) / CHUNK, (a.value_dim + 31) / 32 * 2, Places(a)};
}

// Tiles of keys and of values of a chunk: 2 * depth and widths.
SL_INLINE int64_t chunk_tiles(const Sizes& z) { return 2 * z.depth + z.widths; }

// What all items of a key head read, one after the other.
struct Shared {
  char* tiles;     // of each chunk of keys or means
  float* missing;  // of each chunk of means: `missing_weights`
  float* squares;  // of each chunk of keys: the largest squared norm
};

SL_INLINE Shared shared_layout(const Sizes& z, const void* head) {
  char* tiles = static_cast<char*>(const_cast<void*>(head));
  auto* missing = reinterpret_cast<float*>(tiles + z.places.all() * chunk_tiles(z) * TILE);
  return {tiles, missing, missing + z.places.means() * CHUNK};
}

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

// What scores of means start from, in all lanes: log2 of the keys of whole segments, in units of
// scores before they are multiplied by `factor`.
struct Weights {
  alignas(64) float rows[LOG2S][16];
  explicit Weights(float factor) {
    for (int log2 = 0; log2 < LOG2S; ++log2)
      _mm512_store_ps(rows[log2], _mm512_set1_ps(static_cast<float>(log2) / factor));
  }
  // Tiles 0 ... 3; all rows of a tile are the same.
  SL_INLINE void load(int log2) const {
    if (log2 == 0) return zero_tiles();
    _tile_loadd(0, rows[log2], 0);
    _tile_loadd(1, rows[log2], 0);
    _tile_loadd(2, rows[log2], 0);
    _tile_loadd(3, rows[log2], 0);
  }
};

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

// A chunk of keys, or of means over segments of 2^log2 keys.
struct Chunk {
  int log2;
  int64_t at;            // among those of this size
  int64_t place;         // among all
  int kept[2];           // by half of the lanes: a bit for each of its 2^log2 tiles of keys
  const float* missing;  // of means: what the weights lack, null if nothing
  bool masked;           // some lane must not see something of it
  int every() const { return (1 << (1 << log2)) - 1; }
};

struct Block {
  Chunk at[CHUNKS];
  int chunks;
};

// What decides which chunks the queries of an item see.
struct Sight {
  const Queries<Bf16>& lanes;
  const uint8_t* attend;
  const Places& places;
  const float* missing;  // of the key head
};

// -inf where tiles of a chunk are not kept, and where keys are padding, past the end, or later than
// the query sees; means of fewer keys lose weight. `factor` is what scores are multiplied by later.
static inline void forbid_rows(const Sight& sight, const Chunk& chunk, float factor, float* scores) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  const int tiles = 1 << chunk.log2, rows = CHUNK >> chunk.log2;
  for (int q = 0; q < 2; ++q)
    for (int t = 0; chunk.kept[q] != chunk.every() && t < tiles; ++t)
      for (int j = t * rows; !(chunk.kept[q] >> t & 1) && j < (t + 1) * rows; ++j)
        _mm512_store_ps(scores + j * LANES + q * 16, never);
  if (chunk.log2) {
    for (int j = 0; chunk.missing && j < CHUNK; ++j)
      for (int q = 0; q < 2; ++q) {
        float* at = scores + j * LANES + q * 16;
        _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_set1_ps(chunk.missing[j] / factor)));
      }
    return;
  }
  const Queries<Bf16>& lanes = sight.lanes;
  const int64_t j0 = chunk.at * CHUNK;
  if (lanes.least >= j0 + CHUNK - 1 && !sight.attend) return;
  for (int j = 0; j < CHUNK; ++j, scores += LANES) {
    const int64_t key = j0 + j;
    if (key > lanes.most || (sight.attend && !sight.attend[key])) {
      _mm512_store_ps(scores, never);
      _mm512_store_ps(scores + 16, never);
    } else if (key > lanes.least) {
      for (int lane = 0; lane < LANES; ++lane)
        if (lanes.limit[lane] < key) scores[lane] = -__builtin_inff();
    }
  }
}

// The blocks that some query of an item may see, one after the other.
struct Blocks {
  const Sight& sight;
  const bool masked;
  KeptTiles tiles;  // under a mask
  KeptTile ahead;
  bool more = false;
  int64_t next = 0;  // chunk, without a mask

  Blocks(const DenseArgs& a, const DenseItem& item, const Sight& sight)
      : sight(sight), masked(a.offsets) {
    if (!masked) return;
    tiles = kept_tiles(a, item);
    more = tiles.next(ahead);
  }

  // The next chunk that some lane keeps; false after the last one.
  SL_INLINE bool advance(Chunk& chunk) {
    if (!masked) {
      chunk = {0, next, next, {1, 1}, nullptr, false};
      return next++ * CHUNK <= sight.lanes.most;
    }
    if (!more) return false;
    chunk = {ahead.log2, ahead.tile >> ahead.log2, 0, {0, 0}, nullptr, false};
    chunk.place = sight.places.first[chunk.log2] + chunk.at;
    do {
      const int bit = 1 << (ahead.tile & ((1 << chunk.log2) - 1));
      // Lanes without a query keep what the others do.
      if (ahead.kept & 1) chunk.kept[0] |= bit;
      if (ahead.kept & (tiles.rows == 1 ? 1 : 2)) chunk.kept[1] |= bit;
      more = tiles.next(ahead);
    } while (more && ahead.log2 == chunk.log2 && ahead.tile >> chunk.log2 == chunk.at);
    return true;
  }

  // Whether some lane sees some of it; notes if that is not all.
  SL_INLINE bool visible(Chunk& chunk) const {
    const bool kept = chunk.kept[0] == chunk.every() && chunk.kept[1] == chunk.every();
    if (chunk.log2) {
      const float* missing = sight.missing + (chunk.place - sight.places.keys()) * CHUNK;
      const __m512 low = _mm512_loadu_ps(missing), high = _mm512_loadu_ps(missing + 16);
      const __m512 never = _mm512_set1_ps(-__builtin_inff()), none = _mm512_setzero_ps();
      if (_mm512_cmp_ps_mask(_mm512_max_ps(low, high), never, _CMP_EQ_OQ) == 0xffff) return false;
      if (_mm512_cmp_ps_mask(_mm512_min_ps(low, high), none, _CMP_LT_OQ)) chunk.missing = missing;
      chunk.masked = chunk.missing || !kept;
      return true;
    }
    const int64_t first = chunk.at * CHUNK, left = sight.lanes.most + 1 - first;
    if (left <= 0) return false;
    const int64_t live = count_attended(sight.attend, first, left < CHUNK ? left : CHUNK);
    chunk.masked = live < CHUNK || sight.lanes.least < first + CHUNK - 1 || !kept;
    return live > 0;
  }

  SL_INLINE Block take() {
    Block block = {};
    while (block.chunks < CHUNKS && advance(block.at[block.chunks]))
      block.chunks += visible(block.at[block.chunks]);
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

// Attention where no score can leave the range of the powers: see bounded.tier.cpp. `tiles` of the
// key head.
void attend_bounded(const DenseArgs& a, const DenseItem& item, const Sight& sight,
                    const char* tiles, const Memory& m, const __m512 bound[2]);

void column_sums(const DenseArgs& a, const DenseColumns& item, void* memory);

}  // namespace sparseloom::SL_TIER::dense
