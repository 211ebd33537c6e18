#include "depthwise_run.h"

#include <algorithm>
#include <cmath>

#include "../stable.h"
#include "rounding.h"
#include "scratch.h"

namespace lka::cpu {
namespace {

// Below this many vector multiply-adds a task is not worth another thread.
constexpr double kGrain = 20000.0;

int64_t grain(double multiply_adds_per_task) {
  return std::max<int64_t>(1, int64_t(std::ceil(kGrain / (multiply_adds_per_task + 1.0))));
}

// Sum the partial results of every channel in one fixed order.
template <class T>
void reduce(const WeightGradientPlan& plan, void* grad_weight, void* grad_bias) {
  const int64_t taps = plan.kernel_h * plan.kernel_w, lanes = plan.lanes.lanes;
  const bool cross_images = plan.lanes.cross_images;
  const int64_t terms = cross_images ? plan.batch : plan.num_parts;
  // Channels that stand side by side in the vectors of every term.
  const int64_t together = cross_images && plan.channels % lanes != 0 ? 1 : lanes;
  const int64_t blocks_per_term = cross_images ? 0 : plan.lanes.blocks_per_image;
  const auto first_partial = [&](int64_t term, int64_t channel) {
    const int64_t plane = cross_images ? term * plan.channels + channel : channel;
    const int64_t block = plane / lanes + term * blocks_per_term;
    return static_cast<const T*>(plan.partial) + block * (taps + 1) * lanes + plane % lanes;
  };
  torch::stable::parallel_for(
      0, (plan.channels + together - 1) / together, grain(double(terms * taps * together)),
      [&](int64_t begin, int64_t end) {
        T* total = static_cast<T*>(task_scratch().get(size_t((taps + 1) * together) * sizeof(T)));
        for (int64_t group = begin; group < end; ++group) {
          const int64_t channel = group * together;
          const int64_t count = std::min(together, plan.channels - channel);
          const T* sums = total;
          if (terms == 1 && together == lanes) {
            sums = first_partial(0, channel);
          } else {
            std::fill(total, total + (taps + 1) * together, T(0));
            for (int64_t term = 0; term < terms; ++term) {
              const T* partial = first_partial(term, channel);
              if (together == lanes)
                for (int64_t i = 0; i < (taps + 1) * lanes; ++i) total[i] += partial[i];
              else
                for (int64_t tap = 0; tap <= taps; ++tap) total[tap] += partial[tap * lanes];
            }
          }
          for (int64_t c = 0; c < count; ++c) {
            store_rounded(sums + c, together, taps, plan.storage, grad_weight,
                          (channel + c) * taps);
            store_rounded(sums + taps * together + c, together, 1, plan.storage, grad_bias,
                          channel + c);
          }
        }
      });
}

void sum_partials(const WeightGradientPlan& plan, void* grad_weight, void* grad_bias) {
  if (plan.storage == Storage::float64)
    reduce<double>(plan, grad_weight, grad_bias);
  else
    reduce<float>(plan, grad_weight, grad_bias);
}

}  // namespace

void run(PlannedConvolution& planned, const void* weight, const void* bias) {
  ConvolvePlan& plan = planned.plan;
  const int64_t size = plan.storage == Storage::float64 ? 8 : 4;
  plan.weight = weight;
  plan.bias = bias;
  const int64_t bias_elements = plan.lanes.num_patterns * plan.lanes.lanes;
  char* shared = static_cast<char*>(
      call_scratch().get(size_t((planned.packed_weight_elements + bias_elements) * size)));
  plan.packed_bias = shared;
  plan.packed_weight = shared + bias_elements * size;
  torch::stable::parallel_for(
      0, plan.lanes.num_patterns, grain(double(plan.packed_taps * plan.lanes.lanes)),
      [&](int64_t begin, int64_t end) { planned.kernels->pack_weights(plan, begin, end); });
  torch::stable::parallel_for(
      0, planned.num_tasks, grain(planned.multiply_adds_per_task), [&](int64_t begin, int64_t end) {
        void* scratch = task_scratch().get(size_t(plan.scratch_elements * size));
        planned.kernels->convolve(plan, begin, end, scratch);
      });
}

void run(PlannedWeightGradient& planned, void* grad_weight, void* grad_bias) {
  WeightGradientPlan& plan = planned.plan;
  const int64_t size = plan.storage == Storage::float64 ? 8 : 4;
  plan.partial = call_scratch().get(size_t(planned.partial_elements * size));
  torch::stable::parallel_for(
      0, planned.num_tasks, grain(planned.multiply_adds_per_task), [&](int64_t begin, int64_t end) {
        void* scratch = task_scratch().get(size_t(plan.scratch_elements * size));
        planned.kernels->weight_gradient(plan, begin, end, scratch);
      });
  sum_partials(plan, grad_weight, grad_bias);
}

void run(PlannedConvolution& input, PlannedWeightGradient& weight_gradient, const void* weight,
         void* grad_weight, void* grad_bias) {
  SharedSpectra shared;
  if (!plan_shared_spectra(input, weight_gradient, int(torch::stable::get_num_threads()), shared)) {
    run(weight_gradient, grad_weight, grad_bias);
    run(input, weight, nullptr);
    return;
  }
  WeightGradientPlan& plan = weight_gradient.plan;
  const int64_t size = plan.storage == Storage::float64 ? 8 : 4;
  input.plan.weight = weight;
  input.plan.bias = nullptr;
  plan.partial = call_scratch().get(size_t(weight_gradient.partial_elements * size));
  torch::stable::parallel_for(
      0, shared.num_tasks, grain(shared.multiply_adds_per_task), [&](int64_t begin, int64_t end) {
        void* scratch = task_scratch().get(size_t(shared.scratch_elements * size));
        input.kernels->both_gradients(input.plan, plan, begin, end, scratch);
      });
  sum_partials(plan, grad_weight, grad_bias);
}

}  // namespace lka::cpu
