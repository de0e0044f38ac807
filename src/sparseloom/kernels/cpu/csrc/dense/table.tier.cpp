// Which dense kernels a tier uses for which type.
#include "dense/dense.hpp"
#include "tier.hpp"

namespace sparseloom::SL_TIER {
namespace dense {
extern const DenseKernels fp32, wide_bf16, wide_fp16;
}

extern const DenseTable dense_table;
const DenseTable dense_table = {{&dense::fp32, &dense::wide_bf16, &dense::wide_fp16}};

}  // namespace sparseloom::SL_TIER
