// What launches have to do, counted from their parameters, and how long an H100 takes for it: pure
// functions, plain C++. All of it is an estimate: instructions were counted by hand, as the source
// and the machine code for compute capability 9.0 have them. A GPU has been asked how much longer
// each form takes: tensor_core_form.h. tests/offline/cuda_estimates.py has a table of all benchmark
// shapes.
#pragma once

#include <algorithm>
#include <cmath>

#include "dense_plan.h"
#include "plane_plan.h"

namespace lka::cuda {

// Of one launch. Instructions and products are those of warps, padding and masked lanes included.
struct Work {
  double blocks = 0;
  double memory = 0;        // bytes that cross between the chip and its memory, each once
  double cache = 0;         // bytes between the second-level cache and the multiprocessors
  double shared = 0;        // bytes of shared memory or the first-level cache, 128 a wavefront
  double products = 0;      // m16n8k16
  double instructions = 0;  // of every kind
};

// Seconds that a launch would take for each of its counts alone: at least the longest of them, and
// at most, where nothing overlaps, their sum.
struct Times {
  double memory, cache, shared, products, instructions;

  double longest() const { return std::max({memory, cache, shared, products, instructions}); }
  double sum() const { return memory + cache + shared + products + instructions; }
  // For choosing between two kernels: some of it overlaps.
  double between() const { return (longest() + sum()) / 2; }
};

// An H100 (SXM) at 1.7 GHz: memory as a copy has it, the cache as it is usually measured, 128 bytes
// of shared memory and four instructions a clock and multiprocessor, and 5/8 of the published rate
// of products, which mma.sync reaches. Where blocks do not fill the last round of one for every
// multiprocessor, others idle meanwhile.
inline Times times_of(const Work& work) {
  constexpr double kMultiprocessors = 132, kClock = 1.7e9;
  const double idle =
      std::ceil(work.blocks / kMultiprocessors) * kMultiprocessors / std::max(1.0, work.blocks);
  const double clock = idle / (kMultiprocessors * kClock);
  return {work.memory / 3.0e12, work.cache / 5.5e12, work.shared / 128 * clock,
          work.products * 1.6 * clock, work.instructions / 4 * clock};
}

namespace detail {

// Partial sums up to this many bytes are taken to stay in the second-level cache, which also holds
// what streams by: a third of an H100's.
constexpr double kStaysInCache = double(50 << 20) / 3;

// Bytes that are written by one launch and read by another.
inline void add_partials(Work& work, double bytes) {
  (bytes <= kStaysInCache ? work.cache : work.memory) += bytes;
}

inline double elements(const MapView& map, double batch, double channels) {
  return batch * channels * double(map.height) * double(map.width);
}

// Instructions of a warp that copies rows × columns, and their bytes.
inline void add_copies(Work& work, double warps, double rows, double columns, double vector,
                       double times) {
  // A vector is an address, a test and a copy; without vectors it goes through a register.
  const double each = vector > 1 ? 12 : 14;
  work.instructions += times * warps * std::ceil(rows * columns / vector / 32) * each;
  work.shared += times * warps * rows * columns * 2;
}

}  // namespace detail

// Forward and backward-input for the tensor cores.
inline Work work_of(const CorrelateParams& p, const LaunchShape& shape) {
  using Kernel = ToeplitzCorrelate;
  Work work;
  work.blocks = double(shape.blocks);
  const MapView &source = p.source.view, &result = p.result.view;
  const double warps = shape.threads / 32.0, channels = p.channels;
  work.memory =
      2 * (detail::elements(source, p.batch, channels) +
           detail::elements(result, p.batch, channels) + channels * p.kernel_h * p.kernel_w);
  const int64_t slots = int64_t(p.strips) * p.batch;
  const double warp_sets = p.channel_groups * warps;  // idle ones of the last group included
  for (int64_t slot = 0; slot < slots; slot += Kernel::kSlots) {
    // As ToeplitzCorrelateBlock::find_steps.
    int64_t lowest = result.height, highest = -1;
    for (int64_t m = slot; m < std::min(slots, slot + Kernel::kSlots); ++m) {
      const int64_t strip = m / p.batch;
      const int64_t row =
          strip / p.dilation_h * p.dilation_h * Kernel::kRows + strip % p.dilation_h;
      if (row >= result.height) continue;
      lowest = std::min(lowest, row);
      highest = std::max(highest, row);
    }
    const int64_t first = std::max<int64_t>(0, ceil_div(p.top - highest, p.dilation_h));
    const int64_t end = std::min<int64_t>(p.kernel_h + Kernel::kRows - 1,
                                          ceil_div(source.height + p.top - lowest, p.dilation_h));
    const double steps = double(std::max<int64_t>(0, end - first));
    double rows = 0;  // (step, row of the strip) whose kernel row exists
    for (int r = 0; r < Kernel::kRows; ++r)
      rows += double(std::max<int64_t>(
          0, std::min<int64_t>(end, p.kernel_h + r) - std::max<int64_t>(first, r)));
    for (int tile = 0; tile < p.x_tiles; ++tile) {
      const int64_t x0 = int64_t(tile) * Kernel::kColumns;
      const int64_t live = std::min<int64_t>(Kernel::kTiles, ceil_div(result.width - x0, 8));
      const int64_t window = x0 - p.left, reach = 16 + 8 * (live - 1);
      int64_t chunks = 0;
      for (int64_t c = 0; c < p.chunks; ++c)
        chunks += window + 16 * c + reach > 0 && window + 16 * c < source.width;
      const double columns = double(8 * (live - 1) + 16 * p.chunks + 7);
      const double on_map =
          double(std::max<int64_t>(0, std::min<int64_t>(source.width, window + int64_t(columns)) -
                                          std::max<int64_t>(0, window)));
      detail::add_copies(work, warp_sets, Kernel::kSlots, columns,
                         std::max({1, p.source.row_vector, p.source.channel_vector}), steps);
      work.cache += 2 * steps * warp_sets * Kernel::kSlots * on_map;
      const double loads = chunks * (4 * steps + 2 * rows);
      work.shared += warp_sets * loads * 128;
      work.products += warp_sets * chunks * rows * double(live);
      // A barrier and the loop of a step, 6 more a chunk, 3 more a kernel row.
      work.instructions +=
          warp_sets * (steps * (30 + 6.0 * chunks) + loads + chunks * rows * (3 + double(live)));
      // 64 sums are rounded and stored in pairs; taps are staged twice by every block.
      work.instructions += warp_sets * (64 * 2.5 + 12.0 * p.kernel_h * p.taps_pitch * 4 / 32 + 150);
    }
  }
  work.cache += 2 * detail::elements(result, p.batch, channels);
  return work;
}

// Partial sums of weight gradients for the tensor cores.
inline Work work_of(const WeightGradientParams& p, const LaunchShape& shape) {
  using Kernel = WeightGradient;
  Work work;
  work.blocks = double(shape.blocks);
  const MapView &input = p.input.view, &grad = p.grad_output.view;
  const double warps = shape.threads / 32.0, batch = p.batch;
  work.memory =
      2 * (detail::elements(input, batch, p.channels) + detail::elements(grad, batch, p.channels));
  const double warp_sets = p.channel_groups * warps;
  for (int tile_h = 0; tile_h < p.tap_tiles_h; ++tile_h)
    for (int tile_w = 0; tile_w < p.tap_tiles_w; ++tile_w) {
      const int taps_h = std::min(p.kernel_h - tile_h * Kernel::kTapRows, Kernel::kTapRows);
      const int taps_w = std::min(p.kernel_w - tile_w * Kernel::kTapColumns, Kernel::kTapColumns);
      const double of_n = double(ceil_div(taps_w, 8));
      double rows_of_m = 0;  // (row, 16 kernel rows) that meet the map
      for (int64_t y = 0; y < grad.height; ++y)
        for (int m = 0; 16 * m < taps_h; ++m) {
          const int64_t at = y - p.top + (tile_h * Kernel::kTapRows + 16 * m) * p.dilation_h;
          rows_of_m += at + 15 * p.dilation_h >= 0 && at < input.height;
        }
      for (int column = 0; column < p.column_tiles; ++column) {
        const int64_t width =
            std::min<int64_t>(Kernel::kColumns, input.width - column * Kernel::kColumns);
        const double chunks = double(ceil_div(width, 16));
        const double images = p.image_groups, of_step = batch / images;
        const double steps = images * p.strips;
        const double input_rows = of_step * p.input_rows;
        const double grad_rows = of_step * double(grad.height) / p.strips;
        const double grad_columns = 16 * chunks + (taps_w - 1) * p.dilation_w + 7;
        detail::add_copies(work, warp_sets, input_rows, 16 * chunks,
                           std::max({1, p.input.row_vector, p.input.channel_vector}), steps);
        detail::add_copies(work, warp_sets, grad_rows, grad_columns,
                           std::max({1, p.grad_output.row_vector, p.grad_output.channel_vector}),
                           steps);
        work.cache += 2 * warp_sets * steps *
                      (input_rows * double(width) + grad_rows * double(width + taps_w));
        // The second copy: two loads and a store of a word.
        const double words = steps * grad_rows * std::ceil(grad_columns / 2 / 32);
        work.instructions += warp_sets * (words * 9 + steps * 120);
        work.shared += warp_sets * words * 3 * 128;
        const double rows = batch * double(grad.height) * chunks, products = batch * rows_of_m;
        work.shared += warp_sets * (rows * of_n * 2 * 128 + products * chunks * 512);
        work.products += warp_sets * products * chunks * of_n;
        work.instructions += warp_sets * (rows * (8 + 3 * of_n) + products * chunks * (5 + of_n));
        if (tile_h == 0 && tile_w == 0 && column == 0)  // the bias's gradient
          work.instructions +=
              warp_sets * batch * double(grad.height) * double(ceil_div(grad.width, 32)) * 8;
      }
    }
  detail::add_partials(work, 4.0 * p.groups * p.channels * (p.full_h * p.full_w + 1));
  return work;
}

namespace detail {

// Planes of `images` images in shared memory, by the warps of a channel.
inline void add_planes(Work& work, const PlaneAccess& map, double images) {
  const double passes = std::ceil(map.positions / (32.0 * map.vector));
  work.instructions += passes * (images * (map.vector > 1 ? 7 : 9) + 40);
  work.shared += 2 * images * map.positions;
}

}  // namespace detail

// Forward and backward-input in the dense form.
inline Work work_of(const DenseCorrelateParams& p, const LaunchShape& shape) {
  Work work;
  work.blocks = double(shape.blocks);
  work.cache = 2 * (detail::elements(p.source.view, p.batch, p.channels) +
                    detail::elements(p.result, p.batch, p.channels));
  work.memory = work.cache + 2.0 * p.channels * p.kernel_h * p.kernel_w;
  const int images = 16 * p.row_tiles;
  Work channel;  // of one block
  detail::add_planes(channel, p.source, images);
  // An entry of the table is two divisions or tests, a load and two stores.
  const double entries = p.table_rows * std::ceil(p.table_pitch / 32.0);
  channel.instructions += entries * 28 + p.warps_of_channel * 150;
  channel.shared += entries * 2 * 128;
  const double tiles = double(ceil_div(p.result.height * p.result.width, 8));
  const double groups = std::ceil(tiles * p.row_tiles / DenseCorrelate::kTiles);  // of tiles
  const double steps = p.source.positions / 16.0;
  channel.products = steps * tiles * p.row_tiles;
  channel.shared += steps * (groups * (p.row_tiles * 512 + 2 * 128) + tiles * 2 * 128);
  channel.instructions += steps * (groups * (p.row_tiles + 10) + tiles * (6 + p.row_tiles));
  channel.instructions += tiles * (50 + 2 * p.row_tiles * (p.pairs ? 8 : 11)) + groups * 40;
  const double times = p.channels * double(ceil_div(p.batch, images));
  work.shared += times * channel.shared;
  work.products += times * channel.products;
  work.instructions += times * channel.instructions;
  return work;
}

// Partial sums of weight gradients in the dense form.
inline Work work_of(const DenseWeightGradientParams& p, const LaunchShape& shape) {
  Work work;
  work.blocks = double(shape.blocks);
  const MapView &grad = p.grad_output.view, &input = p.input.view;
  const double grads = 2 * detail::elements(grad, p.batch, p.channels);
  const double inputs = 2 * detail::elements(input, p.batch, p.channels);
  work.memory = grads + inputs;
  work.cache = grads * p.input_parts + inputs * p.grad_parts;
  Work step;  // of a channel and a part of each map
  detail::add_planes(step, p.grad_output, p.images);
  detail::add_planes(step, p.input, p.images);
  const double warps = p.warps_of_channel, tiles = p.input.positions / 8.0;
  const double products = warps * p.images / 16.0;
  step.products = products * tiles;
  step.shared += products * (1 + tiles / 2) * 512 + warps * p.images * 64;
  step.instructions += products * (8 + tiles * 2.5) + warps * (p.images * 4 + 80);
  const double parts = double(p.grad_parts) * p.input_parts;
  const double steps = parts * p.steps * p.channels;
  work.shared += steps * step.shared;
  work.products += steps * step.products;
  work.instructions += steps * step.instructions;
  // At the end of a group all products are stored, and those of each tap loaded and added; lanes
  // of a warp have diagonals of unequal length.
  const auto pairs = [](int64_t size, int64_t out_size, int64_t taps, int64_t before,
                        int64_t dilation) {
    double met = 0;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t shift = k * dilation - before;
      met += double(
          std::max<int64_t>(0, std::min(out_size, size - shift) - std::max<int64_t>(0, -shift)));
    }
    return met;
  };
  const double met = pairs(input.height, grad.height, p.kernel_h, p.top, p.dilation_h) *
                     pairs(input.width, grad.width, p.kernel_w, p.left, p.dilation_w);
  const double rounds = std::ceil(warps / p.product_tiles);
  const double taps = std::ceil(double(p.kernel_h) * p.kernel_w / 32);
  const double ends = double(p.groups) * p.channels;  // a group is one of parts already
  const double loads = 2 * met / parts / 32;
  work.instructions += ends * (warps * tiles * 4 * 2 + loads * 5 + rounds * taps * 80 + 200);
  work.shared += ends * (warps * tiles * 4 + loads) * 128;
  detail::add_partials(work, 4.0 * p.groups * p.channels * (p.full_h * p.full_w + 1));
  return work;
}

namespace detail {

// Instructions of a warp that stages rows of a plane; of a block of eight, its share.
inline double staging(const MapAccess& map, double rows) {
  if (map.row_vector == 0) return rows * double(map.view.width) / 2 / 32 * 24 / 8;
  const double vectors = std::ceil(double(map.view.width) / map.row_vector);
  return std::ceil(rows * vectors / 32) * 9;
}

}  // namespace detail

// With planes in shared memory.
inline Work work_of(const PlaneCorrelateParams& p, const LaunchShape& shape) {
  Work work;
  work.blocks = double(shape.blocks);
  const double input = 2 * detail::elements(p.source.view, p.batch, p.channels);
  const double output = 2 * detail::elements(p.result.view, p.batch, p.channels);
  work.memory = input + output + 2.0 * p.channels * p.kernel_h * p.kernel_w;
  const double halo = double(p.staged_rows) * p.bands / double(p.source.view.height);
  work.cache = input * halo + output;
  const double steps = double(p.steps) * p.channels;
  const double strips = double(ceil_div(p.images * int64_t(p.band_rows), PlaneCorrelate::kSlots));
  const double rows = strips * p.kernel_h;  // of the kernel, met by a strip
  work.products = steps * rows * p.chunks * p.tiles;
  const bool wide = p.source.row_vector == 0;
  const double vectors =
      wide ? double(p.result.view.width) / 8
           : std::ceil(double(p.result.view.width) / std::max(1, p.result.row_vector));
  work.instructions =
      work.products * 3 +
      steps * (detail::staging(p.source, p.images * double(p.staged_rows)) +
               rows * (10 + 4.0 * p.chunks) +
               strips * (120 + p.tiles * (wide ? 40 : 16) + vectors * 16 / 32 * 12));
  work.instructions +=
      double(shape.blocks) * shape.threads / 32 * p.kernel_h * 2 * p.taps_pitch / 32 * 20;
  work.shared = work.products * 512 + steps * (rows * p.chunks * 256 + strips * p.tiles * 512) +
                2 * input * halo;
  return work;
}

inline Work work_of(const PlaneWeightGradientParams& p, const LaunchShape& shape) {
  Work work;
  work.blocks = double(shape.blocks);
  const double input = 2 * detail::elements(p.input.view, p.batch, p.channels);
  const double grad = 2 * detail::elements(p.grad_output.view, p.batch, p.channels);
  work.memory = input + grad;
  const double halo = double(p.staged_rows) * p.bands / double(p.input.view.height);
  work.cache = input * halo + grad;
  const double rows = double(p.batch) * p.channels * double(p.grad_output.view.height);
  work.products = rows * p.chunks;
  const double steps = double(p.steps) * p.channels;
  work.instructions = work.products * 9 + rows * 10 +
                      steps * (detail::staging(p.input, p.images * double(p.staged_rows)) +
                               detail::staging(p.grad_output, p.images * double(p.band_rows)) + 60);
  work.shared = work.products * (512 + 4 * 128) + 2 * (input * halo + grad);
  detail::add_partials(work, 4.0 * p.groups * p.channels * (p.full_h * p.full_w + 1));
  return work;
}

// Forward and backward-input in float32.
inline Work work_of(const FloatCorrelateParams& p, const LaunchShape& shape) {
  using Kernel = FloatCorrelate;
  Work work;
  work.blocks = double(shape.blocks);
  const double warps = double(p.threads) / 32;
  work.memory = 4 * (detail::elements(p.source, p.batch, p.channels) +
                     detail::elements(p.result, p.batch, p.channels) +
                     double(p.channels) * p.kernel_h * p.kernel_w);
  double rows = 0, taps_rows = 0;  // of all strips: rows of the source, and kernel rows they meet
  for (int strip = 0; strip < p.strips; ++strip) {
    const int64_t y0 =
        strip / p.dilation_h * p.dilation_h * int64_t(Kernel::kRows) + strip % p.dilation_h;
    for (int s = 0; s < p.kernel_h + Kernel::kRows - 1; ++s) {
      const int64_t y = y0 - p.top + int64_t(s) * p.dilation_h;
      if (y < 0 || y >= p.source.height) continue;
      ++rows;
      for (int r = 0; r < Kernel::kRows; ++r) taps_rows += s - r >= 0 && s - r < p.kernel_h;
    }
  }
  rows /= p.strips;
  taps_rows /= p.strips;
  // Eight multiply-adds, a load of the tap and its test; a load of the map with its bounds.
  work.instructions =
      warps * (200 + rows * (60 + p.kernel_w * 7.0) + taps_rows * p.kernel_w * 10.5);
  const double loads = rows * (Kernel::kColumns + p.kernel_w);
  // In contiguous maps lanes are eight columns apart: a load takes up to eight lines.
  const double lines = p.channels_in_lanes ? 1 : double(p.source.width) / p.columns;
  work.shared = warps * 128 * (loads * lines + taps_rows * p.kernel_w);
  work.cache = 4 * (detail::elements(p.result, p.batch, p.channels) +
                    warps * 32 * rows * (Kernel::kColumns + p.kernel_w) / 4);
  return work;
}

// Partial sums of weight gradients in float32.
inline Work work_of(const FloatWeightGradientParams& p, const LaunchShape& shape) {
  using Kernel = FloatWeightGradient;
  Work work;
  work.blocks = double(shape.blocks);
  const double tiles = double(p.tap_tiles_h) * p.tap_tiles_w;
  const double warps = double(p.channels) * tiles * double(p.units) / 32;  // of segments
  work.memory = 4 * (detail::elements(p.input, p.batch, p.channels) +
                     detail::elements(p.grad_output, p.batch, p.channels));
  // 17 multiply-adds of a column, three loads with bounds.
  work.instructions = warps * (16 * 9 + Kernel::kSegment * (17 + 3 * 6.0) + 60);
  // Lanes are a segment apart: in contiguous maps so many of them share a line of 32 elements.
  const double lines = p.input.stride_w == 1 ? double(p.input.width) / p.segments : 32;
  work.shared = warps * 128 * (16 + 3.0 * Kernel::kSegment) * lines;
  work.cache = tiles * work.memory;
  detail::add_partials(work, 4.0 * p.groups * p.channels * (p.full_h * p.full_w + 1));
  return work;
}

// The sum of partial sums: what they are was counted where they are written.
template <class Params>
Work work_of_sum(const Params& p, double element) {
  Work work;
  const double gradients = double(p.channels) * (p.full_h * p.full_w + 1);
  work.blocks = double(plan_sum_partials(p).blocks);
  work.memory = element * gradients;
  detail::add_partials(work, 4 * p.groups * gradients);
  work.instructions = gradients / 32 * (60 + 4.0 * p.groups);
  return work;
}

}  // namespace lka::cuda
