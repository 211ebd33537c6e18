#include "depthwise_kernel_name.h"

#include "depthwise_planner.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

void lay_out(MapView& map, int64_t channels, bool channels_last) {
  map.stride_b = channels * map.height * map.width;
  map.stride_c = channels_last ? 1 : map.height * map.width;
  map.stride_w = channels_last ? channels : 1;
  map.stride_h = map.stride_w * map.width;
}

}  // namespace

const char* depthwise_kernel_name(Direction direction, ConvParams call, int64_t pad_bottom,
                                  int64_t pad_right, bool channels_last, int num_threads) {
  MapView &input = call.input, &output = call.output;
  output.height = output_extent(input.height, call.kernel_h, call.stride_h, call.pad_top,
                                pad_bottom, call.dilation_h);
  output.width = output_extent(input.width, call.kernel_w, call.stride_w, call.pad_left, pad_right,
                               call.dilation_w);
  for (int64_t size :
       {call.batch, call.channels, input.height, input.width, output.height, output.width})
    if (size < 1) return nullptr;
  lay_out(input, call.channels, channels_last);
  lay_out(output, call.channels, channels_last);
  switch (direction) {
    case Direction::forward: return plan_forward(call, num_threads).kernel_name;
    case Direction::backward_input: return plan_backward_input(call, num_threads).kernel_name;
    default: return plan_backward_weight(call).kernel_name;
  }
}

}  // namespace lka::cpu
