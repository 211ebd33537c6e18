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

void adapter_forward(Storage storage, const AdapterForward& plan, cudaStream_t stream) {
  LKA_LAUNCH_ADAPTER(adapter_down_kernel, storage, plan.down.shape, stream, plan.down.params);
  if (plan.correlate.shape.blocks > 0)
    toeplitz_correlate(storage, plan.correlate.params, plan.correlate.shape, stream);
  LKA_LAUNCH_ADAPTER(adapter_up_kernel, storage, plan.up.shape, stream, plan.up.params);
}

}  // namespace lka::cuda
