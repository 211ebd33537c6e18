// What depthwise_fft.cu and depthwise_fft_weight.cu offer, as depthwise_launchers.h.
#pragma once

#include <cuda_runtime_api.h>

#include "fft_plan.h"

namespace lka::cuda {

// Spectra of taps, planned by plan_fft_spectra. Whoever has them may use them for many calls of one
// geometry, forward and backward-input.
void fft_spectra(const FftSpectraParams& p, const LaunchShape& shape, cudaStream_t stream);

// Forward and backward-input, planned by plan_fft_correlate.
void fft_correlate(Storage storage, const FftCorrelateParams& p, const LaunchShape& shape,
                   cudaStream_t stream);

// Sums of spectra, planned by plan_fft_weight_gradient, and the gradients that they make, planned
// by plan_fft_tap_gradient.
void fft_weight_gradient(Storage storage, const FftWeightGradientParams& p,
                         const LaunchShape& shape, cudaStream_t stream);
void fft_tap_gradient(const FftTapGradientParams& p, const LaunchShape& shape, cudaStream_t stream);

}  // namespace lka::cuda
