// Direct depthwise convolution, one output element at a time: raw pointers and the params struct.
// Plain sums in the accumulation type A; the baseline that tensor-core kernels are held against.
#pragma once

#include "../../conv_params.h"

namespace lka::cuda {

template <class S, class A>
__device__ A direct_forward(const ConvParams& p, const S* weight, int64_t b, int64_t c, int64_t oy,
                            int64_t ox) {
  const S* input =
      static_cast<const S*>(p.input.data) + b * p.input.stride_b + c * p.input.stride_c;
  A sum = 0;
  for (int64_t ky = 0; ky < p.kernel_h; ++ky) {
    const int64_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
    if (y < 0 || y >= p.input.height) continue;
    for (int64_t kx = 0; kx < p.kernel_w; ++kx) {
      const int64_t x = ox * p.stride_w - p.pad_left + kx * p.dilation_w;
      if (x < 0 || x >= p.input.width) continue;
      sum += A(weight[(c * p.kernel_h + ky) * p.kernel_w + kx]) *
             A(input[y * p.input.stride_h + x * p.input.stride_w]);
    }
  }
  return sum;
}

template <class S, class A>
__device__ A direct_backward_input(const ConvParams& p, const S* weight, int64_t b, int64_t c,
                                   int64_t y, int64_t x) {
  const S* grad =
      static_cast<const S*>(p.output.data) + b * p.output.stride_b + c * p.output.stride_c;
  A sum = 0;
  for (int64_t ky = 0; ky < p.kernel_h; ++ky) {
    const int64_t from_y = y + p.pad_top - ky * p.dilation_h;
    if (from_y < 0 || from_y % p.stride_h || from_y / p.stride_h >= p.output.height) continue;
    for (int64_t kx = 0; kx < p.kernel_w; ++kx) {
      const int64_t from_x = x + p.pad_left - kx * p.dilation_w;
      if (from_x < 0 || from_x % p.stride_w || from_x / p.stride_w >= p.output.width) continue;
      sum += A(weight[(c * p.kernel_h + ky) * p.kernel_w + kx]) *
             A(grad[from_y / p.stride_h * p.output.stride_h +
                    from_x / p.stride_w * p.output.stride_w]);
    }
  }
  return sum;
}

// The term of one position of grad_output in the gradient of weight (c, ky, kx); tap kH·kW stands
// for the bias.
template <class S, class A>
__device__ A direct_weight_term(const ConvParams& p, int64_t b, int64_t c, int64_t oy, int64_t ox,
                                int64_t tap) {
  const A grad =
      A(static_cast<const S*>(p.output.data)[b * p.output.stride_b + c * p.output.stride_c +
                                             oy * p.output.stride_h + ox * p.output.stride_w]);
  if (tap == p.kernel_h * p.kernel_w) return grad;
  const int64_t y = oy * p.stride_h - p.pad_top + tap / p.kernel_w * p.dilation_h;
  const int64_t x = ox * p.stride_w - p.pad_left + tap % p.kernel_w * p.dilation_w;
  if (y < 0 || y >= p.input.height || x < 0 || x >= p.input.width) return A(0);
  return grad * A(static_cast<const S*>(p.input.data)[b * p.input.stride_b + c * p.input.stride_c +
                                                      y * p.input.stride_h + x * p.input.stride_w]);
}

}  // namespace lka::cuda
