// Which calls oneDNN, behind PyTorch's own convolution, serves faster than the kernels here.
#pragma once

#include "../conv_params.h"

namespace lka::cpu {

struct HandoverCase {
  Storage storage;
  bool channels_last;
  int64_t kernel_area;  // taps
  int64_t map_area;     // positions of the output
  bool unit_stride;
  bool native_bfloat16;  // the processor multiplies bfloat16
};

// Measured on one core of a Zen 4 with AVX-512 (docs/kernel-notes.md); where the two are within
// five percent of each other the call stays here. float16 has no fast path in PyTorch there.
inline bool onednn_is_faster_forward(const HandoverCase& c) {
  constexpr int64_t k5 = 5 * 5, k7 = 7 * 7, k13 = 13 * 13, map8 = 8 * 8, map14 = 14 * 14;
  switch (c.storage) {
    case Storage::float32:
      if (!c.channels_last) return c.kernel_area <= k7 && c.map_area <= map8;
      return c.kernel_area <= k5 ||
             (c.kernel_area <= k7 && (c.map_area <= map14 || !c.unit_stride));
    case Storage::bfloat16:
      if (!c.native_bfloat16) return false;
      return c.channels_last ? c.kernel_area <= k7 : c.kernel_area <= k13 && c.map_area <= map14;
    default: return false;
  }
}

inline bool onednn_is_faster_backward_input(const HandoverCase& c) {
  constexpr int64_t k3 = 3 * 3, k5 = 5 * 5, k7 = 7 * 7, map14 = 14 * 14;
  if (!c.channels_last || !c.unit_stride) return false;
  switch (c.storage) {
    case Storage::float32: return c.kernel_area <= k3 && c.map_area <= 28 * 28;
    case Storage::bfloat16:
      return c.native_bfloat16 &&
             (c.kernel_area <= k5 || (c.kernel_area <= k7 && c.map_area <= map14));
    default: return false;
  }
}

}  // namespace lka::cpu
