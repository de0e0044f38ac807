// What a tier is: asked for by `sparseloom info`, and proof that dispatch takes the right one.
#pragma once

#include "dispatch.hpp"

namespace sparseloom {

struct TierFacts {
  int rank;
  int lanes;  // fp32 numbers per vector
};

SL_TABLE(TierFacts, tier_facts)

}  // namespace sparseloom
