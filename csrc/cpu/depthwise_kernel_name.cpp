#include "depthwise_kernel_name.h"

#include "depthwise_planner.h"

namespace lka::cpu {
namespace {

MapView map_of(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  MapView map;
  map.height = height;
  map.width = width;
  map.stride_b = channels * height * width;
  map.stride_c = channels_last ? 1 : height * width;
  map.stride_w = channels_last ? channels : 1;
  map.stride_h = map.stride_w * width;
  return map;
}

int64_t output_extent(int64_t input, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
  const int64_t reach = input + padding - dilation * (kernel - 1) - 1;
  return reach < 0 ? 0 : reach / stride + 1;
}

}  // namespace

const char* depthwise_kernel_name(const std::string& direction, Storage storage,
                                  const DepthwiseSizes& s, int num_threads) {
  ConvParams p;
  p.storage = storage;
  p.batch = s.batch;
  p.channels = s.channels;
  p.kernel_h = s.kernel_h;
  p.kernel_w = s.kernel_w;
  p.stride_h = s.stride_h;
  p.stride_w = s.stride_w;
  p.dilation_h = s.dilation_h;
  p.dilation_w = s.dilation_w;
  p.pad_top = s.pad_top;
  p.pad_left = s.pad_left;
  const int64_t height =
      output_extent(s.height, s.kernel_h, s.stride_h, s.pad_top + s.pad_bottom, s.dilation_h);
  const int64_t width =
      output_extent(s.width, s.kernel_w, s.stride_w, s.pad_left + s.pad_right, s.dilation_w);
  if (s.batch * s.channels * s.height * s.width * height * width == 0) return nullptr;
  p.input = map_of(s.channels, s.height, s.width, s.channels_last);
  p.output = map_of(s.channels, height, width, s.channels_last);
  if (direction == "forward") return plan_forward(p, num_threads).kernel_name;
  if (direction == "backward_input") return plan_backward_input(p, num_threads).kernel_name;
  if (direction == "backward_weight") return plan_backward_weight(p).kernel_name;
  return nullptr;
}

}  // namespace lka::cpu
