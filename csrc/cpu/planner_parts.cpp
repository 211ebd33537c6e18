#include "planner_parts.h"

#include <algorithm>
#include <numeric>

#include "sizes.h"

namespace lka::cpu {
namespace {

// Unpacked rows of the source, and the outputs in hand, should leave room in the second-level
// cache.
constexpr int64_t kBufferBytes = 128 * 1024;
// Blocks of channels that are unpacked together, so that memory is read in its order.
constexpr int64_t kBlocksTogether = 24;
// Taps of kernels that read maps where they stand with a stride: with more it was mostly slower,
// but for 7 in a row, which have tiles of their own.
constexpr int64_t kMostInPlaceTaps = 25;
// Bytes of a pixel from which columns of taps are taken as rows.
constexpr int64_t kLeastTurnedPixel = 256;
// Rows of one plane that a planar kernel has in hand: they should stay in the first-level cache.
constexpr int64_t kPlanarBufferBytes = 24 * 1024;

}  // namespace

double used_share(int64_t channels, int lanes) {
  return double(channels) / double(ceil_div(channels, lanes) * lanes);
}

int64_t arithmetic_bytes(Storage storage) { return storage == Storage::float64 ? 8 : 4; }

int64_t storage_bytes(Storage storage) {
  return storage == Storage::bfloat16 || storage == Storage::float16 ? 2
                                                                     : arithmetic_bytes(storage);
}

bool has_wide_vectors(Storage storage) {
  return kernels(storage).full.lanes * arithmetic_bytes(storage) == 64;
}

LanePlan channel_blocks(int64_t batch, int64_t channels, int lanes) {
  const int64_t blocks = ceil_div(channels, lanes);
  return {lanes, false, blocks, blocks * batch, blocks};
}

bool overlapping_blocks(Storage storage, int64_t batch, int64_t channels, LanePlan& plan,
                        const DepthwiseKernels*& chosen) {
  const DepthwiseKernels& full = kernels(storage).full;
  if (channels < full.lanes) return false;
  chosen = &full;
  plan = channel_blocks(batch, channels, full.lanes);
  plan.last_overlaps = true;
  return true;
}

LanePlan plan_lanes(const ConvParams& p, bool channels_adjacent, const DepthwiseKernels*& chosen) {
  const int64_t batch = p.batch, channels = p.channels;
  const DepthwiseKernels &full = kernels(p.storage).full, &half = kernels(p.storage).half;
  const int fewest = has_wide_vectors(p.storage) ? half.lanes / 2 : half.lanes;
  LanePlan plan;
  const double with_full = used_share(channels, full.lanes);
  const double with_half = used_share(channels, half.lanes);
  const bool use_half = with_full < 0.8 && with_half > with_full;
  chosen = use_half ? &half : &full;
  plan.cross_images = std::max(with_full, use_half ? with_half : 0.0) < 0.8 &&
                      !(channels_adjacent && (batch == 1 || channels >= fewest));
  if (plan.cross_images) {
    chosen = batch * channels <= half.lanes ? &half : &full;
    plan.lanes = chosen->lanes;
    plan.blocks_per_image = 0;
    plan.num_blocks = ceil_div(batch * channels, plan.lanes);
    plan.num_patterns =
        std::min(plan.num_blocks, channels / std::gcd(channels, int64_t(plan.lanes)));
  } else {
    plan = channel_blocks(batch, channels, chosen->lanes);
  }
  return plan;
}

int64_t choose_chunk(SourceBuffer& buffer, int64_t most_blocks, int64_t vector_bytes, int64_t span,
                     int64_t step, int64_t result_row, int64_t outputs, int64_t least) {
  least = std::min(least, outputs);
  const int64_t row = buffer.columns * vector_bytes;
  const int64_t rows = span + (least - 1) * step;
  const int64_t fit = (kBufferBytes - least * result_row) / (rows * row);
  const int64_t groups =
      ceil_div(most_blocks, std::max<int64_t>(1, std::min({fit, most_blocks, kBlocksTogether})));
  buffer.blocks = ceil_div(most_blocks, groups);
  const int64_t more = (kBufferBytes - least * result_row - rows * row * buffer.blocks) /
                       (step * row * buffer.blocks + result_row);
  return std::min(outputs, least + std::max<int64_t>(0, more));
}

bool unit_steps(const ConvParams& p) {
  return p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
}

bool small_square(int64_t taps_y, int64_t taps_x) {
  return (taps_y == 3 || taps_y == 5 || taps_y == 7) && taps_x == taps_y;
}

bool planar_serves(const ConvParams& p, int64_t taps_y, int64_t taps_x, const MapView& source,
                   const MapView& target) {
  const bool two_bytes = p.storage == Storage::bfloat16 || p.storage == Storage::float16;
  if (two_bytes && taps_y == 7) return false;
  const bool single = taps_y == 1 && taps_x == 1;
  // Rows that leave half of the lanes idle take longer than planes side by side in whole vectors.
  const bool narrow = target.width <= kernels(p.storage).planar_half.lanes;
  if (narrow &&
      (two_bytes || (has_wide_vectors(p.storage) && p.storage == Storage::float32 && !single)))
    return false;
  return unit_steps(p) && (single || small_square(taps_y, taps_x)) &&  //
         source.stride_w == 1 && target.stride_w == 1 &&               //
         target.height >= kFewestPlanarRows && target.width >= kFewestPlanarRows;
}

const DepthwiseKernels* planar_kernels(Storage storage, int64_t width) {
  const KernelSet& set = kernels(storage);
  return width <= set.planar_half.lanes ? &set.planar_half : &set.planar_full;
}

LanePlan one_plane_each(int64_t batch, int64_t channels) {
  return {1, false, channels, batch * channels, channels};
}

int64_t planar_chunk(SourceBuffer& buffer, int64_t columns, int lanes, int64_t bytes, int64_t rows,
                     int64_t more) {
  // A narrow row is written as one full vector: leave room for it at the end.
  buffer.columns = ceil_div(columns + lanes, lanes) * lanes;
  buffer.blocks = 1;
  const int64_t fit = kPlanarBufferBytes / (buffer.columns * bytes) - more;
  // Chunks are made equally high: two of them then have more rows than a tile.
  const int64_t chunk = std::min(rows, std::max(4 * kFewestPlanarRows, fit));
  buffer.rows = buffer.ring_rows = chunk + more;
  return chunk;
}

LanePlan plan_fft_lanes(const ConvParams& p, bool channels_adjacent,
                        const DepthwiseKernels*& chosen) {
  const KernelSet& set = kernels(p.storage);
  const LanePlan lanes = plan_lanes(p, channels_adjacent, chosen);
  chosen = lanes.lanes == set.fft_half.lanes ? &set.fft_half : &set.fft_full;
  return lanes;
}

bool in_place_serves(const ConvParams& p, const LanePlan& lanes) {
  const bool few = p.kernel_h * p.kernel_w <= kMostInPlaceTaps;
  const bool tiles_of_seven =
      p.kernel_h <= 7 && p.kernel_w == 7 && p.stride_w == 2 && p.dilation_w == 1 && p.pad_left == 3;
  return p.stride_h * p.stride_w > 1 && (few || tiles_of_seven) &&  //
         p.input.stride_c == 1 && p.output.stride_c == 1 && !lanes.cross_images;
}

bool column_of_taps(const ConvParams& p) {
  return p.kernel_w == 1 && p.kernel_h > 1 && p.input.stride_c == 1 && p.output.stride_c == 1 &&
         p.channels * storage_bytes(p.storage) >= kLeastTurnedPixel;
}

ConvParams turned(ConvParams p) {
  for (MapView* map : {&p.input, &p.output}) {
    std::swap(map->height, map->width);
    std::swap(map->stride_h, map->stride_w);
  }
  std::swap(p.kernel_h, p.kernel_w);
  std::swap(p.stride_h, p.stride_w);
  std::swap(p.dilation_h, p.dilation_w);
  std::swap(p.pad_top, p.pad_left);
  return p;
}

}  // namespace lka::cpu
