// Planned launches run by fibers: what functions that Python calls have in common.
#pragma once

#include <string>

#include "cuda/depthwise_plan.h"
#include "cuda_on_cpu.h"

// From the first to the last element of a map.
inline cuda_on_cpu::Range range_of(const char* name, const lka::MapView& view, int64_t batch,
                                   int64_t channels, size_t element_size, bool writable) {
  const int64_t last = (batch - 1) * view.stride_b + (channels - 1) * view.stride_c +
                       (view.height - 1) * view.stride_h + (view.width - 1) * view.stride_w;
  return {name, view.data, size_t(last + 1) * element_size, writable};
}

inline cuda_on_cpu::Launch launch_of(const lka::cuda::Plan& plan) {
  return {plan.shape.blocks, plan.shape.threads, size_t(plan.shape.shared_bytes)};
}

inline const char* keep(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

inline const char* refused(const lka::cuda::Plan& plan) {
  return keep(std::string("refused: ") + plan.refusal);
}

// Blocks, threads and shared memory of a block; or why the call is refused.
inline const char* describe(const lka::cuda::Plan& plan, int64_t* shape) {
  shape[0] = plan.shape.blocks;
  shape[1] = plan.shape.threads;
  shape[2] = plan.shape.shared_bytes;
  return plan.refusal == nullptr ? "" : plan.refusal;
}
