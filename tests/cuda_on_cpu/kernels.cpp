// The depthwise kernels as functions that Python calls: planned as for a GPU, run by fibers.
#include <cmath>
#include <string>
#include <vector>

#include "cuda/device/sum_partials.cuh"
#include "launches.h"

namespace {

using lka::ConvParams;
using lka::MapView;
using lka::Storage;
namespace cuda = lka::cuda;

}  // namespace

// Each returns what went wrong, or an empty text.
extern "C" const char* toeplitz_correlate(const ConvParams* call, bool backward, const void* weight,
                                          const void* bias) {
  cuda::CorrelateParams p;
  const cuda::Plan plan = cuda::plan_correlate(cuda::correlation_of(*call, backward), p);
  if (plan.refusal != nullptr) return refused(plan);
  p.weight = weight;
  p.bias = bias;
  const size_t weight_bytes = size_t(call->channels * call->kernel_h * call->kernel_w) * 2;
  const cuda_on_cpu::Range ranges[] = {
      range_of("source", p.source.view, p.batch, p.channels, 2, false),
      range_of("result", p.result.view, p.batch, p.channels, 2, true),
      {"weight", weight, weight_bytes, false},
      {"bias", bias, bias == nullptr ? 0 : size_t(call->channels) * 2, false},
  };
  return keep(cuda_on_cpu::run(launch_of(plan), ranges, 4, [&](char* shared) {
    if (call->storage == Storage::bfloat16)
      cuda::ToeplitzCorrelateBlock<cuda::BFloat16>(p, shared).run();
    else
      cuda::ToeplitzCorrelateBlock<cuda::Float16>(p, shared).run();
  }));
}

// Where channels are neighbours, `weight` is in the order (kW, kH, C).
extern "C" const char* float_correlate(const ConvParams* call, bool backward, const float* weight,
                                       const float* bias) {
  cuda::FloatCorrelateParams p;
  const cuda::Plan plan = cuda::plan_float_correlate(cuda::correlation_of(*call, backward), p);
  if (plan.refusal != nullptr) return refused(plan);
  p.weight = weight;
  p.bias = bias;
  const size_t weight_bytes = size_t(call->channels * call->kernel_h * call->kernel_w) * 4;
  const cuda_on_cpu::Range ranges[] = {
      range_of("source", p.source, p.batch, p.channels, 4, false),
      range_of("result", p.result, p.batch, p.channels, 4, true),
      {"weight", weight, weight_bytes, false},
      {"bias", bias, bias == nullptr ? 0 : size_t(call->channels) * 4, false},
  };
  return keep(cuda_on_cpu::run(launch_of(plan), ranges, 4,
                               [&](char*) { cuda::FloatCorrelateThread(p).run(); }));
}

namespace {

// Partial sums by `kernel`, then their sum by `total`.
template <class Params, class Kernel, class Total>
const char* weight_gradient(const cuda::Plan& plan, Params& p, const MapView& grad_output,
                            const MapView& input, int64_t element_size, void* grad_weight,
                            void* grad_bias, Kernel kernel, Total total) {
  if (plan.refusal != nullptr) return refused(plan);
  const size_t taps = size_t(p.full_h) * p.full_w, channels = size_t(p.channels);
  std::vector<float> partials(p.groups * channels * (taps + 1), NAN);
  p.partials = partials.data();
  const cuda_on_cpu::Range ranges[] = {
      range_of("grad_output", grad_output, p.batch, p.channels, element_size, false),
      range_of("input", input, p.batch, p.channels, element_size, false),
      {"partials", partials.data(), partials.size() * 4, true},
      {"grad_weight", grad_weight, channels * taps * element_size, true},
      {"grad_bias", grad_bias, channels * element_size, true},
  };
  const std::string said = cuda_on_cpu::run(launch_of(plan), ranges, 3, kernel);
  if (!said.empty()) return keep(said);
  return keep(cuda_on_cpu::run(launch_of({cuda::plan_sum_partials(p)}), ranges + 2, 3, total));
}

}  // namespace

extern "C" const char* toeplitz_weight_gradient(const ConvParams* call, int multiprocessors,
                                                void* grad_weight, void* grad_bias) {
  cuda::WeightGradientParams p;
  const cuda::Plan plan = cuda::plan_weight_gradient(*call, multiprocessors, p);
  const bool brain = call->storage == Storage::bfloat16;
  return weight_gradient(
      plan, p, call->output, call->input, 2, grad_weight, grad_bias,
      [&](char* shared) {
        if (brain)
          cuda::WeightGradientBlock<cuda::BFloat16>(p, shared).run();
        else
          cuda::WeightGradientBlock<cuda::Float16>(p, shared).run();
      },
      [&](char*) {
        if (brain)
          cuda::sum_partials<cuda::BFloat16>(p, grad_weight, grad_bias);
        else
          cuda::sum_partials<cuda::Float16>(p, grad_weight, grad_bias);
      });
}

extern "C" const char* float_weight_gradient(const ConvParams* call, int multiprocessors,
                                             void* grad_weight, void* grad_bias) {
  using Kernel = cuda::FloatWeightGradient;
  cuda::FloatWeightGradientParams p;
  cuda::Plan plan = cuda::plan_float_weight_gradient(*call, multiprocessors, p);
  plan.shape.shared_bytes = Kernel::kWarps * Kernel::kSums * 4;  // which the kernel declares
  return weight_gradient(
      plan, p, call->output, call->input, 4, grad_weight, grad_bias,
      [&](char* shared) {
        cuda::FloatWeightGradientBlock(p, reinterpret_cast<float*>(shared)).run();
      },
      [&](char*) { cuda::sum_partials<cuda::Float32>(p, grad_weight, grad_bias); });
}

extern "C" const char* plan(const ConvParams* call, const char* direction, int multiprocessors,
                            int64_t* shape) {
  cuda::Plan plan;
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::WeightGradientParams p;
    plan = cuda::plan_weight_gradient(*call, multiprocessors, p);
  } else {
    cuda::CorrelateParams p;
    plan = cuda::plan_correlate(cuda::correlation_of(*call, wanted == "backward_input"), p);
  }
  return describe(plan, shape);
}
