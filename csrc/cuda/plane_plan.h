// What launches of the form with planes in shared memory look like: pure functions, as those of
// depthwise_plan.h.
#pragma once

#include "depthwise_plan.h"
#include "device/plane_correlate.cuh"
#include "device/plane_weight_gradient.cuh"

namespace lka::cuda {

constexpr const char* kNoPlanes = "maps are neither rows of columns nor pixels of eight channels";
constexpr const char* kCropped = "the padding in front of the columns is negative";
constexpr const char* kPlaneTooLarge = "the rows of one band do not fit shared memory";

namespace detail {

// Of one warp's plane, so that sixteen warps or more share an H100's multiprocessor, and what one
// band of sixteen rows may have at most: of a warp for itself, and of eight in a block.
constexpr int64_t kPlaneBytes = 12 * 1024, kMostPlaneBytes = 24 * 1024;
constexpr int64_t kWidePlaneBytes = 33 * 256, kMostWidePlaneBytes = 40 * 256;
constexpr int64_t kMostBandRows = 240;  // as far as inverse_rows divides
// Warps that fill an H100.
constexpr int64_t kManyWarps = 132 * 16;

// The largest vector of copies with the fewest columns in front of the window: zeros there cost
// products.
inline void place_columns(int64_t largest, int64_t least, PlaneCorrelateParams& p) {
  const int64_t extent = int64_t(p.kernel_w - 1) * p.dilation_w + 1;
  p.chunks = 0;
  for (int64_t vector = largest; vector >= least; vector /= 2) {
    const int64_t lead = ceil_div(p.left, vector) * vector;
    const int32_t chunks = int32_t(ceil_div(lead - p.left + 7 + extent, 16));
    if (p.chunks > 0 && chunks >= p.chunks) continue;
    p.chunks = chunks;
    p.lead = int32_t(lead);
    if (p.source.row_vector > 0) p.source.row_vector = int32_t(vector);
  }
}

// Bands of whole sixteens of rows, or all of a map; and images side by side, so that few slots are
// left over.
inline bool place_rows(int64_t out_height, int64_t height, PlaneCorrelateParams& p) {
  const bool wide = p.source.row_vector == 0;
  const int64_t wanted = wide ? kWidePlaneBytes : kPlaneBytes;
  const auto rows = [&](int64_t band) {
    return std::min(height, band + int64_t(p.kernel_h - 1) * p.dilation_h);
  };
  const auto bytes = [&](int64_t band) { return 2 * rows(band) * p.pitch; };
  int64_t band = out_height;
  if (band > kMostBandRows || (band > 16 && bytes(band) > wanted)) {
    band = std::min(kMostBandRows, (out_height + 15) / 16 * 16);
    while (band > 16 && bytes(band) > wanted) band -= 16;
  }
  if (bytes(band) > (wide ? kMostWidePlaneBytes : kMostPlaneBytes)) return false;
  p.band_rows = int32_t(band);
  p.bands = int32_t(ceil_div(out_height, band));
  p.staged_rows = int32_t(rows(band));
  p.inverse_rows = int32_t(ceil_div(65536, band));
  p.images = 1;
  const int64_t most = std::min<int64_t>(
      {16, p.batch, std::max<int64_t>(1, int64_t(p.batch) * p.channels / kManyWarps)});
  const auto slots = [&](int64_t images) { return ceil_div(images * band, 16) * 16; };
  // As far as inverse_rows divides: the error of a slot is below its number times the band.
  const auto divides = [&](int64_t images) { return slots(images) * band < 65536; };
  for (int64_t images = 2; p.bands == 1 && images <= most; ++images)
    if (images * bytes(band) <= wanted && divides(images) &&
        slots(images) * p.images < slots(p.images) * images)
      p.images = int32_t(images);
  p.plane_bytes = int32_t(p.images * bytes(band));
  return true;
}

}  // namespace detail

// Tiles of a row that a warp has in registers.
inline int plane_tiles(const PlaneCorrelateParams& p) {
  if (p.source.row_vector > 0 && p.tiles > 4) return p.tiles == 7 ? 7 : 8;
  return p.tiles > 2 ? 4 : p.tiles;
}

// Forward and backward-input; fills what does not depend on weight and bias.
inline Plan plan_plane_correlate(const Correlation& call, PlaneCorrelateParams& p) {
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  describe(call, p);
  if (p.left < 0) return refuse(kCropped);
  p.source = access_of(call.source, call.batch, call.channels);
  p.result = access_of(call.result, call.batch, call.channels);
  const bool by_rows = p.source.row_vector > 0 && p.result.row_vector > 0;
  const bool wide = p.source.row_vector == 0 && p.result.row_vector == 0 &&
                    p.source.channel_vector == 8 && p.result.channel_vector == 8;
  if (!by_rows && !wide) return refuse(kNoPlanes);

  p.tiles = int32_t(ceil_div(call.result.width, 8));
  if (by_rows)
    detail::place_columns(p.source.row_vector, 1, p);
  else
    detail::place_columns(2, 2, p);
  const int64_t columns = std::max<int64_t>(8 * (p.tiles - 1) + 16 * p.chunks,
                                            p.lead + ceil_div(call.source.width, 2) * 2);
  p.pitch = int32_t(row_pitch(columns));
  if (!detail::place_rows(call.result.height, call.source.height, p)) return refuse(kPlaneTooLarge);
  if (by_rows && p.images * std::abs(call.result.stride_b) +
                         call.result.height * std::abs(call.result.stride_h) >=
                     int64_t(1) << 31)
    return refuse("the images of a step have more than 2^31 elements");

  p.taps_pitch = 8 * p.chunks + PlaneCorrelate::kTapsLead / 2;
  // Words of one copy of the taps and of the other should meet different banks.
  int64_t taps_copy = int64_t(p.taps_pitch) * p.kernel_h;
  while (taps_copy % 4 != 0 || taps_copy % 32 < 8 || taps_copy % 32 > 24) ++taps_copy;
  if (8 * taps_copy > kMostShared) return refuse(kTapsDoNotFit);
  p.taps_copy = int32_t(taps_copy);

  const int64_t in_registers = 8 * plane_tiles(p);
  p.result_pitch = int32_t(wide ? 8 * in_registers + 8 : row_pitch(in_registers));
  const int64_t results = 2 * PlaneCorrelate::kSlots * int64_t(p.result_pitch);
  // Of one image where several do not fit: no batch is refused that a smaller one would not be.
  const int32_t most = p.images, of_image = p.plane_bytes / p.images;
  for (const int32_t images : {most, 1}) {
    p.images = images;
    p.plane_bytes = images * of_image;
    p.warp_bytes = int32_t(p.plane_bytes + 8 * taps_copy + (wide ? 0 : results));
    p.steps = int32_t(ceil_div(call.batch, images) * p.bands);
    for (int warps = wide ? 8 : 4; warps > 0; warps /= 2) {
      LaunchShape shape;
      shape.threads = 32 * warps;
      shape.shared_bytes =
          2 * int64_t(p.pitch) + warps * int64_t(p.warp_bytes) + (wide ? results : 0);
      if (shape.shared_bytes > kMostShared) {
        if (wide) break;  // eight channels are a vector
        continue;
      }
      p.channel_groups = int32_t(ceil_div(call.channels, warps));
      const int64_t groups =
          std::clamp<int64_t>(ceil_div(detail::kManyWarps, p.channel_groups), 1, p.steps);
      p.steps_of_group = int32_t(ceil_div(p.steps, groups));
      shape.blocks = p.channel_groups * ceil_div(p.steps, p.steps_of_group);
      if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
      return {shape};
    }
  }
  return refuse(kPlaneTooLarge);
}

// Backward-weight; as plan_weight_gradient.
inline Plan plan_plane_weight_gradient(const ConvParams& call, int multiprocessors,
                                       PlaneWeightGradientParams& p) {
  using Kernel = PlaneWeightGradient;
  const auto refuse = [](const char* why) { return Plan{{}, why}; };
  if (const char* why = too_large(call)) return refuse(why);
  describe(call, p);
  if (p.kernel_h > Kernel::kMostRows || p.kernel_w > Kernel::kMostColumns)
    return refuse("the kernel has more than 15 rows or 8 columns");
  p.grad_output = access_of(call.output, call.batch, call.channels);
  p.input = access_of(call.input, call.batch, call.channels);
  const bool by_rows = p.input.row_vector > 0 && p.grad_output.row_vector > 0;
  const bool wide = p.input.row_vector == 0 && p.grad_output.row_vector == 0 &&
                    p.input.channel_vector == 8 && p.grad_output.channel_vector == 8;
  if (!by_rows && !wide) return refuse(kNoPlanes);
  p.bias_column = p.left / p.dilation_w;
  if (p.left < 0 || p.left % p.dilation_w != 0 || p.bias_column >= Kernel::kMostColumns)
    return refuse("no kernel column meets the first columns of both maps");

  p.chunks = int32_t(ceil_div(std::max(call.input.width, call.output.width), 16));
  const int64_t columns = 16 * int64_t(p.chunks);
  p.input_pitch = int32_t(row_pitch(columns));
  // The eighth kernel column reaches back farthest; a pair may lie in two words.
  p.grad_lead =
      int32_t(ceil_div(std::max(0, (Kernel::kMostColumns - 1) * p.dilation_w - p.left), 8) * 8);
  p.grad_pitch = int32_t(row_pitch(p.grad_lead + p.left + columns + 2));
  p.constant_elements = int32_t(columns);
  const int64_t height = call.input.height, out_height = call.output.height;
  const auto rows = [&](int64_t band) {
    return std::min(height, band + int64_t(p.kernel_h - 1) * p.dilation_h);
  };
  const auto bytes = [&](int64_t band) {
    return 2 * (rows(band) * p.input_pitch + band * p.grad_pitch);
  };
  const int64_t wanted = wide ? detail::kWidePlaneBytes : detail::kPlaneBytes;
  p.bands = 1;
  while (p.bands < out_height && bytes(ceil_div(out_height, p.bands)) > wanted) ++p.bands;
  p.band_rows = int32_t(ceil_div(out_height, p.bands));
  p.bands = int32_t(ceil_div(out_height, p.band_rows));
  if (bytes(p.band_rows) > kMostShared) return refuse(kPlaneTooLarge);
  p.staged_rows = int32_t(rows(p.band_rows));
  p.images = 1;
  if (p.bands == 1)
    p.images = int32_t(std::clamp<int64_t>(
        std::min(wanted / bytes(p.band_rows), int64_t(p.batch) * p.channels / detail::kManyWarps),
        1, p.batch));
  p.at_grad_bytes = int32_t(2 * p.images * p.staged_rows * int64_t(p.input_pitch));
  p.warp_bytes = int32_t(p.images * bytes(p.band_rows));
  p.steps = int32_t(ceil_div(call.batch, p.images) * p.bands);
  for (int warps = wide ? 8 : 4; warps > 0; warps /= 2) {
    LaunchShape shape;
    shape.threads = 32 * warps;
    shape.shared_bytes = 4 * int64_t(p.constant_elements) + warps * int64_t(p.warp_bytes);
    if (shape.shared_bytes > kMostShared) {
      if (wide) break;  // eight channels are a vector
      continue;
    }
    p.channel_groups = int32_t(ceil_div(call.channels, warps));
    const int64_t groups = std::clamp<int64_t>(
        ceil_div(int64_t(16) * multiprocessors, p.channel_groups * warps), 1, p.steps);
    p.steps_of_group = int32_t(ceil_div(p.steps, groups));
    p.groups = int32_t(ceil_div(p.steps, p.steps_of_group));
    shape.blocks = int64_t(p.channel_groups) * p.groups;
    if (shape.blocks > kMostBlocks) return refuse("more than 2^31 blocks");
    return {shape};
  }
  return refuse(kPlaneTooLarge);
}

}  // namespace lka::cuda
