// Launchers of weight gradients by Fourier transforms: sums of spectra, then the gradients.
#include "depthwise_fft.h"
#include "launch.h"

namespace lka::cuda {
namespace {

template <class Storage>
__global__ void __launch_bounds__(kMostFftThreads, 2)
    fft_weight_gradient_kernel(const __grid_constant__ FftWeightGradientParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  FftWeightGradientBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

__global__ void __launch_bounds__(kMostFftThreads, 2)
    fft_tap_gradient_kernel(const __grid_constant__ FftTapGradientParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  FftTapGradientBlock(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void fft_weight_gradient(Storage storage, const FftWeightGradientParams& p,
                         const LaunchShape& shape, cudaStream_t stream) {
  if (storage == Storage::float32)
    launch("fft_weight_gradient<float32>", fft_weight_gradient_kernel<Float32>, shape, stream, p);
  else if (storage == Storage::float16)
    launch("fft_weight_gradient<float16>", fft_weight_gradient_kernel<Float16>, shape, stream, p);
  else
    launch("fft_weight_gradient<bfloat16>", fft_weight_gradient_kernel<BFloat16>, shape, stream, p);
}

void fft_tap_gradient(const FftTapGradientParams& p, const LaunchShape& shape,
                      cudaStream_t stream) {
  launch("fft_tap_gradient", fft_tap_gradient_kernel, shape, stream, p);
}

}  // namespace lka::cuda
