#include "facts.hpp"
#include "simd.hpp"

namespace sparseloom::SL_TIER {

extern const TierFacts tier_facts = {SL_TIER_LEVEL, W};

}  // namespace sparseloom::SL_TIER
