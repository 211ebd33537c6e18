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
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  sum_adapter_partials<Storage>(p, reinterpret_cast<float*>(shared));
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

LKA_ADAPTER_LAUNCHER(adapter_up_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_convolve_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_down_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_weight_gradient, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_sums, AdapterSums)

}  // namespace lka::cuda
