// Which kernel the sizes of a depthwise convolution choose, without a tensor: for `explain`, and
// for the test that holds the choice to what was measured.
#pragma once

#include <string>

#include "../conv_params.h"

namespace lka::cpu {

// Sizes, as in ConvParams; the strides of its maps follow from `channels_last`.
struct DepthwiseSizes {
  int64_t batch, channels, height, width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w;
  bool channels_last;
};

// "fft", or a way to sum directly: "blocks" of channels, "pairs" of bfloat16 rows in them, "planar"
// rows, "flat" planes, "in_place" in channels_last maps, or "dense" where the kernel covers the
// map. Null if `direction` is none of "forward", "backward_input" and "backward_weight", or there
// is no output.
const char* depthwise_kernel_name(const std::string& direction, Storage storage,
                                  const DepthwiseSizes& sizes, int num_threads);

}  // namespace lka::cpu
