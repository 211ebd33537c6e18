// The one params struct of depthwise convolution: plain numbers and raw pointers, so that kernels
// need no tensor type. Sizes are elements; strides are elements, not bytes.
#pragma once

#include <cstdint>

namespace lka {

enum class Storage : int { float32, float64, bfloat16, float16 };

// What a caller leaves open, or asks for: "any" is the fastest of those that a backend has.
enum class Form : int { any, direct, fft, implicit_gemm };

// A batch of maps (B, C, H, W) in any layout.
struct MapView {
  void* data = nullptr;
  int64_t height = 0, width = 0;
  int64_t stride_b = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

struct ConvParams {
  Storage storage = Storage::float32;
  Form form = Form::any;
  int64_t batch = 0, channels = 0;
  MapView input, output;
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t pad_top = 0, pad_left = 0;
};

}  // namespace lka
