// Depthwise convolution by Fourier transforms as functions that Python calls.
#include <cmath>
#include <string>
#include <vector>

#include "cuda/fft_plan.h"
#include "launches.h"

namespace {

using lka::ConvParams;
using lka::Storage;
namespace cuda = lka::cuda;

// What a block may have on compute capability 9.0.
constexpr int64_t kMostSharedOf90 = 227 * 1024;

size_t size_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// f(Float32()) or the like.
template <class F>
void with_storage(Storage storage, F f) {
  if (storage == Storage::float32)
    f(cuda::Float32());
  else if (storage == Storage::float16)
    f(cuda::Float16());
  else
    f(cuda::BFloat16());
}

std::vector<cuda::Complex> spectra_for(const cuda::FftParams& p, int64_t planes) {
  const int64_t columns = p.geometry.x.size / 2 + 1;
  return std::vector<cuda::Complex>(planes * columns * p.geometry.y.size, {NAN, NAN});
}

cuda_on_cpu::Range range_of(const std::vector<cuda::Complex>& spectra, bool writable) {
  return {"spectra", spectra.data(), spectra.size() * sizeof(cuda::Complex), writable};
}

}  // namespace

extern "C" const char* fft_correlate(const ConvParams* call, bool backward, const void* weight,
                                     const void* bias) {
  const size_t bytes = size_of(call->storage);
  cuda::FftSpectraParams transform;
  cuda::Plan plan = cuda::plan_fft_spectra(*call, transform);
  if (plan.refusal != nullptr) return refused(plan);
  auto spectra = spectra_for(transform, call->channels);
  transform.spectra = spectra.data();
  transform.taps.data = const_cast<void*>(weight);
  const size_t taps = size_t(call->channels * call->kernel_h * call->kernel_w);
  const cuda_on_cpu::Range of_taps[] = {{"weight", weight, taps * bytes, false},
                                        range_of(spectra, true)};
  const std::string said = cuda_on_cpu::run(launch_of(plan), of_taps, 2, [&](char* shared) {
    cuda::FftSpectraBlock(transform, shared).run();
  });
  if (!said.empty()) return keep(said);

  cuda::FftCorrelateParams p;
  plan = cuda::plan_fft_correlate(*call, backward, p);
  if (plan.refusal != nullptr) return refused(plan);
  p.spectra = spectra.data();
  p.bias = bias;
  const cuda_on_cpu::Range ranges[] = {
      range_of("source", p.source, p.batch, p.channels, bytes, false),
      range_of("result", p.result, p.batch, p.channels, bytes, true),
      range_of(spectra, false),
      {"bias", bias, bias == nullptr ? 0 : call->channels * bytes, false},
  };
  return keep(cuda_on_cpu::run(launch_of(plan), ranges, 4, [&](char* shared) {
    with_storage(call->storage, [&](auto storage) {
      cuda::FftCorrelateBlock<decltype(storage)>(p, shared).run();
    });
  }));
}

extern "C" const char* fft_weight_gradient(const ConvParams* call, int multiprocessors,
                                           void* grad_weight, void* grad_bias) {
  const size_t bytes = size_of(call->storage);
  cuda::FftWeightGradientParams p;
  cuda::Plan plan = cuda::plan_fft_weight_gradient(*call, multiprocessors, kMostSharedOf90, p);
  if (plan.refusal != nullptr) return refused(plan);
  auto sums = spectra_for(p, p.groups * call->channels);
  std::vector<float> bias_sums(p.groups * call->channels, NAN);
  p.spectra = sums.data();
  p.bias_sums = bias_sums.data();
  const cuda_on_cpu::Range ranges[] = {
      range_of("grad_output", p.grad_output, p.batch, p.channels, bytes, false),
      range_of("input", p.input, p.batch, p.channels, bytes, false),
      range_of(sums, true),
      {"bias_sums", bias_sums.data(), bias_sums.size() * 4, true},
  };
  const std::string said = cuda_on_cpu::run(launch_of(plan), ranges, 4, [&](char* shared) {
    with_storage(call->storage, [&](auto storage) {
      cuda::FftWeightGradientBlock<decltype(storage)>(p, shared).run();
    });
  });
  if (!said.empty()) return keep(said);

  cuda::FftTapGradientParams last;
  plan = cuda::plan_fft_tap_gradient(*call, p, last);
  if (plan.refusal != nullptr) return refused(plan);
  last.taps.data = grad_weight;
  last.grad_bias = grad_bias;
  const size_t taps = size_t(call->channels * call->kernel_h * call->kernel_w);
  const cuda_on_cpu::Range of_taps[] = {
      range_of(sums, false),
      {"bias_sums", bias_sums.data(), bias_sums.size() * 4, false},
      {"grad_weight", grad_weight, taps * bytes, true},
      {"grad_bias", grad_bias, call->channels * bytes, true},
  };
  return keep(cuda_on_cpu::run(launch_of(plan), of_taps, 4, [&](char* shared) {
    cuda::FftTapGradientBlock(last, shared).run();
  }));
}

extern "C" const char* fft_plan(const ConvParams* call, const char* direction, int multiprocessors,
                                int64_t* shape) {
  const std::string wanted = direction;
  if (wanted == "backward_weight") {
    cuda::FftWeightGradientParams p;
    return describe(cuda::plan_fft_weight_gradient(*call, multiprocessors, kMostSharedOf90, p),
                    shape);
  }
  cuda::FftCorrelateParams p;
  return describe(cuda::plan_fft_correlate(*call, wanted == "backward_input", p), shape);
}
