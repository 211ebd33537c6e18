// Launchers of the fused adapter forward.
#include "adapter_launch.h"

namespace lka::cuda {
namespace {

template <class Storage>
__global__ void __launch_bounds__(256, 2)
    adapter_down_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterDownBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(256, 2)
    adapter_up_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterUpBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

LKA_ADAPTER_LAUNCHER(adapter_down, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_up, AdapterParams)

}  // namespace lka::cuda
