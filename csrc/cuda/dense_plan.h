// What launches of the dense form of depthwise convolution look like: pure functions, as those of
// depthwise_plan.h.
#pragma once

#include "depthwise_plan.h"
#include "device/dense_correlate.cuh"
#include "device/dense_weight_gradient.cuh"

namespace lka::cuda {

// Maps of so many positions are served. Backward-weight has all products of a channel in registers,
// of a map of 16² in six blocks, each of which reads a part of either map.
constexpr int64_t kMostDensePositions = 28 * 28, kMostDenseGradPositions = 16 * 16;
// Of a block, so that three share an H100's multiprocessor.
constexpr int64_t kDenseShared = 72 * 1024;

constexpr const char* kMapTooLarge = "the map is too large for the dense form";
constexpr const char* kNoRows = "the dense form reads maps whose columns are neighbours in memory";

namespace detail {

inline int64_t odd_multiple_of_8(int64_t n) { return ceil_div(n, 8) / 2 * 16 + 8; }

// Rows of an even number of positions, or of the width where `even` is not asked for.
inline PlaneAccess plane_access(const MapView& view, int64_t batch, int64_t channels, bool even) {
  PlaneAccess access;
  access.view = view;
  access.pitch = int32_t(view.width + (even ? view.width & 1 : 0));
  access.positions = int32_t(ceil_div(view.height * access.pitch, 16) * 16);
  access.vector = 1;
  const bool dense = view.height == 1 || view.stride_h == view.width;
  if (dense && access.pitch == view.width) {
    MapView flat = view;  // a plane is one row
    flat.width = view.height * view.width;
    flat.height = 1;
    access.vector = std::max(1, access_of(flat, batch, channels).row_vector);
  }
  return access;
}

// Parts of about as many whole rows, of at most `most` positions.
inline void divide_rows(int64_t most, PlaneAccess& map, int32_t& parts, int32_t& rows) {
  const int64_t height = map.view.height, width = map.view.width;
  parts = int32_t(ceil_div(height, most / width));
  rows = int32_t(ceil_div(height, parts));
  parts = int32_t(ceil_div(height, rows));
  map.positions = int32_t(ceil_div(rows * width, 16) * 16);
  while (parts > 1 && rows * width % map.vector != 0) map.vector /= 2;
}

}  // namespace detail

// Forward and backward-input; fills what does not depend on weight and bias.
inline Plan plan_dense_correlate(const Correlation& call, DenseCorrelateParams& p) {
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  const int64_t inputs = call.source.height * call.source.width;
  const int64_t outputs = call.result.height * call.result.width;
  if (std::max(inputs, outputs) > kMostDensePositions) return refuse(kMapTooLarge);
  for (const MapView* map : {&call.source, &call.result})
    if (map->width > 1 && map->stride_w != 1) return refuse(kNoRows);
  describe(call, p);
  p.source = detail::plane_access(call.source, call.batch, call.channels, true);
  p.result = call.result;
  MapView flat = call.result;
  flat.width = outputs;
  flat.height = 1;
  p.pairs = outputs % 2 == 0 &&
            (call.result.height == 1 || call.result.stride_h == call.result.width) &&
            access_of(flat, call.batch, call.channels).row_vector >= 2;
  p.table_rows = int32_t(call.source.height + call.result.height - 1);
  p.table_pitch = int32_t(ceil_div(p.source.pitch + call.result.width - 1, 2) * 2);
  int64_t copy = int64_t(p.table_rows) * p.table_pitch / 2;
  // Four words of one copy and four of the other should meet different banks.
  while (copy % 4 != 0 || copy % 32 < 8 || copy % 32 > 24) ++copy;
  p.table_copy = int32_t(copy);
  p.table_plane = int32_t(2 * copy);
  p.image_pitch = int32_t(detail::odd_multiple_of_8(p.source.positions));
  const int64_t tiles = ceil_div(outputs, 8);
  for (p.row_tiles = call.batch > 32   ? 4
                     : call.batch > 16 ? 2
                                       : 1;
       p.row_tiles > 0; p.row_tiles /= 2) {
    const int64_t images = 16 * p.row_tiles;
    const int64_t of_channel = 4 * int64_t(p.table_plane) + 2 * images * p.image_pitch;
    const int64_t steps = 2 * int64_t(p.source.positions);
    if (steps + of_channel > kDenseShared) continue;
    const int64_t wanted = ceil_div(tiles, DenseCorrelate::kTiles / p.row_tiles);
    p.warps_of_channel = int32_t(std::min<int64_t>(8, ceil_div(wanted, ceil_div(wanted, 8))));
    p.block_channels =
        int32_t(std::min({8 / int64_t(p.warps_of_channel), call.channels,
                          std::max<int64_t>(1, (kDenseShared / 2 - steps) / of_channel)}));
    p.channel_groups = int32_t(ceil_div(call.channels, p.block_channels));
    LaunchShape shape;
    shape.blocks = p.channel_groups * ceil_div(call.batch, images);
    shape.threads = 32 * p.warps_of_channel * p.block_channels;
    shape.shared_bytes = steps + p.block_channels * of_channel;
    if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
    return {shape};
  }
  return refuse(kMapTooLarge);
}

// Backward-weight; as plan_weight_gradient.
inline Plan plan_dense_weight_gradient(const ConvParams& call, int multiprocessors,
                                       DenseWeightGradientParams& p) {
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  if (std::max(call.input.height * call.input.width, call.output.height * call.output.width) >
      kMostDenseGradPositions)
    return refuse(kMapTooLarge);
  for (const MapView* map : {&call.input, &call.output})
    if (map->width > 1 && map->stride_w != 1) return refuse(kNoRows);
  describe(call, p);
  p.grad_output = detail::plane_access(call.output, call.batch, call.channels, false);
  p.input = detail::plane_access(call.input, call.batch, call.channels, false);
  // Of dy eight warps have 128 positions, of x a warp has at most 112 in registers.
  p.tiles = p.input.positions <= 64 ? 8 : 14;
  if (call.output.width > 128 || call.input.width > 8 * p.tiles) return refuse(kMapTooLarge);
  detail::divide_rows(128, p.grad_output, p.grad_parts, p.grad_rows);
  detail::divide_rows(8 * p.tiles, p.input, p.input_parts, p.input_rows);
  p.warps_of_channel = p.grad_output.positions / 16;
  if (int64_t(p.kernel_h) * p.kernel_w > 32 * p.warps_of_channel * DenseWeightGradient::kMostTaps)
    return refuse("the dense form has too few threads for so many taps");
  p.grad_pitch = int32_t(detail::odd_multiple_of_8(p.grad_output.positions));
  p.input_pitch = int32_t(detail::odd_multiple_of_8(p.input.positions));
  // Lanes of a product's row are two floats apart, rows should be eight banks apart.
  p.product_pitch = int32_t(p.input.positions % 32 == 0 ? p.input.positions + 8
                                                        : ceil_div(p.input.positions, 32) * 32 + 8);
  p.images = int32_t(std::min<int64_t>(64, ceil_div(call.batch, 16) * 16));
  const int64_t planes = 2 * int64_t(p.images) * (p.grad_pitch + p.input_pitch);
  const int64_t rows = 4 * int64_t(16) * p.product_pitch;
  p.product_tiles =
      int32_t(std::min<int64_t>(p.warps_of_channel, std::max<int64_t>(1, planes / rows)));
  p.channel_bytes = int32_t(ceil_div(std::max(planes, rows * p.product_tiles), 16) * 16);
  if (p.channel_bytes > kMostShared) return refuse("the maps do not fit shared memory");
  p.block_channels = int32_t(std::clamp<int64_t>(
      std::min<int64_t>(8 / p.warps_of_channel, kDenseShared / p.channel_bytes), 1, call.channels));
  p.channel_groups = int32_t(ceil_div(call.channels, p.block_channels));
  p.steps = int32_t(ceil_div(call.batch, p.images));
  const int32_t parts = p.grad_parts * p.input_parts;
  // Diagonals are added by every group: no more of them than keep two blocks on a multiprocessor.
  const int64_t groups =
      std::clamp<int64_t>(ceil_div(2 * multiprocessors, p.channel_groups * parts), 1, p.steps);
  p.steps_of_group = int32_t(ceil_div(p.steps, groups));
  p.groups = int32_t(ceil_div(p.steps, p.steps_of_group) * parts);
  LaunchShape shape;
  shape.blocks = int64_t(p.channel_groups) * p.groups;
  shape.threads = 32 * p.warps_of_channel * p.block_channels;
  shape.shared_bytes = int64_t(p.block_channels) * p.channel_bytes;
  if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
  return {shape};
}

}  // namespace lka::cuda
