// The adapter's kernels as functions that Python calls: planned as for a GPU, run by fibers.
#include <cmath>
#include <string>
#include <vector>

#include "cuda/adapter_plan.h"
#include "cuda_on_cpu.h"

namespace {

using lka::Storage;
namespace cuda = lka::cuda;
using cuda::AdapterCall;
using cuda::AdapterLaunch;
using cuda::AdapterParams;
using cuda_on_cpu::Range;

const char* keep(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

// What kernels may touch of the tensors of a call.
class Memory {
 public:
  explicit Memory(const AdapterCall& call) : call_(call) {
    element_ = call.storage == Storage::float32 ? 4 : 2;
    add("down_weight", call.down_weight, call.rank * call.channels);
    add("down_bias", call.down_bias, call.rank);
    add("conv_weight", call.conv_weight, call.rank * call.kernel_h * call.kernel_w);
    add("conv_bias", call.conv_bias, call.rank);
    add("up_weight", call.up_weight, call.channels * call.rank);
    add("up_bias", call.up_bias, call.channels);
    add_bytes("seed", call.seed, 8, false);
    add_tokens("x", call.x, false);
    add_tokens("residual", call.residual, false);
    add_tokens("grad_output", call.grad_output, false);
    add_tokens("y", call.y, true);
    add_tokens("grad_x", call.grad_x, true);
  }
  void add_rank(const char* name, const void* data, bool writable) {
    add_bytes(name, data, call_.batch * call_.rank * call_.tokens * element_, writable);
  }
  void add_bytes(const char* name, const void* data, int64_t bytes, bool writable) {
    if (data != nullptr) ranges_.push_back({name, data, size_t(bytes), writable});
  }
  int64_t element() const { return element_; }

  std::string run(const lka::cuda::LaunchShape& shape,
                  const std::function<void(char*)>& kernel) const {
    if (shape.blocks == 0) return "";
    return cuda_on_cpu::run({shape.blocks, shape.threads, size_t(shape.shared_bytes)},
                            ranges_.data(), int(ranges_.size()), kernel);
  }

 private:
  void add(const char* name, const void* data, int64_t elements) {
    add_bytes(name, data, elements * element_, false);
  }
  void add_tokens(const char* name, const cuda::TokenTensor& t, bool writable) {
    const int64_t last = (call_.batch - 1) * t.stride_b + (call_.tokens - 1) * t.stride_t +
                         (call_.channels - 1) * t.stride_c;
    add_bytes(name, t.data, (last + 1) * element_, writable);
  }

  const AdapterCall& call_;
  int64_t element_;
  std::vector<Range> ranges_;
};

std::string correlate(const AdapterCall& call, const Memory& memory,
                      const cuda::LaunchOf<cuda::CorrelateParams>& launch) {
  return memory.run(launch.shape, [&](char* shared) {
    if (call.storage == Storage::bfloat16)
      cuda::ToeplitzCorrelateBlock<cuda::BFloat16>(launch.params, shared).run();
    else
      cuda::ToeplitzCorrelateBlock<cuda::Float16>(launch.params, shared).run();
  });
}

// Runs Block<Storage>(params, shared).run() of the call's storage type.
template <template <class> class Block>
std::string run(const AdapterCall& call, const Memory& memory, const AdapterLaunch& launch) {
  return memory.run(launch.shape, [&](char* shared) {
    switch (call.storage) {
      case Storage::float32: return Block<cuda::Float32>(launch.params, shared).run();
      case Storage::bfloat16: return Block<cuda::BFloat16>(launch.params, shared).run();
      default: return Block<cuda::Float16>(launch.params, shared).run();
    }
  });
}

}  // namespace

// Each returns what went wrong, or an empty text.
extern "C" const char* adapter_forward(const AdapterCall* call, int multiprocessors) {
  const cuda::AdapterForward plan = cuda::plan_adapter_forward(*call, multiprocessors);
  if (plan.refusal != nullptr) return keep(std::string("refused: ") + plan.refusal);
  Memory memory(*call);
  memory.add_rank("z", call->z, true);
  if (call->a != call->z) memory.add_rank("a", call->a, true);
  memory.add_rank("c", call->c, true);
  const std::string said = run<cuda::AdapterDownBlock>(*call, memory, plan.down);
  if (!said.empty()) return keep("down: " + said);
  const std::string convolved = correlate(*call, memory, plan.correlate);
  if (!convolved.empty()) return keep("correlate: " + convolved);
  return keep(run<cuda::AdapterUpBlock>(*call, memory, plan.up));
}

// `grads`: of the down-projection's weight and bias, the convolution's, the up-projection's.
extern "C" const char* adapter_backward(const AdapterCall* call, int multiprocessors,
                                        void* const (*grads)[6]) {
  cuda::AdapterBackward plan = cuda::plan_adapter_backward(*call, multiprocessors);
  if (plan.refusal != nullptr) return keep(std::string("refused: ") + plan.refusal);
  Memory memory(*call);
  const int64_t taps = call->kernel_h * call->kernel_w;
  memory.add_rank("z", call->z, false);
  memory.add_rank("c", call->c, false);
  memory.add_rank("grad_c", call->grad_c, true);
  memory.add_rank("grad_z", call->grad_z, true);
  memory.add_rank("a", call->a, true);
  const int64_t sizes[6] = {call->rank * call->channels, call->rank,
                            call->rank * taps,           call->rank,
                            call->channels * call->rank, call->channels};
  for (int i = 0; i < 6; ++i)
    memory.add_bytes("gradient of a weight", (*grads)[i], sizes[i] * memory.element(), true);
  std::vector<float> partials[3];
  const auto allocate = [&](int i, bool needed, int64_t size) -> float* {
    if (!needed) return nullptr;
    partials[i].assign(size, NAN);
    memory.add_bytes("partials", partials[i].data(), size * 4, true);
    return partials[i].data();
  };
  AdapterParams &up = plan.of_up(), &down = plan.of_down();
  up.up_partials = allocate(0, call->need_up, up.groups * call->channels * (call->rank + 1));
  plan.convolve.params.conv_partials = plan.taps.params.partials =
      allocate(1, call->need_conv, cuda::tap_groups(plan) * call->rank * (taps + 1));
  down.down_partials =
      allocate(2, call->need_down, down.groups * call->rank * (call->channels + 1));
  std::vector<char> e;
  if (up.of_up) {
    e.resize(call->batch * call->rank * call->tokens * memory.element());
    plan.up.params.e = up.e = e.data();
    memory.add_rank("e", up.e, true);
  }
  std::string said = run<cuda::AdapterUpBackwardBlock>(*call, memory, plan.up);
  if (!said.empty()) return keep("up: " + said);
  said = run<cuda::AdapterWeightGradientBlock>(*call, memory, plan.up_weight);
  if (!said.empty()) return keep("up weight: " + said);
  said = correlate(*call, memory, plan.correlate);
  if (!said.empty()) return keep("correlate: " + said);
  said = run<cuda::AdapterConvolveBackwardBlock>(*call, memory, plan.convolve);
  if (!said.empty()) return keep("convolve: " + said);
  said = memory.run(plan.taps.shape, [&](char* shared) {
    if (call->storage == Storage::bfloat16)
      cuda::WeightGradientBlock<cuda::BFloat16>(plan.taps.params, shared).run();
    else
      cuda::WeightGradientBlock<cuda::Float16>(plan.taps.params, shared).run();
  });
  if (!said.empty()) return keep("taps: " + said);
  said = run<cuda::AdapterDownBackwardBlock>(*call, memory, plan.down);
  if (!said.empty()) return keep("down: " + said);
  said = run<cuda::AdapterWeightGradientBlock>(*call, memory, plan.down_weight);
  if (!said.empty()) return keep("down weight: " + said);
  cuda::AdapterSums sums;
  auto shape = cuda::plan_adapter_sums(*call, plan, *grads, sums);
  shape.shared_bytes = 4 * shape.threads;  // which the kernel declares
  return keep(memory.run(shape, [&](char* shared) {
    auto* floats = reinterpret_cast<float*>(shared);
    switch (call->storage) {
      case Storage::float32: return cuda::sum_adapter_partials<cuda::Float32>(sums, floats);
      case Storage::bfloat16: return cuda::sum_adapter_partials<cuda::BFloat16>(sums, floats);
      default: return cuda::sum_adapter_partials<cuda::Float16>(sums, floats);
    }
  }));
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
    put({plan.up.shape, plan.up_weight.shape, plan.correlate.shape, plan.convolve.shape,
         plan.taps.shape, plan.down.shape, plan.down_weight.shape});
    refusal = plan.refusal;
  } else {
    const cuda::AdapterForward plan = cuda::plan_adapter_forward(*call, multiprocessors);
    put({plan.down.shape, plan.correlate.shape, plan.up.shape});
    refusal = plan.refusal;
  }
  return refusal == nullptr ? "" : refusal;
}
