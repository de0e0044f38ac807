// Which tier runs: the widest that the processor has, or a narrower one by override.
#pragma once

namespace sparseloom {

enum class Tier : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Tier widest_tier();
Tier active_tier();
void set_active_tier(Tier tier);  // at most widest_tier()

}  // namespace sparseloom

// SL_TABLE(ForwardKernels, forward_kernels) declares one table of function pointers per tier, which
// the tier files define as `extern const ForwardKernels forward_kernels = {...};`, and the function
// `const ForwardKernels& active_forward_kernels()`. Use it inside namespace sparseloom.
#if defined(SL_X86)
#define SL_TABLE(Table, name)                                        \
  namespace portable { extern const Table name; }                    \
  namespace avx2 { extern const Table name; }                        \
  namespace avx512 { extern const Table name; }                      \
  namespace avx512_bf16 { extern const Table name; }                 \
  namespace amx { extern const Table name; }                         \
  static inline const Table& active_##name() {                       \
    switch (active_tier()) {                                         \
      case Tier::avx2: return avx2::name;                            \
      case Tier::avx512: return avx512::name;                        \
      case Tier::avx512_bf16: return avx512_bf16::name;              \
      case Tier::amx: return amx::name;                              \
      default: return portable::name;                                \
    }                                                                \
  }
#else
#define SL_TABLE(Table, name)                     \
  namespace portable { extern const Table name; } \
  static inline const Table& active_##name() { return portable::name; }
#endif
