// Which form of depthwise convolution the tensor cores take for a call: pure functions, plain C++.
#pragma once

#include <tuple>
#include <type_traits>

#include "depthwise_estimate.h"

namespace lka::cuda {

// How much longer than estimated each form takes. Measured on an H100 (bfloat16, 8 and 64 images,
// both layouts), the quotients are 1.7 to 7.5 by rows, in the geometric mean of any direction and
// layout 3.3 to 3.7; as dense matrices 1.7 forward and, of few cases, 3.7 for weight gradients; by
// planes 1.2 to 1.8. A little less for the latter two, as it is their ratio that decides where two
// are close, in µs by rows, dense and planes: 28² with K = 29 773, 103 and 310, 7 189, 148 and 76,
// 5 57, 53 and 28, 5×51 184, 80 and 62; 14² with K = 7 158, 43 and 58; of weight gradients on 14²
// with K = 7 443, 138 and 105, on 7² 557, 82 and 201.
constexpr double kRowsTakeLonger = 3.5, kDenseTakesLonger = 1.5, kPlanesTakeLonger = 1.3;

// How a convolution is made into products for the tensor cores: by rows from memory, as a dense
// matrix of a small map, or by rows of planes in shared memory.
enum class TensorCoreForm : int { rows, dense, planes };

namespace detail {

// The form that is expected to take least. Each has (plan, seconds by its estimate).
struct FormTime {
  TensorCoreForm form;
  bool served;
  double seconds;
};
inline TensorCoreForm least_of(std::initializer_list<FormTime> forms) {
  FormTime least = {TensorCoreForm::rows, false, 0};
  for (const FormTime& f : forms)
    if (f.served && (!least.served || f.seconds < least.seconds)) least = f;
  return least.form;
}

// What decide() says of calls like this one is kept for the next ones of this thread: estimates
// take the host longer than the rest of a launch. `which` tells their kinds apart.
template <class Decide>
TensorCoreForm remembered(const ConvParams& call, int which, Decide decide) {
  const auto key_of_map = [](const MapView& m) {
    return std::make_tuple(reinterpret_cast<uintptr_t>(m.data) % 16, m.height, m.width, m.stride_b,
                           m.stride_c, m.stride_h, m.stride_w);
  };
  const auto key = std::make_tuple(which, call.batch, call.channels, key_of_map(call.input),
                                   key_of_map(call.output), call.kernel_h, call.kernel_w,
                                   call.dilation_h, call.dilation_w, call.pad_top, call.pad_left);
  constexpr int kEntries = 64;
  thread_local struct {
    std::remove_const_t<decltype(key)> keys[kEntries];
    TensorCoreForm forms[kEntries];
    int count = 0, next = 0;
  } kept;
  for (int i = 0; i < kept.count; ++i)
    if (kept.keys[i] == key) return kept.forms[i];
  const TensorCoreForm form = decide();
  kept.keys[kept.next] = key;
  kept.forms[kept.next] = form;
  kept.next = (kept.next + 1) % kEntries;
  kept.count = std::min(kept.count + 1, kEntries);
  return form;
}

inline TensorCoreForm estimate_correlate_form(ConvParams call, bool backward) {
  call.batch = std::min<int64_t>(call.batch, 256);  // of many images as of 256
  const Correlation correlation = correlation_of(call, backward);
  const auto time = [](TensorCoreForm form, const Plan& plan, const auto& p, double longer) {
    const bool served = plan.refusal == nullptr;
    return FormTime{form, served, served ? longer * times_of(work_of(p, plan.shape)).between() : 0};
  };
  CorrelateParams rows;
  DenseCorrelateParams dense;
  PlaneCorrelateParams planes;
  const Plan by_rows = plan_correlate(correlation, rows);
  const Plan as_dense = plan_dense_correlate(correlation, dense);
  const Plan by_planes = plan_plane_correlate(correlation, planes);
  return least_of({time(TensorCoreForm::rows, by_rows, rows, kRowsTakeLonger),
                   time(TensorCoreForm::dense, as_dense, dense, kDenseTakesLonger),
                   time(TensorCoreForm::planes, by_planes, planes, kPlanesTakeLonger)});
}

inline TensorCoreForm estimate_weight_gradient_form(ConvParams call, int multiprocessors) {
  call.batch = std::min<int64_t>(call.batch, 256);
  const auto time = [](TensorCoreForm form, const Plan& plan, const auto& p, double longer) {
    const bool served = plan.refusal == nullptr;
    return FormTime{form, served,
                    served ? longer * (times_of(work_of(p, plan.shape)).between() +
                                       times_of(work_of_sum(p, 2)).between())
                           : 0};
  };
  WeightGradientParams rows;
  DenseWeightGradientParams dense;
  PlaneWeightGradientParams planes;
  const Plan by_rows = plan_weight_gradient(call, multiprocessors, rows);
  const Plan as_dense = plan_dense_weight_gradient(call, multiprocessors, dense);
  const Plan by_planes = plan_plane_weight_gradient(call, multiprocessors, planes);
  return least_of({time(TensorCoreForm::rows, by_rows, rows, kRowsTakeLonger),
                   time(TensorCoreForm::dense, as_dense, dense, kDenseTakesLonger),
                   time(TensorCoreForm::planes, by_planes, planes, kPlanesTakeLonger)});
}

}  // namespace detail

// Of forward, or backward-input.
inline TensorCoreForm correlate_form(const ConvParams& call, bool backward) {
  return detail::remembered(call, backward ? -1 : 0,
                            [&] { return detail::estimate_correlate_form(call, backward); });
}

// Of weight gradients.
inline TensorCoreForm weight_gradient_form(const ConvParams& call, int multiprocessors) {
  return detail::remembered(call, multiprocessors, [&] {
    return detail::estimate_weight_gradient_form(call, multiprocessors);
  });
}

}  // namespace lka::cuda
