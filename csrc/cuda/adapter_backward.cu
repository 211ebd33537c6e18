// Launchers of the fused adapter backward.
#include "adapter_launch.h"

namespace lka::cuda {
namespace {

template <class Storage>
__global__ void __launch_bounds__(256, 2)
    adapter_up_backward_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterUpBackwardBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(128, 4)
    adapter_convolve_backward_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterConvolveBackwardBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(256, 2)
    adapter_down_backward_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterDownBackwardBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(256, 2)
    adapter_weight_gradient_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterWeightGradientBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(AdapterSums::kElements* AdapterSums::kSlices)
    adapter_sums_kernel(const __grid_constant__ AdapterSums p) {
  __shared__ float shared[AdapterSums::kElements * AdapterSums::kSlices];
#if __CUDA_ARCH__ >= 800
  sum_adapter_partials<Storage>(p, shared);
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void adapter_backward(Storage storage, const AdapterBackward& plan, cudaStream_t stream) {
  LKA_LAUNCH_ADAPTER(adapter_up_backward_kernel, storage, plan.up.shape, stream, plan.up.params);
  LKA_LAUNCH_ADAPTER(adapter_weight_gradient_kernel, storage, plan.up_weight.shape, stream,
                     plan.up_weight.params);
  if (plan.correlate.shape.blocks > 0)
    toeplitz_correlate(storage, plan.correlate.params, plan.correlate.shape, stream);
  LKA_LAUNCH_ADAPTER(adapter_convolve_backward_kernel, storage, plan.convolve.shape, stream,
                     plan.convolve.params);
  if (plan.taps.shape.blocks > 0)
    toeplitz_weight_partials(storage, plan.taps.params, plan.taps.shape, stream);
  LKA_LAUNCH_ADAPTER(adapter_down_backward_kernel, storage, plan.down.shape, stream,
                     plan.down.params);
  LKA_LAUNCH_ADAPTER(adapter_weight_gradient_kernel, storage, plan.down_weight.shape, stream,
                     plan.down_weight.params);
}

void adapter_sums(Storage storage, const AdapterSums& sums, const LaunchShape& shape,
                  cudaStream_t stream) {
  LKA_LAUNCH_ADAPTER(adapter_sums_kernel, storage, shape, stream, sums);
}

}  // namespace lka::cuda
