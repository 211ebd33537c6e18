// Launchers of depthwise convolution on small maps in the dense form.
#include "depthwise_launchers.h"
#include "device/sum_partials.cuh"
#include "launch.h"

namespace lka::cuda {
namespace {

template <class Storage, int kRowTiles>
__global__ void __launch_bounds__(256, 2)
    dense_correlate_kernel(const __grid_constant__ DenseCorrelateParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  DenseCorrelateBlock<Storage, kRowTiles>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage, int kTiles>
__global__ void __launch_bounds__(256, 2)
    dense_weight_gradient_kernel(const __grid_constant__ DenseWeightGradientParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  DenseWeightGradientBlock<Storage, kTiles>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
void correlate(const char* name, const DenseCorrelateParams& p, const LaunchShape& shape,
               cudaStream_t stream) {
  if (p.row_tiles == 4)
    launch(name, dense_correlate_kernel<Storage, 4>, shape, stream, p);
  else if (p.row_tiles == 2)
    launch(name, dense_correlate_kernel<Storage, 2>, shape, stream, p);
  else
    launch(name, dense_correlate_kernel<Storage, 1>, shape, stream, p);
}

template <class Storage>
void weight_gradient(const char* name, const DenseWeightGradientParams& p, const LaunchShape& shape,
                     cudaStream_t stream) {
  if (p.tiles == 8)
    launch(name, dense_weight_gradient_kernel<Storage, 8>, shape, stream, p);
  else
    launch(name, dense_weight_gradient_kernel<Storage, 14>, shape, stream, p);
}

template <class Storage>
__global__ void dense_sum_partials_kernel(const __grid_constant__ DenseWeightGradientParams p,
                                          void* grad_weight, void* grad_bias) {
#if __CUDA_ARCH__ >= 800
  sum_partials<Storage>(p, grad_weight, grad_bias);
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void dense_correlate(Storage storage, const DenseCorrelateParams& p, const LaunchShape& shape,
                     cudaStream_t stream) {
  if (storage == Storage::bfloat16)
    correlate<BFloat16>("dense_correlate<bfloat16>", p, shape, stream);
  else
    correlate<Float16>("dense_correlate<float16>", p, shape, stream);
}

void dense_weight_gradient(Storage storage, const DenseWeightGradientParams& p,
                           const LaunchShape& shape, cudaStream_t stream) {
  if (storage == Storage::bfloat16)
    weight_gradient<BFloat16>("dense_weight_gradient<bfloat16>", p, shape, stream);
  else
    weight_gradient<Float16>("dense_weight_gradient<float16>", p, shape, stream);
}

void dense_sum_partials(Storage storage, const DenseWeightGradientParams& p,
                        const LaunchShape& shape, void* grad_weight, void* grad_bias,
                        cudaStream_t stream) {
  const bool brain = storage == Storage::bfloat16;
  launch(brain ? "sum_partials<bfloat16>" : "sum_partials<float16>",
         brain ? dense_sum_partials_kernel<BFloat16> : dense_sum_partials_kernel<Float16>, shape,
         stream, p, grad_weight, grad_bias);
}

}  // namespace lka::cuda
