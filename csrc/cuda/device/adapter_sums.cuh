// The last launch of the fused adapter backward: partial sums become the gradients of the weights.
#pragma once

#include "storage.cuh"

namespace lka::cuda {

// Gradients (channels, taps) and (channels) from `groups` times (channels, taps + 1). Taps that
// touch nothing have no partial sums.
struct AdapterSum {
  const float* partials = nullptr;
  void *weight = nullptr, *bias = nullptr;  // null: not asked for
  int64_t first_block = 0;
  int32_t groups = 0, channels = 0;
  int32_t full_h = 0, full_w = 0;      // all taps
  int32_t first_h = 0, first_w = 0;    // the first that touches
  int32_t kernel_h = 0, kernel_w = 0;  // those that touch
};

struct AdapterSums {
  static constexpr int kMost = 3, kElements = 32, kSlices = 16;
  AdapterSum sums[kMost];
  int32_t count = 0;
};

// A block has 32 elements. Each of sixteen warps adds a part of the groups in their order, and one
// adds the parts in theirs. `shared` holds kSlices · kElements floats.
template <class Storage>
LKA_DEVICE void sum_adapter_partials(const AdapterSums& p, float* shared) {
  using Type = typename Stored<Storage>::Type;
  int which = 0;
  while (which + 1 < p.count && blockIdx.x >= p.sums[which + 1].first_block) ++which;
  const AdapterSum& s = p.sums[which];
  const int element = threadIdx.x % AdapterSums::kElements;
  const int slice = threadIdx.x / AdapterSums::kElements;
  const int64_t taps = int64_t(s.full_h) * s.full_w, row = s.channels * (taps + 1);
  const int64_t i = (blockIdx.x - s.first_block) * AdapterSums::kElements + element;
  const int64_t channel = i / (taps + 1);
  const int tap = int(i - channel * (taps + 1));
  const int ky = tap / s.full_w - s.first_h, kx = tap % s.full_w - s.first_w;
  const bool is_bias = tap == taps;
  const bool touches = ky >= 0 && ky < s.kernel_h && kx >= 0 && kx < s.kernel_w;
  float sum = 0;
  if (i < row && (is_bias || touches)) {
    const int per_slice = (s.groups + AdapterSums::kSlices - 1) / AdapterSums::kSlices;
    const int first = slice * per_slice;
    const int end = first + per_slice < s.groups ? first + per_slice : s.groups;
#pragma unroll 8  // loads under way together
    for (int group = first; group < end; ++group) sum += load_global(s.partials + group * row + i);
  }
  store_shared(shared + threadIdx.x, sum);
  __syncthreads();
  if (slice > 0 || i >= row) return;
  for (int other = 1; other < AdapterSums::kSlices; ++other)
    sum += load_shared(shared + other * AdapterSums::kElements + element);
  auto* to = static_cast<Type*>(is_bias ? s.bias : s.weight);
  if (to != nullptr)
    store_global(to + (is_bias ? channel : channel * taps + tap), Stored<Storage>::of(sum));
}

}  // namespace lka::cuda
