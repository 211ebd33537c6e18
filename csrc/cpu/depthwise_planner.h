// From params to plans: pure functions of sizes.
#pragma once

#include <vector>

#include "depthwise_plan.h"
#include "kernel_table.h"

namespace lka::cpu {

// Owns the phases its plan points at.
struct PlannedConvolution {
  ConvolvePlan plan;
  std::vector<Phase> phases_y, phases_x;
  const DepthwiseKernels* kernels;
  const char* kernel_name;  // what depthwise_kernel_name tells
  int64_t num_tasks, packed_weight_elements;
  double multiply_adds_per_task;  // vector instructions, for the grain of parallel_for
};

struct PlannedWeightGradient {
  WeightGradientPlan plan;
  const DepthwiseKernels* kernels;
  const char* kernel_name;
  int64_t num_tasks, partial_elements;
  double multiply_adds_per_task;
};

PlannedConvolution plan_forward(const ConvParams& p, int num_threads);
// params.input is grad_input (the target) and params.output is grad_output (the source).
PlannedConvolution plan_backward_input(const ConvParams& p, int num_threads);
PlannedWeightGradient plan_backward_weight(const ConvParams& p);

// Both gradients of one convolution from one spectrum of grad_output.
struct SharedSpectra {
  int64_t num_tasks = 0, scratch_elements = 0;
  double multiply_adds_per_task = 0;
};

// Whether one kernel, `both_gradients` of the plans', serves for the two, and is expected to take
// less time than one after the other. The results have the same bits either way.
bool plan_shared_spectra(const PlannedConvolution& input, const PlannedWeightGradient& weight,
                         int num_threads, SharedSpectra& shared);

// Phases of one dimension.
std::vector<Phase> forward_phases(int64_t input, int64_t output, int64_t kernel, int64_t stride,
                                  int64_t dilation, int64_t pad);
std::vector<Phase> backward_input_phases(int64_t input, int64_t output, int64_t kernel,
                                         int64_t stride, int64_t dilation, int64_t pad);

}  // namespace lka::cpu
