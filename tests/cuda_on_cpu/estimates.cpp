// What launches of real sizes have to do (csrc/cuda/estimate.h), for Python. Nothing is run.
#include <string>

#include "cuda/estimate.h"

namespace {

using lka::ConvParams;
using lka::Storage;
namespace cuda = lka::cuda;

constexpr int64_t kMostSharedOf90 = 227 * 1024;

// Eleven numbers for every launch: those of Work, then those of Times. The last is followed by -1.
const char* put(const std::vector<cuda::Work>& all, double* numbers) {
  for (const cuda::Work& work : all) {
    const cuda::Times times = cuda::times_of(work);
    for (const double value :
         {work.blocks, work.memory, work.cache, work.shared, work.products, work.instructions,
          times.memory, times.cache, times.shared, times.products, times.instructions})
      *numbers++ = value;
  }
  *numbers = -1;
  return "";
}

}  // namespace

// Each returns why the call is refused, or an empty text.
extern "C" const char* depthwise_work(const ConvParams* call, const char* form,
                                      const char* direction, int multiprocessors, double* numbers) {
  const std::string kind = form, way = direction;
  const bool backward = way == "backward_input";
  const double element = call->storage == Storage::float32 ? 4 : 2;
  if (way == "backward_weight") {
    if (kind == "fft") {
      cuda::FftWeightGradientParams p;
      const cuda::Plan plan =
          cuda::plan_fft_weight_gradient(*call, multiprocessors, kMostSharedOf90, p);
      if (plan.refusal != nullptr) return plan.refusal;
      cuda::FftTapGradientParams last;
      const cuda::Plan last_plan = cuda::plan_fft_tap_gradient(*call, p, last);
      return put(
          {cuda::work_of(p, plan.shape, element), cuda::work_of(last, last_plan.shape, element)},
          numbers);
    }
    if (kind == "float") {
      cuda::FloatWeightGradientParams p;
      const cuda::Plan plan = cuda::plan_float_weight_gradient(*call, multiprocessors, p);
      if (plan.refusal != nullptr) return plan.refusal;
      return put({cuda::work_of(p, plan.shape), cuda::work_of_sum(p, element)}, numbers);
    }
    if (kind == "planes") {
      cuda::PlaneWeightGradientParams p;
      const cuda::Plan plan = cuda::plan_plane_weight_gradient(*call, multiprocessors, p);
      if (plan.refusal != nullptr) return plan.refusal;
      return put({cuda::work_of(p, plan.shape), cuda::work_of_sum(p, element)}, numbers);
    }
    if (kind == "dense") {
      cuda::DenseWeightGradientParams p;
      const cuda::Plan plan = cuda::plan_dense_weight_gradient(*call, multiprocessors, p);
      if (plan.refusal != nullptr) return plan.refusal;
      return put({cuda::work_of(p, plan.shape), cuda::work_of_sum(p, element)}, numbers);
    }
    cuda::WeightGradientParams p;
    const cuda::Plan plan = cuda::plan_weight_gradient(*call, multiprocessors, p);
    if (plan.refusal != nullptr) return plan.refusal;
    return put({cuda::work_of(p, plan.shape), cuda::work_of_sum(p, element)}, numbers);
  }
  if (kind == "fft") {
    cuda::FftSpectraParams spectra;
    const cuda::Plan first = cuda::plan_fft_spectra(*call, spectra);
    if (first.refusal != nullptr) return first.refusal;
    cuda::FftCorrelateParams p;
    const cuda::Plan plan = cuda::plan_fft_correlate(*call, backward, p);
    if (plan.refusal != nullptr) return plan.refusal;
    return put(
        {cuda::work_of(spectra, first.shape, element), cuda::work_of(p, plan.shape, element)},
        numbers);
  }
  const cuda::Correlation correlation = cuda::correlation_of(*call, backward);
  if (kind == "float") {
    cuda::FloatCorrelateParams p;
    const cuda::Plan plan = cuda::plan_float_correlate(correlation, p);
    if (plan.refusal != nullptr) return plan.refusal;
    return put({cuda::work_of(p, plan.shape)}, numbers);
  }
  if (kind == "planes") {
    cuda::PlaneCorrelateParams p;
    const cuda::Plan plan = cuda::plan_plane_correlate(correlation, p);
    if (plan.refusal != nullptr) return plan.refusal;
    return put({cuda::work_of(p, plan.shape)}, numbers);
  }
  if (kind == "dense") {
    cuda::DenseCorrelateParams p;
    const cuda::Plan plan = cuda::plan_dense_correlate(correlation, p);
    if (plan.refusal != nullptr) return plan.refusal;
    return put({cuda::work_of(p, plan.shape)}, numbers);
  }
  cuda::CorrelateParams p;
  const cuda::Plan plan = cuda::plan_correlate(correlation, p);
  if (plan.refusal != nullptr) return plan.refusal;
  return put({cuda::work_of(p, plan.shape)}, numbers);
}

// A cuda::TensorCoreForm.
extern "C" int form_of(const ConvParams* call, const char* direction, int multiprocessors) {
  const std::string way = direction;
  if (way == "backward_weight") return int(cuda::weight_gradient_form(*call, multiprocessors));
  return int(cuda::correlate_form(*call, way == "backward_input"));
}

extern "C" const char* adapter_work(const cuda::AdapterCall* call, bool backward,
                                    int multiprocessors, double* numbers) {
  if (!backward) {
    const cuda::AdapterForward plan = cuda::plan_adapter_forward(*call, multiprocessors);
    if (plan.refusal != nullptr) return plan.refusal;
    return put(cuda::work_of(*call, plan), numbers);
  }
  cuda::AdapterBackward plan = cuda::plan_adapter_backward(*call, multiprocessors);
  if (plan.refusal != nullptr) return plan.refusal;
  return put(cuda::work_of(*call, plan), numbers);
}
