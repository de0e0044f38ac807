// What one tier may use. Files named *.tier.cpp are compiled once per tier, with SL_TIER set to its
// name and SL_TIER_LEVEL to its rank, into the namespace sparseloom::SL_TIER.
//
// Such a file must not instantiate anything from the standard library that could be emitted out of
// line (containers, std::sort, ...): the linker keeps one copy for all tiers, perhaps the one with
// AVX-512 instructions.
#pragma once

#if !defined(SL_TIER) || !defined(SL_TIER_LEVEL)
#error "a tier file must be compiled with SL_TIER and SL_TIER_LEVEL"
#endif

#define SL_AVX2 (SL_TIER_LEVEL >= 1)         // AVX2, FMA, F16C
#define SL_AVX512 (SL_TIER_LEVEL >= 2)       // AVX-512 F, BW, DQ, VL, CD and VNNI
#define SL_AVX512_BF16 (SL_TIER_LEVEL >= 3)  // and BF16
#define SL_AMX (SL_TIER_LEVEL >= 4)          // and AMX tiles for INT8 and BF16

#define SL_INLINE inline __attribute__((always_inline))
#define SL_LAMBDA __attribute__((always_inline))
