// What runs the launches of depthwise_order.h and adapter_order.h on a GPU: memory from torch,
// kernels on a stream. Included by .cu files only.
#pragma once

#include "../stable.h"
#include "adapter_launchers.h"
#include "depthwise_fft.h"
#include "depthwise_launchers.h"

namespace lka::cuda {

class Runner {
 public:
  Runner(Storage storage, const Tensor& like, cudaStream_t stream)
      : storage_(storage), like_(like), stream_(stream) {}

  float* floats(int64_t count) {
    return static_cast<float*>(keep(empty(like_, {count}, ScalarType::Float)));
  }
  void* rank_tensor(const AdapterCall& call) {
    return keep(empty(like_, {call.batch, call.rank, call.tokens}, like_.scalar_type()));
  }

#define LKA_RUN(NAME, PARAMS) \
  void NAME(const PARAMS& p, const LaunchShape& shape) { cuda::NAME(storage_, p, shape, stream_); }
  LKA_RUN(toeplitz_correlate, CorrelateParams)
  LKA_RUN(toeplitz_weight_gradient, WeightGradientParams)
  LKA_RUN(dense_correlate, DenseCorrelateParams)
  LKA_RUN(dense_weight_gradient, DenseWeightGradientParams)
  LKA_RUN(plane_correlate, PlaneCorrelateParams)
  LKA_RUN(plane_weight_gradient, PlaneWeightGradientParams)
  LKA_RUN(fft_correlate, FftCorrelateParams)
  LKA_RUN(fft_weight_gradient, FftWeightGradientParams)
  LKA_RUN(adapter_down, AdapterParams)
  LKA_RUN(adapter_up, AdapterParams)
  LKA_RUN(adapter_narrow_down, AdapterParams)
  LKA_RUN(adapter_narrow_up, AdapterParams)
  LKA_RUN(adapter_up_backward, AdapterParams)
  LKA_RUN(adapter_narrow_up_backward, AdapterParams)
  LKA_RUN(adapter_convolve_backward, AdapterParams)
  LKA_RUN(adapter_down_backward, AdapterParams)
  LKA_RUN(adapter_narrow_down_backward, AdapterParams)
  LKA_RUN(adapter_weight_gradient, AdapterParams)
  LKA_RUN(adapter_sums, AdapterSums)
#undef LKA_RUN
#define LKA_RUN(NAME, PARAMS) \
  void NAME(const PARAMS& p, const LaunchShape& shape) { cuda::NAME(p, shape, stream_); }
  LKA_RUN(float_correlate, FloatCorrelateParams)
  LKA_RUN(float_weight_gradient, FloatWeightGradientParams)
  LKA_RUN(fft_spectra, FftSpectraParams)
  LKA_RUN(fft_tap_gradient, FftTapGradientParams)
#undef LKA_RUN

  void sum_partials(const WeightGradientParams& p, const LaunchShape& shape, void* grad_weight,
                    void* grad_bias) {
    toeplitz_sum_partials(storage_, p, shape, grad_weight, grad_bias, stream_);
  }
  void sum_partials(const PlaneWeightGradientParams& p, const LaunchShape& shape, void* grad_weight,
                    void* grad_bias) {
    plane_sum_partials(storage_, p, shape, grad_weight, grad_bias, stream_);
  }
  void sum_partials(const DenseWeightGradientParams& p, const LaunchShape& shape, void* grad_weight,
                    void* grad_bias) {
    dense_sum_partials(storage_, p, shape, grad_weight, grad_bias, stream_);
  }
  void sum_partials(const FloatWeightGradientParams& p, const LaunchShape& shape, void* grad_weight,
                    void* grad_bias) {
    float_sum_partials(p, shape, grad_weight, grad_bias, stream_);
  }

 private:
  void* keep(Tensor tensor) {
    memory_.push_back(tensor);
    return tensor.data_ptr();
  }

  Storage storage_;
  const Tensor& like_;
  cudaStream_t stream_;
  std::vector<Tensor> memory_;
};

}  // namespace lka::cuda
