#include "kernel_table.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lka::cpu {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows this name.
static bool has_f16c() {
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const KernelTable& kernels() {
  static const KernelTable& table = []() -> const KernelTable& {
#if defined(__x86_64__)
    const char* limit = std::getenv("LKA_CPU_CAPABILITY");
    const bool baseline_only = limit && std::strcmp(limit, "baseline") == 0;
    const bool at_most_avx2 = baseline_only || (limit && std::strcmp(limit, "avx2") == 0);
    __builtin_cpu_init();
    if (!has_f16c()) return kernels_baseline();
    if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return kernels_avx512();
    if (!baseline_only && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
      return kernels_avx2();
#endif
    return kernels_baseline();
  }();
  return table;
}

}  // namespace lka::cpu
