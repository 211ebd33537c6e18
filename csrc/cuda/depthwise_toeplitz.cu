// Launcher of the depthwise correlation for tensor cores.
#include "depthwise_launchers.h"
#include "launch.h"

namespace lka::cuda {
namespace {

template <class Storage>
__global__ void __launch_bounds__(256) correlate_kernel(const __grid_constant__ CorrelateParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  ToeplitzCorrelateBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void toeplitz_correlate(Storage storage, const CorrelateParams& p, const LaunchShape& shape,
                        cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch(brain ? "toeplitz_correlate<bfloat16>" : "toeplitz_correlate<float16>",
         brain ? correlate_kernel<BFloat16> : correlate_kernel<Float16>, shape, stream, p);
}

}  // namespace lka::cuda
