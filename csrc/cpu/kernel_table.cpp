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

namespace {

enum Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Capability processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!has_f16c() || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return kAvx2;
#if defined(LKA_BUILD_AVX512_BF16)
  if (__builtin_cpu_supports("avx512bf16")) return kAvx512Bf16;
#endif
  return kAvx512;
#else
  return kBaseline;
#endif
}

Capability capability() {
  static const Capability chosen = [] {
    const Capability widest = processor();
    const char* limit = std::getenv("LKA_CPU_CAPABILITY");
    for (int narrower = kBaseline; limit && narrower < widest; ++narrower)
      if (std::strcmp(limit, kNames[narrower]) == 0) return Capability(narrower);
    return widest;
  }();
  return chosen;
}

const KernelTable& table() {
#if defined(__x86_64__)
  if (capability() >= kAvx512) return kernels_avx512();
  if (capability() == kAvx2) return kernels_avx2();
#endif
  return kernels_baseline();
}

}  // namespace

const KernelSet& kernels(Storage storage) {
  if (storage == Storage::float64) return table().in_double;
#if defined(LKA_BUILD_AVX512_BF16)
  if (storage == Storage::bfloat16 && capability() == kAvx512Bf16) return kernels_avx512_bf16();
#endif
  return table().in_float;
}

const char* instruction_set() { return kNames[capability()]; }

}  // namespace lka::cpu
