// The functions that each instruction set provides, and the choice among them at run time.
#pragma once

#include "depthwise_plan.h"

namespace lka::cpu {

// Kernels for one arithmetic type and one number of lanes.
struct DepthwiseKernels {
  int lanes;
  void (*pack_weights)(const ConvolvePlan&, int64_t begin, int64_t end);
  void (*convolve)(const ConvolvePlan&, int64_t begin, int64_t end, void* scratch);
  void (*weight_gradient)(const WeightGradientPlan&, int64_t begin, int64_t end, void* scratch);
};

struct KernelTable {
  const char* name;  // "avx512", "avx2" or "baseline"
  // Full vectors, and half vectors for channel counts that would leave most lanes idle.
  DepthwiseKernels float_full, float_half, double_full, double_half;
};

const KernelTable& kernels_baseline();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#endif

// The widest instruction set of this processor; LKA_CPU_CAPABILITY=avx2 or baseline narrows it.
const KernelTable& kernels();

}  // namespace lka::cpu
