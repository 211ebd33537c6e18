// Which calls oneDNN, behind PyTorch's own convolution, serves faster than the kernels here.
#pragma once

#include "../conv_params.h"

namespace lka::cpu {

struct HandoverCase {
  Storage storage;
  bool channels_last;
  int64_t kernel_area;  // taps
  int64_t map_area;     // positions of the output
  int64_t elements;     // of the output
  bool unit_stride;
  bool native_bfloat16;  // the processor multiplies bfloat16
};

// What does not depend on the size of the map, dispatch.py leaves to PyTorch as a whole.
// A call of PyTorch's convolution costs 30 microseconds before it begins, one of the kernels here
// five: with fewer outputs than this, nothing is handed over.
constexpr int64_t kFewestElements = 200 * 1024;

// Measured on one core of a Zen 4 with AVX-512 (docs/kernel-notes.md); where the two are within
// five percent of each other the call stays here. float16 has no fast path in PyTorch there.
inline bool onednn_is_faster_forward(const HandoverCase& c) {
  constexpr int64_t k5 = 5 * 5, k7 = 7 * 7, k13 = 13 * 13, map8 = 8 * 8, map14 = 14 * 14;
  if (c.elements < kFewestElements) return false;
  switch (c.storage) {
    case Storage::float32:
      if (!c.channels_last) return false;
      return c.kernel_area <= k5 ||
             (c.kernel_area <= k7 &&
              (c.map_area <= map8 || c.map_area > 28 * 28 || !c.unit_stride));
    case Storage::bfloat16:
      if (!c.native_bfloat16) return false;
      return c.channels_last ? c.kernel_area <= k7 : c.kernel_area <= k13 && c.map_area <= map14;
    default: return false;
  }
}

inline bool onednn_is_faster_backward_input(const HandoverCase& c) {
  constexpr int64_t k3 = 3 * 3, k5 = 5 * 5, k7 = 7 * 7, map14 = 14 * 14;
  if (c.elements < kFewestElements || !c.unit_stride) return false;
  switch (c.storage) {
    case Storage::float32:
      if (!c.channels_last) return false;
      return c.kernel_area <= k3 || (c.kernel_area <= k5 && c.map_area > 56 * 56);
    case Storage::bfloat16:
      return c.channels_last && c.native_bfloat16 &&
             (c.kernel_area <= k5 || (c.kernel_area <= k7 && c.map_area <= map14));
    default: return false;
  }
}

}  // namespace lka::cpu
