// Which dense kernels a tier uses for which type.
#include "dense/dense.hpp"
#include "tier.hpp"

namespace sparseloom::SL_TIER {
namespace dense {
extern const DenseKernels fp32, wide_bf16, wide_fp16;
#if SL_AMX
extern const DenseKernels tiles_bf16;
static constexpr const DenseKernels* bf16 = &tiles_bf16;
#else
static constexpr const DenseKernels* bf16 = &wide_bf16;
#endif
}  // namespace dense

extern const DenseTable dense_table;
const DenseTable dense_table = {{&dense::fp32, dense::bf16, &dense::wide_fp16}};

}  // namespace sparseloom::SL_TIER
