// Arithmetic on sizes, for what runs once a call. Not for the kernels: each instruction set must
// have its own copy of a function, and the linker would keep one of these.
#pragma once

#include <cstdint>

namespace lka::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Outputs of a convolution in one dimension; 0 if the kernel does not fit.
inline int64_t output_extent(int64_t input, int64_t kernel, int64_t stride, int64_t before,
                             int64_t after, int64_t dilation) {
  const int64_t steps = input + before + after - dilation * (kernel - 1) - 1;
  return steps < 0 ? 0 : steps / stride + 1;
}

}  // namespace lka::cpu
