// What the .cu files offer to the operators: launches on raw pointers, one pair of files for a
// kernel, one launch each. Weights are contiguous; the current device is that of the pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "dense_plan.h"
#include "plane_plan.h"

namespace lka::cuda {

void direct_forward(const ConvParams& p, const void* weight, const void* bias, cudaStream_t stream);
void direct_backward_input(const ConvParams& p, const void* weight, cudaStream_t stream);
void direct_backward_weight(const ConvParams& p, void* grad_weight, void* grad_bias,
                            cudaStream_t stream);

// Forward and backward-input for the tensor cores, planned by plan_correlate.
void toeplitz_correlate(Storage storage, const CorrelateParams& p, const LaunchShape& shape,
                        cudaStream_t stream);

// The same of small maps, planned by plan_dense_correlate.
void dense_correlate(Storage storage, const DenseCorrelateParams& p, const LaunchShape& shape,
                     cudaStream_t stream);

// The same with planes in shared memory, planned by plan_plane_correlate.
void plane_correlate(Storage storage, const PlaneCorrelateParams& p, const LaunchShape& shape,
                     cudaStream_t stream);

// Forward and backward-input in float32, planned by plan_float_correlate.
void float_correlate(const FloatCorrelateParams& p, const LaunchShape& shape, cudaStream_t stream);

// Backward-weight for the tensor cores: partial sums, planned by plan_weight_gradient, and their
// sum, planned by plan_sum_partials.
void toeplitz_weight_gradient(Storage storage, const WeightGradientParams& p,
                              const LaunchShape& shape, cudaStream_t stream);
void toeplitz_sum_partials(Storage storage, const WeightGradientParams& p, const LaunchShape& shape,
                           void* grad_weight, void* grad_bias, cudaStream_t stream);

// The same of small maps, planned by plan_dense_weight_gradient.
void dense_weight_gradient(Storage storage, const DenseWeightGradientParams& p,
                           const LaunchShape& shape, cudaStream_t stream);
void dense_sum_partials(Storage storage, const DenseWeightGradientParams& p,
                        const LaunchShape& shape, void* grad_weight, void* grad_bias,
                        cudaStream_t stream);

// The same of small kernels, planned by plan_plane_weight_gradient.
void plane_weight_gradient(Storage storage, const PlaneWeightGradientParams& p,
                           const LaunchShape& shape, cudaStream_t stream);
void plane_sum_partials(Storage storage, const PlaneWeightGradientParams& p,
                        const LaunchShape& shape, void* grad_weight, void* grad_bias,
                        cudaStream_t stream);

// The same in float32, planned by plan_float_weight_gradient.
void float_weight_gradient(const FloatWeightGradientParams& p, const LaunchShape& shape,
                           cudaStream_t stream);
void float_sum_partials(const FloatWeightGradientParams& p, const LaunchShape& shape,
                        void* grad_weight, void* grad_bias, cudaStream_t stream);

}  // namespace lka::cuda
