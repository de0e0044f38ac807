#include "dispatch.hpp"

#include <atomic>

#if defined(SL_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseloom {
namespace {

#if defined(SL_X86)

// The kernel hands out the AMX registers on request, once per process.
bool request_amx() {
#if defined(__linux__)
  constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

Tier detect() {
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Tier::portable;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  if (!(c & (1u << 29))) return Tier::portable;  // F16C
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni")))
    return Tier::avx2;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  if (!(a & (1u << 5))) return Tier::avx512;  // AVX512_BF16
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  // AMX for BF16 and INT8; with it come AVX512-FP16, VBMI and VBMI2.
  const bool tiles = (d & (1u << 22)) && (d & (1u << 24)) && (d & (1u << 25)) &&
                     (d & (1u << 23)) && (c & (1u << 1)) && (c & (1u << 6));
  return tiles && request_amx() ? Tier::amx : Tier::avx512_bf16;
}

#else

Tier detect() { return Tier::portable; }

#endif

std::atomic<int>& active() {
  static std::atomic<int> tier{static_cast<int>(widest_tier())};
  return tier;
}

}  // namespace

Tier widest_tier() {
  static const Tier tier = detect();
  return tier;
}

Tier active_tier() { return static_cast<Tier>(active().load(std::memory_order_relaxed)); }

void set_active_tier(Tier tier) { active().store(static_cast<int>(tier)); }

}  // namespace sparseloom
