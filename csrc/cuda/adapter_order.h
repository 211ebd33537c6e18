// The launches of the fused adapter in their order, and the memory between them, for the operators
// and tests/cuda_on_cpu: see depthwise_order.h. A runner has a function for every launcher of
// adapter_launchers.h, and in addition
//   void* rank_tensor(const AdapterCall&): (batch, rank, tokens), not initialised.
#pragma once

#include "adapter_plan.h"

namespace lka::cuda {

// A launch, where there is one.
template <class Launch, class Run>
void run_launch(const Launch& launch, Run run) {
  if (launch.shape.blocks > 0) run(launch.params, launch.shape);
}

// The convolution of the grid, where it has a launch of its own.
template <class Runner>
void run_correlation(const AdapterCorrelation& plan, Runner& runner) {
  if (plan.rows.shape.blocks > 0) runner.toeplitz_correlate(plan.rows.params, plan.rows.shape);
  if (plan.dense.shape.blocks > 0) runner.dense_correlate(plan.dense.params, plan.dense.shape);
  if (plan.planes.shape.blocks > 0) runner.plane_correlate(plan.planes.params, plan.planes.shape);
}

// Fills y, z and c of the call.
template <class Runner>
const char* run_adapter_forward(AdapterCall call, int multiprocessors, Runner& runner) {
  const bool activates = call.activate_before && call.activation != Activation::none;
  call.a = activates ? runner.rank_tensor(call) : call.z;
  const AdapterForward plan = plan_adapter_forward(call, multiprocessors);
  if (plan.refusal != nullptr) return plan.refusal;
  run_launch(plan.down, [&](const auto& p, const auto& s) { runner.adapter_down(p, s); });
  run_launch(plan.narrow_down,
             [&](const auto& p, const auto& s) { runner.adapter_narrow_down(p, s); });
  run_correlation(plan.correlate, runner);
  run_launch(plan.up, [&](const auto& p, const auto& s) { runner.adapter_up(p, s); });
  run_launch(plan.narrow_up, [&](const auto& p, const auto& s) { runner.adapter_narrow_up(p, s); });
  return nullptr;
}

// Fills grad_x and `grads`: of the down-projection's weight and bias, the convolution's and the
// up-projection's; null where not asked for.
template <class Runner>
const char* run_adapter_backward(AdapterCall call, int multiprocessors, void* const (&grads)[6],
                                 Runner& runner) {
  const bool need_z = call.need_grad_x || call.need_down;
  if (need_z || call.need_conv) call.grad_c = runner.rank_tensor(call);
  if (need_z) call.grad_z = runner.rank_tensor(call);
  if (sums_taps_apart(call)) call.a = runner.rank_tensor(call);
  AdapterBackward plan = plan_adapter_backward(call, multiprocessors);
  if (plan.refusal != nullptr) return plan.refusal;
  const auto partials = [&](bool needed, int64_t groups, int64_t rows, int64_t columns) {
    return needed ? runner.floats(groups * rows * (columns + 1)) : nullptr;
  };
  AdapterParams &up = plan.of_up(), &down = plan.of_down();
  up.up_partials = partials(call.need_up, up.groups, call.channels, call.rank);
  plan.convolve.params.conv_partials = plan.taps.params.partials = plan.plane_taps.params.partials =
      partials(call.need_conv, tap_groups(plan), call.rank, call.kernel_h * call.kernel_w);
  down.down_partials = partials(call.need_down, down.groups, call.rank, call.channels);
  if (up.of_up) plan.up.params.e = up.e = runner.rank_tensor(call);

  const auto weight_gradient = [&](const auto& p, const auto& shape) {
    runner.adapter_weight_gradient(p, shape);
  };
  run_launch(plan.narrow_up,
             [&](const auto& p, const auto& s) { runner.adapter_narrow_up_backward(p, s); });
  run_launch(plan.up, [&](const auto& p, const auto& s) { runner.adapter_up_backward(p, s); });
  run_launch(plan.up_weight, weight_gradient);
  run_correlation(plan.correlate, runner);
  run_launch(plan.convolve,
             [&](const auto& p, const auto& s) { runner.adapter_convolve_backward(p, s); });
  run_launch(plan.plane_taps,
             [&](const auto& p, const auto& s) { runner.plane_weight_gradient(p, s); });
  run_launch(plan.taps,
             [&](const auto& p, const auto& s) { runner.toeplitz_weight_gradient(p, s); });
  run_launch(plan.narrow_down,
             [&](const auto& p, const auto& s) { runner.adapter_narrow_down_backward(p, s); });
  run_launch(plan.down, [&](const auto& p, const auto& s) { runner.adapter_down_backward(p, s); });
  run_launch(plan.down_weight, weight_gradient);
  LaunchOf<AdapterSums> sums;
  sums.shape = plan_adapter_sums(call, plan, grads, sums.params);
  run_launch(sums, [&](const auto& p, const auto& s) { runner.adapter_sums(p, s); });
  return nullptr;
}

}  // namespace lka::cuda
