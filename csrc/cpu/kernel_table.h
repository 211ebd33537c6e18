// The functions that each instruction set provides, and the choice among them at run time.
#pragma once

#include "adapter_params.h"
#include "depthwise_plan.h"

namespace lka::cpu {

// Kernels for one arithmetic type and one number of lanes.
struct DepthwiseKernels {
  int lanes;
  void (*pack_weights)(const ConvolvePlan&, int64_t begin, int64_t end);
  void (*convolve)(const ConvolvePlan&, int64_t begin, int64_t end, void* scratch);
  void (*weight_gradient)(const WeightGradientPlan&, int64_t begin, int64_t end, void* scratch);
};

// The steps of the fused adapter; `lanes` is the width of a block of the bottleneck and
// `wide_lanes` that of the model dimension. Each works on one image, or on parts of the batch.
struct AdapterKernels {
  int lanes, wide_lanes;
  int64_t (*scratch_elements)(const AdapterParams&);
  void (*down)(const AdapterParams&, int64_t image, int64_t begin, int64_t end, void* scratch);
  void (*convolve)(const AdapterParams&, int64_t image, void* scratch);
  void (*up)(const AdapterParams&, int64_t image, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const AdapterParams&, const AdapterGradients&, int64_t part_begin,
                   int64_t part_end, void* scratch);
};

struct KernelTable {
  const char* name;  // "avx512", "avx2" or "baseline"
  // Full vectors, and half vectors for channel counts that would leave most lanes idle.
  DepthwiseKernels float_full, float_half, double_full, double_half;
  // The same with neighbouring columns in the lanes, for small kernels over contiguous rows.
  DepthwiseKernels planar_float_full, planar_float_half, planar_double_full, planar_double_half;
  AdapterKernels adapter_float_full, adapter_float_half, adapter_double_full, adapter_double_half;
};

const KernelTable& kernels_baseline();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#endif

// The widest instruction set of this processor; LKA_CPU_CAPABILITY=avx2 or baseline narrows it.
const KernelTable& kernels();

}  // namespace lka::cpu
