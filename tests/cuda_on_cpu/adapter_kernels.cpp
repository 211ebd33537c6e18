// The adapter as functions that Python calls: planned and launched in the order of the operators,
// run by fibers.
#include <string>

#include "launches.h"

namespace {

using on_fibers::Runner;
namespace cuda = lka::cuda;
using cuda::AdapterCall;

// A runner that knows the tensors of a call.
Runner runner_of(const AdapterCall& call) {
  const int64_t element = on_fibers::size_of(call.storage);
  Runner runner(call.storage);
  const auto weight = [&](const char* name, const void* data, int64_t elements) {
    runner.add(name, data, elements * element, false);
  };
  weight("down_weight", call.down_weight, call.rank * call.channels);
  weight("down_bias", call.down_bias, call.rank);
  weight("conv_weight", call.conv_weight, call.rank * call.kernel_h * call.kernel_w);
  weight("conv_bias", call.conv_bias, call.rank);
  weight("up_weight", call.up_weight, call.channels * call.rank);
  weight("up_bias", call.up_bias, call.channels);
  runner.add("seed", call.seed, 8, false);
  const auto tokens = [&](const char* name, const cuda::TokenTensor& t, bool writable) {
    const int64_t last = (call.batch - 1) * t.stride_b + (call.tokens - 1) * t.stride_t +
                         (call.channels - 1) * t.stride_c;
    runner.add(name, t.data, (last + 1) * element, writable);
  };
  tokens("x", call.x, false);
  tokens("residual", call.residual, false);
  tokens("grad_output", call.grad_output, false);
  tokens("y", call.y, true);
  tokens("grad_x", call.grad_x, true);
  return runner;
}

}  // namespace

// Each returns what went wrong, or an empty text.
extern "C" const char* adapter_forward(const AdapterCall* call, int multiprocessors) {
  const int64_t bytes = call->batch * call->rank * call->tokens * on_fibers::size_of(call->storage);
  Runner runner = runner_of(*call);
  runner.add("z", call->z, bytes, true);
  runner.add("c", call->c, bytes, true);
  return runner.said(cuda::run_adapter_forward(*call, multiprocessors, runner));
}

// `grads`: of the down-projection's weight and bias, the convolution's, the up-projection's.
extern "C" const char* adapter_backward(const AdapterCall* call, int multiprocessors,
                                        void* const (*grads)[6]) {
  const int64_t element = on_fibers::size_of(call->storage);
  const int64_t bytes = call->batch * call->rank * call->tokens * element;
  const int64_t taps = call->kernel_h * call->kernel_w;
  Runner runner = runner_of(*call);
  runner.add("z", call->z, bytes, false);
  runner.add("c", call->c, bytes, false);
  const int64_t sizes[6] = {call->rank * call->channels, call->rank,
                            call->rank * taps,           call->rank,
                            call->channels * call->rank, call->channels};
  for (int i = 0; i < 6; ++i)
    runner.add("gradient of a weight", (*grads)[i], sizes[i] * element, true);
  return runner.said(cuda::run_adapter_backward(*call, multiprocessors, *grads, runner));
}

// Blocks, threads and shared memory of each launch, in their order.
extern "C" const char* adapter_plan(const AdapterCall* call, bool backward, int multiprocessors,
                                    int64_t* shapes) {
  const auto put = [&](std::initializer_list<lka::cuda::LaunchShape> all) {
    for (const auto& shape : all)
      for (const int64_t value : {shape.blocks, int64_t(shape.threads), shape.shared_bytes})
        *shapes++ = value;
  };
  const char* refusal;
  if (backward) {
    const cuda::AdapterBackward plan = cuda::plan_adapter_backward(*call, multiprocessors);
    put({plan.narrow_up.shape, plan.up.shape, plan.up_weight.shape, plan.correlate.rows.shape,
         plan.correlate.dense.shape, plan.correlate.planes.shape, plan.convolve.shape,
         plan.taps.shape, plan.plane_taps.shape, plan.narrow_down.shape, plan.down.shape,
         plan.down_weight.shape});
    refusal = plan.refusal;
  } else {
    const cuda::AdapterForward plan = cuda::plan_adapter_forward(*call, multiprocessors);
    put({plan.down.shape, plan.narrow_down.shape, plan.correlate.rows.shape,
         plan.correlate.dense.shape, plan.correlate.planes.shape, plan.up.shape,
         plan.narrow_up.shape});
    refusal = plan.refusal;
  }
  return refusal == nullptr ? "" : refusal;
}
