// Launcher of the depthwise weight gradients in float32.
#include "depthwise_launchers.h"
#include "device/sum_partials.cuh"
#include "launch.h"

namespace lka::cuda {
namespace {

__global__ void __launch_bounds__(FloatWeightGradient::kThreads)
    float_weight_gradient_kernel(const __grid_constant__ FloatWeightGradientParams p) {
  extern __shared__ __align__(16) char shared[];
  FloatWeightGradientBlock(p, reinterpret_cast<float*>(shared)).run();
}

__global__ void float_sum_partials_kernel(const __grid_constant__ FloatWeightGradientParams p,
                                          void* grad_weight, void* grad_bias) {
  sum_partials<Float32>(p, grad_weight, grad_bias);
}

}  // namespace

void float_weight_gradient(const FloatWeightGradientParams& p, const LaunchShape& shape,
                           cudaStream_t stream) {
  launch("float_weight_gradient", float_weight_gradient_kernel, shape, stream, p);
}

void float_sum_partials(const FloatWeightGradientParams& p, const LaunchShape& shape,
                        void* grad_weight, void* grad_bias, cudaStream_t stream) {
  launch("float_sum_partials", float_sum_partials_kernel, shape, stream, p, grad_weight, grad_bias);
}

}  // namespace lka::cuda
