// Packing chosen lanes to the front, where no instruction does it (AVX2).
#pragma once

#include "simd.hpp"

#if SL_AVX2 && !SL_AVX512

namespace sparseloom::SL_TIER {

// For each set of lanes, the lanes in it.
struct LaneSets {
  alignas(64) uint8_t lanes[256][8] = {};
  constexpr LaneSets() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][n++] = static_cast<uint8_t>(lane);
  }
};
static constexpr LaneSets lane_sets{};

// The lanes of the set, packed to the front.
SL_INLINE __m256i packed(__m256i x, unsigned set) {
  const auto* lanes = reinterpret_cast<const __m128i*>(lane_sets.lanes[set]);
  return _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(_mm_loadl_epi64(lanes)));
}
SL_INLINE F packed(F x, unsigned set) {
  return {_mm256_castsi256_ps(packed(_mm256_castps_si256(x.v), set))};
}
SL_INLINE unsigned set_of(__m256 lanes) { return static_cast<unsigned>(_mm256_movemask_ps(lanes)); }
SL_INLINE unsigned set_of(__m256i lanes) { return set_of(_mm256_castsi256_ps(lanes)); }
SL_INLINE __m256i load8(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SL_INLINE void store8(int32_t* p, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}

}  // namespace sparseloom::SL_TIER

#endif
