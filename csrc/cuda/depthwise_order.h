// The launches of depthwise convolution in their order, and the memory between them. The operators
// and tests/cuda_on_cpu run the same functions, each with a runner of its own, which has
//   float* floats(int64_t count): memory that is not initialised and lives as long as the runner,
//   a function for every launcher of depthwise_launchers.h and depthwise_fft.h, without the storage
//   type and the stream.
// Every function returns why the call cannot be served, in which case nothing was launched.
#pragma once

#include "fft_plan.h"
#include "plane_plan.h"
#include "tensor_core_form.h"

namespace lka::cuda {

namespace detail {

// Forward or backward-input in one form: plan(correlation, params), then launch(params, shape).
template <class Params, class MakePlan, class Launch>
const char* run_correlate(const ConvParams& call, bool backward, const void* weight,
                          const void* bias, MakePlan plan_form, Launch launch) {
  Params p;
  const Plan plan = plan_form(correlation_of(call, backward), p);
  if (plan.refusal != nullptr) return plan.refusal;
  p.weight = weight;
  p.bias = bias;
  launch(p, plan.shape);
  return nullptr;
}

}  // namespace detail

// Forward or backward-input for the tensor cores, row by row.
template <class Runner>
const char* run_toeplitz_correlate(const ConvParams& call, bool backward, const void* weight,
                                   const void* bias, Runner& runner) {
  return detail::run_correlate<CorrelateParams>(
      call, backward, weight, bias, plan_correlate,
      [&](const auto& p, const auto& shape) { runner.toeplitz_correlate(p, shape); });
}

// The same of small maps in the dense form.
template <class Runner>
const char* run_dense_correlate(const ConvParams& call, bool backward, const void* weight,
                                const void* bias, Runner& runner) {
  return detail::run_correlate<DenseCorrelateParams>(
      call, backward, weight, bias, plan_dense_correlate,
      [&](const auto& p, const auto& shape) { runner.dense_correlate(p, shape); });
}

// The same with planes in shared memory.
template <class Runner>
const char* run_plane_correlate(const ConvParams& call, bool backward, const void* weight,
                                const void* bias, Runner& runner) {
  return detail::run_correlate<PlaneCorrelateParams>(
      call, backward, weight, bias, plan_plane_correlate,
      [&](const auto& p, const auto& shape) { runner.plane_correlate(p, shape); });
}

// Forward or backward-input for the tensor cores, in the form that is estimated to be faster.
template <class Runner>
const char* run_tensor_core_correlate(const ConvParams& call, bool backward, const void* weight,
                                      const void* bias, Runner& runner) {
  switch (correlate_form(call, backward)) {
    case TensorCoreForm::dense: return run_dense_correlate(call, backward, weight, bias, runner);
    case TensorCoreForm::planes: return run_plane_correlate(call, backward, weight, bias, runner);
    default: return run_toeplitz_correlate(call, backward, weight, bias, runner);
  }
}

// Forward or backward-input in float32. taps(channels_in_lanes) gives them in the order (C, kH, kW)
// or (kW, kH, C).
template <class Taps, class Runner>
const char* run_float_correlate(const ConvParams& call, bool backward, Taps taps, const void* bias,
                                Runner& runner) {
  FloatCorrelateParams p;
  const Plan plan = plan_float_correlate(correlation_of(call, backward), p);
  if (plan.refusal != nullptr) return plan.refusal;
  p.weight = taps(p.channels_in_lanes);
  p.bias = static_cast<const float*>(bias);
  runner.float_correlate(p, plan.shape);
  return nullptr;
}

template <class Params, class Runner>
void make_partials(Params& p, Runner& runner) {
  p.partials = runner.floats(int64_t(p.groups) * p.channels * (int64_t(p.full_h) * p.full_w + 1));
}

namespace detail {

// Backward-weight in one form: partial sums by launch(params, shape), then their sum.
template <class Params, class MakePlan, class Runner, class Launch>
const char* run_weight_gradient(const ConvParams& call, int multiprocessors, void* grad_weight,
                                void* grad_bias, Runner& runner, MakePlan plan_form,
                                Launch launch) {
  Params p;
  const Plan plan = plan_form(call, multiprocessors, p);
  if (plan.refusal != nullptr) return plan.refusal;
  make_partials(p, runner);
  launch(p, plan.shape);
  runner.sum_partials(p, plan_sum_partials(p), grad_weight, grad_bias);
  return nullptr;
}

}  // namespace detail

// Backward-weight for the tensor cores, row by row.
template <class Runner>
const char* run_toeplitz_weight_gradient(const ConvParams& call, int multiprocessors,
                                         void* grad_weight, void* grad_bias, Runner& runner) {
  return detail::run_weight_gradient<WeightGradientParams>(
      call, multiprocessors, grad_weight, grad_bias, runner, plan_weight_gradient,
      [&](const auto& p, const auto& shape) { runner.toeplitz_weight_gradient(p, shape); });
}

// The same of small maps in the dense form.
template <class Runner>
const char* run_dense_weight_gradient(const ConvParams& call, int multiprocessors,
                                      void* grad_weight, void* grad_bias, Runner& runner) {
  return detail::run_weight_gradient<DenseWeightGradientParams>(
      call, multiprocessors, grad_weight, grad_bias, runner, plan_dense_weight_gradient,
      [&](const auto& p, const auto& shape) { runner.dense_weight_gradient(p, shape); });
}

// The same of small kernels with planes in shared memory.
template <class Runner>
const char* run_plane_weight_gradient(const ConvParams& call, int multiprocessors,
                                      void* grad_weight, void* grad_bias, Runner& runner) {
  return detail::run_weight_gradient<PlaneWeightGradientParams>(
      call, multiprocessors, grad_weight, grad_bias, runner, plan_plane_weight_gradient,
      [&](const auto& p, const auto& shape) { runner.plane_weight_gradient(p, shape); });
}

// Backward-weight for the tensor cores, in the form that is estimated to be faster.
template <class Runner>
const char* run_tensor_core_weight_gradient(const ConvParams& call, int multiprocessors,
                                            void* grad_weight, void* grad_bias, Runner& runner) {
  switch (weight_gradient_form(call, multiprocessors)) {
    case TensorCoreForm::dense:
      return run_dense_weight_gradient(call, multiprocessors, grad_weight, grad_bias, runner);
    case TensorCoreForm::planes:
      return run_plane_weight_gradient(call, multiprocessors, grad_weight, grad_bias, runner);
    default:
      return run_toeplitz_weight_gradient(call, multiprocessors, grad_weight, grad_bias, runner);
  }
}

// Backward-weight in float32.
template <class Runner>
const char* run_float_weight_gradient(const ConvParams& call, int multiprocessors,
                                      void* grad_weight, void* grad_bias, Runner& runner) {
  FloatWeightGradientParams p;
  const Plan plan = plan_float_weight_gradient(call, multiprocessors, p);
  if (plan.refusal != nullptr) return plan.refusal;
  make_partials(p, runner);
  runner.float_weight_gradient(p, plan.shape);
  runner.sum_partials(p, plan_sum_partials(p), grad_weight, grad_bias);
  return nullptr;
}

// Room for the spectra of `planes` planes.
template <class Runner>
Complex* make_spectra(const FftParams& p, int64_t planes, Runner& runner) {
  const int64_t numbers = int64_t(p.geometry.x.size / 2 + 1) * p.geometry.y.size;
  return reinterpret_cast<Complex*>(runner.floats(2 * planes * numbers));
}

// Forward or backward-input by Fourier transforms: spectra of the taps, then the maps.
template <class Runner>
const char* run_fft_correlate(const ConvParams& call, bool backward, const void* weight,
                              const void* bias, Runner& runner) {
  FftSpectraParams transform;
  const Plan transform_plan = plan_fft_spectra(call, transform);
  if (transform_plan.refusal != nullptr) return transform_plan.refusal;
  FftCorrelateParams p;
  const Plan plan = plan_fft_correlate(call, backward, p);
  if (plan.refusal != nullptr) return plan.refusal;
  transform.spectra = make_spectra(transform, call.channels, runner);
  transform.taps.data = const_cast<void*>(weight);
  runner.fft_spectra(transform, transform_plan.shape);
  p.spectra = transform.spectra;
  p.bias = bias;
  runner.fft_correlate(p, plan.shape);
  return nullptr;
}

// Backward-weight by Fourier transforms: sums of spectra, then the gradients.
template <class Runner>
const char* run_fft_weight_gradient(const ConvParams& call, int multiprocessors,
                                    int64_t most_shared, void* grad_weight, void* grad_bias,
                                    Runner& runner) {
  FftWeightGradientParams p;
  const Plan plan = plan_fft_weight_gradient(call, multiprocessors, most_shared, p);
  if (plan.refusal != nullptr) return plan.refusal;
  p.spectra = make_spectra(p, p.groups * call.channels, runner);
  p.bias_sums = runner.floats(p.groups * call.channels);
  FftTapGradientParams last;
  const Plan last_plan = plan_fft_tap_gradient(call, p, last);
  if (last_plan.refusal != nullptr) return last_plan.refusal;
  last.taps.data = grad_weight;
  last.grad_bias = grad_bias;
  runner.fft_weight_gradient(p, plan.shape);
  runner.fft_tap_gradient(last, last_plan.shape);
  return nullptr;
}

}  // namespace lka::cuda
