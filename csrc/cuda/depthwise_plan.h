// What a launch of a depthwise kernel looks like: pure functions of sizes, strides and addresses,
// plain C++ that also runs where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#include "../conv_params.h"
#include "device/float_correlate.cuh"
#include "device/float_weight_gradient.cuh"
#include "device/toeplitz_correlate.cuh"
#include "device/toeplitz_weight_gradient.cuh"
#include "launch_shape.h"

namespace lka::cuda {

// What one block may have on compute capability 8.6 and 8.9, the least from 8.0 on; two blocks of
// half as much share a multiprocessor.
constexpr int64_t kMostShared = 99 * 1024;
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// A launch, or why the kernel cannot serve the call.
struct Plan {
  LaunchShape shape;
  const char* refusal = nullptr;
};

struct Taps {
  int64_t first, count;
  int64_t before;  // padding in front of the first; negative where the map is cropped
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of `taps` in one dimension those that some output meets on the map; one is kept where none is.
inline Taps taps_that_touch(int64_t size, int64_t out_size, int64_t taps, int64_t before,
                            int64_t dilation) {
  int64_t first = before > out_size - 1 ? ceil_div(before - (out_size - 1), dilation) : 0;
  const int64_t reach = size - 1 + before;
  const int64_t end = std::min(taps, reach >= 0 ? reach / dilation + 1 : int64_t(0));
  first = std::min(first, taps - 1);
  return {first, std::max<int64_t>(1, end - first), before - first * dilation};
}

// How 16-bit elements of a map may be accessed: vectors by which address and strides divide, and
// the width, as beyond the last row the memory may end.
inline MapAccess access_of(const MapView& view, int64_t batch, int64_t channels) {
  MapAccess access;
  access.view = view;
  // A dimension of one element is never stepped along.
  const int64_t b = batch > 1 ? view.stride_b : 0, c = channels > 1 ? view.stride_c : 0;
  const int64_t h = view.height > 1 ? view.stride_h : 0, w = view.width > 1 ? view.stride_w : 0;
  const auto divide = [&](int64_t vector, std::initializer_list<int64_t> strides) {
    if (reinterpret_cast<uintptr_t>(view.data) % (2 * vector) != 0) return false;
    return std::all_of(strides.begin(), strides.end(),
                       [&](int64_t stride) { return stride % vector == 0; });
  };
  if (view.stride_w == 1 || view.width == 1) {
    access.row_vector = 8;
    while (!divide(access.row_vector, {b, c, h, view.width})) access.row_vector /= 2;
  } else if (view.stride_c == 1 && channels % 8 == 0 && divide(8, {b, h, w})) {
    access.channel_vector = 8;
  }
  return access;
}

// A batch of correlations as the operators describe it, taps not yet clipped.
struct Correlation {
  MapView source, result;
  int64_t batch = 0, channels = 0;
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t top = 0, left = 0;
  bool reversed = false;  // taps from the last to the first
};

// Forward as it is; backward-input is the correlation of grad_output with the taps reversed: the
// input at y meets tap ky on its way to the output at y + pad_top - ky·dilation.
inline Correlation correlation_of(const ConvParams& p, bool backward) {
  Correlation call;
  call.source = backward ? p.output : p.input;
  call.result = backward ? p.input : p.output;
  call.batch = p.batch;
  call.channels = p.channels;
  call.kernel_h = p.kernel_h;
  call.kernel_w = p.kernel_w;
  call.dilation_h = p.dilation_h;
  call.dilation_w = p.dilation_w;
  call.top = backward ? p.dilation_h * (p.kernel_h - 1) - p.pad_top : p.pad_top;
  call.left = backward ? p.dilation_w * (p.kernel_w - 1) - p.pad_left : p.pad_left;
  call.reversed = backward;
  return call;
}

// Rows in shared memory: eight of them must meet different banks, 16 bytes each.
inline int64_t row_pitch(int64_t columns) { return ceil_div(columns, 8) / 2 * 16 + 8; }

// Below this, sums of some sizes fit 32 bits.
inline const char* too_large(std::initializer_list<int64_t> sizes) {
  const int64_t largest = std::max(sizes);
  return largest > 1 << 24 ? "a map, kernel or padding of more than 2^24 elements in one dimension"
                           : nullptr;
}

inline const char* too_large(const Correlation& call) {
  return too_large({call.source.height, call.source.width, call.result.height, call.result.width,
                    call.batch, call.channels, call.dilation_h * call.kernel_h,
                    call.dilation_w * call.kernel_w, std::abs(call.top), std::abs(call.left)});
}

// What all parameters have in common: sizes, and the taps that touch the map. Of one tap in a
// dimension the dilation means nothing, but would cut the outputs into as many interleaved parts.
template <class Params>
void describe(int64_t batch, int64_t channels, const Taps& rows, const Taps& columns,
              int64_t dilation_h, int64_t dilation_w, Params& p) {
  p.batch = int32_t(batch);
  p.channels = int32_t(channels);
  p.kernel_h = int32_t(rows.count);
  p.kernel_w = int32_t(columns.count);
  p.dilation_h = rows.count > 1 ? int32_t(dilation_h) : 1;
  p.dilation_w = columns.count > 1 ? int32_t(dilation_w) : 1;
  p.top = int32_t(rows.before);
  p.left = int32_t(columns.before);
}

// Clips the taps, those of a contiguous weight, and where they are reversed begins with the last.
template <class Params>
void describe(const Correlation& call, Params& p) {
  const Taps rows = taps_that_touch(call.source.height, call.result.height, call.kernel_h, call.top,
                                    call.dilation_h);
  const Taps columns = taps_that_touch(call.source.width, call.result.width, call.kernel_w,
                                       call.left, call.dilation_w);
  describe(call.batch, call.channels, rows, columns, call.dilation_h, call.dilation_w, p);
  const int32_t sign = call.reversed ? -1 : 1;
  const int64_t ky = call.reversed ? call.kernel_h - 1 - rows.first : rows.first;
  const int64_t kx = call.reversed ? call.kernel_w - 1 - columns.first : columns.first;
  p.weight_stride_c = call.kernel_h * call.kernel_w;
  p.first_tap = int32_t(ky * call.kernel_w + kx);
  p.tap_stride_y = sign * int32_t(call.kernel_w);
  p.tap_stride_x = sign;
}

constexpr const char* kTapsDoNotFit = "the taps of one channel do not fit shared memory";

// Fills what does not depend on weight and bias.
inline Plan plan_correlate(const Correlation& call, CorrelateParams& p) {
  using Kernel = ToeplitzCorrelate;
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  describe(call, p);
  p.source = access_of(call.source, call.batch, call.channels);
  p.result = access_of(call.result, call.batch, call.channels);

  p.strips =
      int32_t(p.dilation_h * ceil_div(ceil_div(call.result.height, p.dilation_h), Kernel::kRows));
  const int64_t slots = p.strips * call.batch;
  p.x_tiles = int32_t(ceil_div(call.result.width, Kernel::kColumns));
  // Eight outputs meet 7 + extent columns, and one more where they begin at an odd one.
  const int64_t extent = int64_t(p.kernel_w - 1) * p.dilation_w + 1;
  p.chunks = int32_t(ceil_div(7 + extent + (p.left & 1), 16));
  // Seven words of one copy of the taps and seven of the other should meet different banks.
  const int64_t taps_pitch = 8 * int64_t(p.chunks) + 4;
  int64_t taps_copy = taps_pitch * p.kernel_h;
  while (taps_copy % 32 < 8 || taps_copy % 32 > 24) taps_copy += 4;
  if (8 * taps_copy > kMostShared) return refuse(kTapsDoNotFit);
  p.taps_pitch = int32_t(taps_pitch);
  p.taps_copy = int32_t(taps_copy);
  p.taps_plane = int32_t(2 * taps_copy);
  const int64_t tiles = std::min<int64_t>(Kernel::kTiles, ceil_div(call.result.width, 8));
  p.tile.row_pitch = int32_t(row_pitch(6 + 8 * (tiles - 1) + 16 * p.chunks));
  p.tile.plane_pitch = Kernel::kSlots * p.tile.row_pitch;

  // A warp has a channel. Eight make vectors of 16 bytes where channels are neighbours in memory;
  // four let more blocks share a multiprocessor; fewer where the taps need the memory. Only copies
  // of rows are asynchronous and gain by more than two stages.
  const bool by_rows = p.source.row_vector > 0 && p.result.row_vector > 0;
  for (int warps = by_rows ? 4 : 8; warps > 0; warps /= 2)
    for (p.stages = p.source.row_vector > 0 ? 4 : 2; p.stages > 1; p.stages /= 2) {
      const int64_t stages = int64_t(2) * p.stages * warps * p.tile.plane_pitch;
      const int64_t turned =
          int64_t(2) * Kernel::kSlots * (Kernel::kColumns * warps + Kernel::kResultPad);
      LaunchShape shape;
      shape.shared_bytes = Kernel::kSlots * int64_t(sizeof(Kernel::Slot)) +
                           int64_t(4) * warps * p.taps_plane + std::max(stages, turned);
      if (shape.shared_bytes > kMostShared) continue;
      shape.threads = 32 * warps;
      p.channel_groups = int32_t(ceil_div(call.channels, warps));
      shape.blocks = int64_t(p.x_tiles) * p.channel_groups * ceil_div(slots, Kernel::kSlots);
      if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
      return {shape};
    }
  return refuse(kTapsDoNotFit);
}

// Whether neighbouring channels, and no neighbouring columns, are neighbours in memory. Then taps
// are wanted in the order (kW, kH, C), as neighbouring threads read those of neighbouring channels.
inline bool channels_in_lanes(const MapView& view) {
  return view.stride_c == 1 && view.stride_w != 1;
}

// Fills what does not depend on weight and bias.
inline Plan plan_float_correlate(const Correlation& call, FloatCorrelateParams& p) {
  using Kernel = FloatCorrelate;
  if (const char* why = too_large(call)) return {{}, why};
  describe(call, p);
  p.source = call.source;
  p.result = call.result;
  p.channels_in_lanes = channels_in_lanes(call.source);
  if (p.channels_in_lanes) {
    const int64_t first_h = p.first_tap / call.kernel_w, first_w = p.first_tap % call.kernel_w;
    const int64_t sign = call.reversed ? -1 : 1;
    p.weight_stride_c = 1;
    p.tap_stride_y = sign * call.channels;
    p.tap_stride_x = sign * call.channels * call.kernel_h;
    p.first_tap = (first_w * call.kernel_h + first_h) * call.channels;
  }
  const auto groups = [](int64_t size, int64_t dilation, int64_t of) {
    return int32_t(dilation * ceil_div(ceil_div(size, dilation), of));
  };
  p.strips = groups(call.result.height, p.dilation_h, Kernel::kRows);
  p.columns = groups(call.result.width, p.dilation_w, Kernel::kColumns);
  p.threads = call.batch * call.channels * p.strips * p.columns;
  const int64_t blocks = ceil_div(p.threads, Kernel::kThreads);
  if (blocks > kMostBlocks) return {{}, "more than 2^31 blocks"};
  return {{blocks, Kernel::kThreads, 0}};
}

inline const char* too_large(const ConvParams& call) {
  return too_large({call.batch, call.channels, call.input.height, call.input.width,
                    call.output.height, call.output.width, call.dilation_h * call.kernel_h,
                    call.dilation_w * call.kernel_w, call.kernel_h * call.kernel_w,
                    std::abs(call.pad_top), std::abs(call.pad_left)});
}

// Clips the taps of a weight gradient.
template <class Params>
void describe(const ConvParams& call, Params& p) {
  const Taps rows = taps_that_touch(call.input.height, call.output.height, call.kernel_h,
                                    call.pad_top, call.dilation_h);
  const Taps columns = taps_that_touch(call.input.width, call.output.width, call.kernel_w,
                                       call.pad_left, call.dilation_w);
  describe(call.batch, call.channels, rows, columns, call.dilation_h, call.dilation_w, p);
  p.first_h = int32_t(rows.first);
  p.first_w = int32_t(columns.first);
  p.full_h = int32_t(call.kernel_h);
  p.full_w = int32_t(call.kernel_w);
}

// As plan_weight_gradient.
inline Plan plan_float_weight_gradient(const ConvParams& call, int multiprocessors,
                                       FloatWeightGradientParams& p) {
  using Kernel = FloatWeightGradient;
  if (const char* why = too_large(call)) return {{}, why};
  describe(call, p);
  p.grad_output = call.output;
  p.input = call.input;
  p.tap_tiles_h = int32_t(ceil_div(p.kernel_h, Kernel::kTapRows));
  p.tap_tiles_w = int32_t(ceil_div(p.kernel_w, Kernel::kTapColumns));
  p.segments =
      int32_t(p.dilation_w * ceil_div(ceil_div(call.output.width, p.dilation_w), Kernel::kSegment));
  p.units = call.batch * call.output.height * p.segments;
  const int64_t blocks = call.channels * p.tap_tiles_h * p.tap_tiles_w;
  const int64_t groups = std::clamp<int64_t>(ceil_div(8 * multiprocessors, blocks), 1,
                                             ceil_div(p.units, Kernel::kThreads));
  p.units_of_group = ceil_div(p.units, groups);
  p.groups = int32_t(ceil_div(p.units, p.units_of_group));
  if (blocks * p.groups > kMostBlocks) return {{}, "more than 2^31 blocks"};
  constexpr int64_t kShared = Kernel::kWarps * Kernel::kSums * int64_t(sizeof(float));
  return {{blocks * p.groups, Kernel::kThreads, kShared}};
}

// Weight gradients: what does not depend on the partial sums. `multiprocessors` of the device only
// decides how many groups sum apart, so results are the same from run to run on one device.
inline Plan plan_weight_gradient(const ConvParams& call, int multiprocessors,
                                 WeightGradientParams& p) {
  using Kernel = WeightGradient;
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  describe(call, p);
  p.grad_output = access_of(call.output, call.batch, call.channels);
  p.input = access_of(call.input, call.batch, call.channels);
  p.tap_tiles_h = int32_t(ceil_div(p.kernel_h, Kernel::kTapRows));
  p.tap_tiles_w = int32_t(ceil_div(p.kernel_w, Kernel::kTapColumns));
  p.column_tiles = int32_t(ceil_div(call.input.width, Kernel::kColumns));

  const int64_t taps_h = std::min<int64_t>(p.kernel_h, Kernel::kTapRows);
  const int64_t taps_w = std::min<int64_t>(p.kernel_w, Kernel::kTapColumns);
  const int64_t width = std::min<int64_t>(Kernel::kColumns, ceil_div(call.input.width, 16) * 16);
  // Up to seven columns in front are skipped.
  const int64_t grad_width = 7 + width + (taps_w - 1) * p.dilation_w;
  p.input_tile.row_pitch = int32_t(row_pitch(width));
  p.grad_tile.row_pitch = int32_t(row_pitch(grad_width));
  // About 64 products for each tile of 16 × 8 taps between two barriers; rows of neighbouring
  // strips overlap by the kernel's extent, so a strip is high before it is of several images.
  const int64_t chunks = width / 16;
  p.strip_rows = int32_t(std::min<int64_t>(16, call.output.height));
  p.strips = int32_t(ceil_div(call.output.height, p.strip_rows));
  const int64_t most_images = std::max<int64_t>(1, 64 / (p.strip_rows * chunks));
  const bool by_rows = p.input.row_vector > 0 && p.grad_output.row_vector > 0;
  p.input_rows = int32_t(p.strip_rows + (taps_h - 1) * p.dilation_h);
  // A warp has a channel. First fewer images in a step, then fewer warps.
  for (int64_t warps = by_rows ? 4 : 8; warps > 0; warps /= 2)
    for (int64_t images = std::min(call.batch, most_images); images > 0; images /= 2) {
      const int64_t input_plane = images * p.input_rows * p.input_tile.row_pitch;
      // Seven words of one copy and seven of the other should meet different banks.
      int64_t grad_copy = images * p.strip_rows * p.grad_tile.row_pitch / 2;
      while (grad_copy % 32 < 8 || grad_copy % 32 > 24) grad_copy += 4;
      LaunchShape shape;
      shape.shared_bytes = 2 * warps * (input_plane + 4 * grad_copy);
      if (shape.shared_bytes > (images > 1 ? kMostShared / 2 : kMostShared)) continue;
      p.input_tile.plane_pitch = int32_t(input_plane);
      p.grad_copy = int32_t(grad_copy);
      p.grad_tile.plane_pitch = int32_t(4 * grad_copy);
      shape.threads = int(32 * warps);
      p.images = int32_t(images);
      p.image_groups = int32_t(ceil_div(call.batch, images));
      p.channel_groups = int32_t(ceil_div(call.channels, warps));
      p.steps = int64_t(p.image_groups) * p.strips * p.column_tiles;
      const int64_t blocks = int64_t(p.channel_groups) * p.tap_tiles_h * p.tap_tiles_w;
      // Four blocks for every multiprocessor; more groups would only make more partial sums.
      const int64_t groups = std::clamp<int64_t>(ceil_div(4 * multiprocessors, blocks), 1, p.steps);
      p.steps_of_group = ceil_div(p.steps, groups);
      p.groups = int32_t(ceil_div(p.steps, p.steps_of_group));
      shape.blocks = blocks * p.groups;
      if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
      return {shape};
    }
  return refuse("the rows that 32 kernel rows meet do not fit shared memory");
}

// The sum of the groups.
template <class Params>
LaunchShape plan_sum_partials(const Params& p) {
  const int64_t gradients = p.channels * (int64_t(p.full_h) * p.full_w + 1);
  return {ceil_div(gradients, 128), 128, 0};
}

}  // namespace lka::cuda
