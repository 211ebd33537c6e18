// Which kernel the sizes of a depthwise convolution choose, without a tensor: for `explain`, and
// for the test that holds the choice to what was measured.
#pragma once

#include "../conv_params.h"

namespace lka::cpu {

enum class Direction { forward, backward_input, backward_weight };

// "fft", or a way to sum directly: "blocks" of channels, "pairs" of bfloat16 rows in them, "planar"
// rows, "flat" planes, "in_place" in channels_last maps, "pairs_in_place" of bfloat16 rows there,
// or "dense" where the kernel covers the map.
//
// Of `call` the storage, batch, channels, height and width of the input, kernel, strides, dilations
// and padding in front are read; all maps are dense. Null if there is no result.
const char* depthwise_kernel_name(Direction direction, ConvParams call, int64_t pad_bottom,
                                  int64_t pad_right, bool channels_last, int num_threads);

}  // namespace lka::cpu
