// Runs what depthwise_planner.h has planned: tasks to torch's thread pool. In call_scratch and
// task_scratch, so a caller must not hold memory of these.
#pragma once

#include "depthwise_planner.h"

namespace lka::cpu {

// The source and the target are the plan's; weight is (C, kH, kW) and bias (C,), or null, dense and
// in the storage of the plan.
void run(PlannedConvolution& planned, const void* weight, const void* bias);

// Into (C, kH, kW) and (C,), likewise.
void run(PlannedWeightGradient& planned, void* grad_weight, void* grad_bias);

// Both, of one convolution. Its input may be where its gradient goes.
void run(PlannedConvolution& input, PlannedWeightGradient& weight_gradient, const void* weight,
         void* grad_weight, void* grad_bias);

}  // namespace lka::cpu
