// Launchers of the fused adapter forward for narrow ranks.
#include "adapter_launch.h"

namespace lka::cuda {
namespace {

// Blocks of *up* on a multiprocessor that registers are for. On 9.0 three do without local memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
constexpr int kUpBlocks = 3;
#else
constexpr int kUpBlocks = 2;
#endif

template <class Storage, int kRankTiles>
__global__ void __launch_bounds__(256, 3)
    adapter_narrow_down_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterNarrowDownBlock<Storage, kRankTiles>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(256, kUpBlocks)
    adapter_narrow_up_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  AdapterNarrowUpBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void adapter_narrow_down(Storage storage, const AdapterParams& p, const LaunchShape& shape,
                         cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  if (p.rank <= 8)
    launch("adapter_narrow_down<8>",
           brain ? adapter_narrow_down_kernel<BFloat16, 1> : adapter_narrow_down_kernel<Float16, 1>,
           shape, stream, p);
  else
    launch("adapter_narrow_down<16>",
           brain ? adapter_narrow_down_kernel<BFloat16, 2> : adapter_narrow_down_kernel<Float16, 2>,
           shape, stream, p);
}

void adapter_narrow_up(Storage storage, const AdapterParams& p, const LaunchShape& shape,
                       cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch("adapter_narrow_up",
         brain ? adapter_narrow_up_kernel<BFloat16> : adapter_narrow_up_kernel<Float16>, shape,
         stream, p);
}

}  // namespace lka::cuda
