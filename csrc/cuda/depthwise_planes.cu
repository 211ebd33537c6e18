// Launchers of depthwise convolution for tensor cores with planes in shared memory.
#include "depthwise_launchers.h"
#include "device/sum_partials.cuh"
#include "launch.h"

namespace lka::cuda {
namespace {

// Five blocks of four warps are as many as the shared memory of an H100 has room for.
template <class Storage, int kTiles, bool kWide>
__global__ void __launch_bounds__(kWide ? 256 : 128, kWide ? 2 : 5)
    plane_correlate_kernel(const __grid_constant__ PlaneCorrelateParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  PlaneCorrelateBlock<Storage, kTiles, kWide>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
void correlate(const char* name, const PlaneCorrelateParams& p, const LaunchShape& shape,
               cudaStream_t stream) {
  const bool wide = p.source.row_vector == 0;
  const auto with = [&](auto kernel) { launch(name, kernel, shape, stream, p); };
  switch (plane_tiles(p)) {
    case 1:
      return with(wide ? plane_correlate_kernel<Storage, 1, true>
                       : plane_correlate_kernel<Storage, 1, false>);
    case 2:
      return with(wide ? plane_correlate_kernel<Storage, 2, true>
                       : plane_correlate_kernel<Storage, 2, false>);
    case 4:
      return with(wide ? plane_correlate_kernel<Storage, 4, true>
                       : plane_correlate_kernel<Storage, 4, false>);
    case 7: return with(plane_correlate_kernel<Storage, 7, false>);
    default: return with(plane_correlate_kernel<Storage, 8, false>);
  }
}

template <class Storage, bool kWide>
__global__ void __launch_bounds__(kWide ? 256 : 128, kWide ? 2 : 5)
    plane_weight_gradient_kernel(const __grid_constant__ PlaneWeightGradientParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  PlaneWeightGradientBlock<Storage, kWide>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
void weight_gradient(const char* name, const PlaneWeightGradientParams& p, const LaunchShape& shape,
                     cudaStream_t stream) {
  if (p.input.row_vector == 0)
    launch(name, plane_weight_gradient_kernel<Storage, true>, shape, stream, p);
  else
    launch(name, plane_weight_gradient_kernel<Storage, false>, shape, stream, p);
}

template <class Storage>
__global__ void plane_sum_partials_kernel(const __grid_constant__ PlaneWeightGradientParams p,
                                          void* grad_weight, void* grad_bias) {
#if __CUDA_ARCH__ >= 800
  sum_partials<Storage>(p, grad_weight, grad_bias);
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void plane_weight_gradient(Storage storage, const PlaneWeightGradientParams& p,
                           const LaunchShape& shape, cudaStream_t stream) {
  if (storage == Storage::bfloat16)
    weight_gradient<BFloat16>("plane_weight_gradient<bfloat16>", p, shape, stream);
  else
    weight_gradient<Float16>("plane_weight_gradient<float16>", p, shape, stream);
}

void plane_sum_partials(Storage storage, const PlaneWeightGradientParams& p,
                        const LaunchShape& shape, void* grad_weight, void* grad_bias,
                        cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch(brain ? "sum_partials<bfloat16>" : "sum_partials<float16>",
         brain ? plane_sum_partials_kernel<BFloat16> : plane_sum_partials_kernel<Float16>, shape,
         stream, p, grad_weight, grad_bias);
}

void plane_correlate(Storage storage, const PlaneCorrelateParams& p, const LaunchShape& shape,
                     cudaStream_t stream) {
  if (storage == Storage::bfloat16)
    correlate<BFloat16>("plane_correlate<bfloat16>", p, shape, stream);
  else
    correlate<Float16>("plane_correlate<float16>", p, shape, stream);
}

}  // namespace lka::cuda
