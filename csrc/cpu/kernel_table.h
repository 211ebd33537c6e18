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
  // Backward-input and backward-weight in one, of the transform kernels; the tasks are its own.
  void (*both_gradients)(const ConvolvePlan&, const WeightGradientPlan&, int64_t begin, int64_t end,
                         void* scratch);
};

// The steps of the fused adapter; `lanes` is the width of a block of the bottleneck, `wide_lanes`
// that of the model dimension, and projections come with zeros up to a multiple of `rank_group`
// rows. `convolve` works on one image and `backward` on parts of the batch; the others on tokens of
// an image, so that threads may share it, and with the convolution to be done by others.
struct AdapterKernels {
  int lanes, wide_lanes, rank_group;
  int64_t (*scratch_elements)(const AdapterParams&);
  int64_t (*step_scratch_elements)(const AdapterParams&);  // without `convolve` and `backward`
  void (*down)(const AdapterParams&, int64_t image, int64_t begin, int64_t end, void* scratch);
  void (*convolve)(const AdapterParams&, int64_t image, void* scratch);
  void (*up)(const AdapterParams&, int64_t image, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const AdapterParams&, const AdapterGradients&, int64_t part_begin,
                   int64_t part_end, void* scratch);
  void (*activate)(const AdapterParams&, int64_t image, int64_t begin, int64_t end);
  // The gradients in front of the convolution and behind it.
  void (*backward_up)(const AdapterParams&, const AdapterGradients&, int64_t part, int64_t image,
                      int64_t begin, int64_t end, void* scratch);
  void (*backward_down)(const AdapterParams&, const AdapterGradients&, int64_t part, int64_t image,
                        int64_t begin, int64_t end, void* scratch);
};

// Full vectors, and half vectors for channel counts that would leave most lanes idle: float only,
// and not of the baseline, where the two are the same.
struct KernelSet {
  DepthwiseKernels full, half;
  // The same with neighbouring columns in the lanes, for small kernels over contiguous rows.
  DepthwiseKernels planar_full, planar_half;
  // The same through Fourier transforms.
  DepthwiseKernels fft_full, fft_half;
  AdapterKernels adapter_full, adapter_half;
  // Forward and backward-input with two rows of the source in a lane; null where there is no such
  // instruction.
  DepthwiseKernels paired_full, paired_half;
  // Backward-weight of small planes with all their elements in the lanes; null likewise.
  DepthwiseKernels flat;
};

struct KernelTable {
  KernelSet in_float;   // for float32, bfloat16 and float16
  KernelSet in_double;  // for float64
};

const KernelTable& kernels_baseline();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#endif
// GCC 9 does not know these instructions.
#if defined(__x86_64__) && __GNUC__ >= 10
#define LKA_BUILD_AVX512_BF16
const KernelSet& kernels_avx512_bf16();  // for bfloat16 alone
#endif

// The kernels for a storage type, of the widest instruction set of this processor;
// LKA_CPU_CAPABILITY=avx512, avx2 or baseline narrows it.
const KernelSet& kernels(Storage storage);

// The name of that instruction set: "avx512_bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace lka::cpu
