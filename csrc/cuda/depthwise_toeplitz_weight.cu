// Launcher of the depthwise weight gradients for tensor cores.
#include "depthwise_launchers.h"
#include "device/sum_partials.cuh"
#include "launch.h"

namespace lka::cuda {
namespace {

template <class Storage>
__global__ void __launch_bounds__(256)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  WeightGradientBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void sum_partials_kernel(const __grid_constant__ WeightGradientParams p,
                                    void* grad_weight, void* grad_bias) {
#if __CUDA_ARCH__ >= 800
  sum_partials<Storage>(p, grad_weight, grad_bias);
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void toeplitz_weight_gradient(Storage storage, const WeightGradientParams& p,
                              const LaunchShape& shape, cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch(brain ? "toeplitz_weight_gradient<bfloat16>" : "toeplitz_weight_gradient<float16>",
         brain ? weight_gradient_kernel<BFloat16> : weight_gradient_kernel<Float16>, shape, stream,
         p);
}

void toeplitz_sum_partials(Storage storage, const WeightGradientParams& p, const LaunchShape& shape,
                           void* grad_weight, void* grad_bias, cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch(brain ? "sum_partials<bfloat16>" : "sum_partials<float16>",
         brain ? sum_partials_kernel<BFloat16> : sum_partials_kernel<Float16>, shape, stream, p,
         grad_weight, grad_bias);
}

}  // namespace lka::cuda
