// The second part of weight gradients: sums of groups of terms become gradients.
#pragma once

#include "storage.cuh"

namespace lka::cuda {

// Adds the groups' sums in their order, one gradient a thread. Taps that touch nothing have none.
template <class Storage, class Params>
LKA_DEVICE void sum_partials(const Params& p, void* grad_weight, void* grad_bias) {
  using Type = typename Stored<Storage>::Type;
  const int64_t taps = int64_t(p.full_h) * p.full_w, row = p.channels * (taps + 1);
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= row) return;
  const int64_t channel = i / (taps + 1);
  const int tap = int(i - channel * (taps + 1));
  const int ky = tap / p.full_w - p.first_h, kx = tap % p.full_w - p.first_w;
  const bool is_bias = tap == taps;
  const bool touches = ky >= 0 && ky < p.kernel_h && kx >= 0 && kx < p.kernel_w;
  float sum = 0;
  if (is_bias || touches)
    for (int group = 0; group < p.groups; ++group) sum += load_global(p.partials + group * row + i);
  store_global(is_bias ? static_cast<Type*>(grad_bias) + channel
                       : static_cast<Type*>(grad_weight) + channel * taps + tap,
               Stored<Storage>::of(sum));
}

}  // namespace lka::cuda
