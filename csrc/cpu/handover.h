// Which calls oneDNN, behind PyTorch's own convolution, serves faster than the kernels here.
#pragma once

#include <atomic>

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

// A call of PyTorch's convolution costs 30 microseconds before it begins, one of the kernels here
// five: with fewer outputs than this, nothing is handed over.
constexpr int64_t kFewestElements = 200 * 1024;

// Measured on one core of a Zen 4 with AVX-512 (docs/kernel-notes.md); where the two are within
// five percent of each other the call stays here. oneDNN multiplies bfloat16 by instructions of its
// own there; float16 has no fast path in PyTorch.
constexpr int64_t kArea3 = 3 * 3, kArea5 = 5 * 5, kArea7 = 7 * 7, kArea13 = 13 * 13;
constexpr int64_t kMap8 = 8 * 8, kMap28 = 28 * 28;

// Whether PyTorch may use oneDNN: Python's business, which says it through the module.
inline std::atomic<bool> onednn_enabled{false};

inline bool onednn_is_faster_forward(const HandoverCase& c) {
  if (c.elements < kFewestElements || !onednn_enabled) return false;
  switch (c.storage) {
    case Storage::float32: return c.channels_last && c.kernel_area <= kArea3 && c.map_area <= kMap8;
    case Storage::bfloat16:
      if (!c.native_bfloat16) return false;
      if (!c.channels_last) return c.kernel_area <= kArea13 && c.map_area <= kMap8;
      return c.kernel_area <= kArea5 || (c.kernel_area <= kArea7 && c.map_area <= kMap28);
    default: return false;
  }
}

inline bool onednn_is_faster_backward_input(const HandoverCase& c) {
  if (c.elements < kFewestElements || !c.unit_stride || !onednn_enabled) return false;
  switch (c.storage) {
    case Storage::bfloat16:
      if (!c.native_bfloat16) return false;
      if (!c.channels_last) return c.kernel_area <= kArea7 && c.map_area <= kMap8;
      return c.kernel_area <= kArea3 || (c.kernel_area <= kArea5 && c.map_area <= kMap28);
    default: return false;
  }
}

}  // namespace lka::cpu
