// Launchers of depthwise convolution by Fourier transforms: spectra of taps, and the maps.
#include "depthwise_fft.h"
#include "launch.h"

namespace lka::cuda {
namespace {

__global__ void __launch_bounds__(kMostFftThreads, 2)
    fft_spectra_kernel(const __grid_constant__ FftSpectraParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  FftSpectraBlock(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

template <class Storage>
__global__ void __launch_bounds__(kMostFftThreads, 2)
    fft_correlate_kernel(const __grid_constant__ FftCorrelateParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  FftCorrelateBlock<Storage>(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

}  // namespace

void fft_spectra(const FftSpectraParams& p, const LaunchShape& shape, cudaStream_t stream) {
  launch("fft_spectra", fft_spectra_kernel, shape, stream, p);
}

void fft_correlate(Storage storage, const FftCorrelateParams& p, const LaunchShape& shape,
                   cudaStream_t stream) {
  if (storage == Storage::float32)
    launch("fft_correlate<float32>", fft_correlate_kernel<Float32>, shape, stream, p);
  else if (storage == Storage::float16)
    launch("fft_correlate<float16>", fft_correlate_kernel<Float16>, shape, stream, p);
  else
    launch("fft_correlate<bfloat16>", fft_correlate_kernel<BFloat16>, shape, stream, p);
}

}  // namespace lka::cuda
