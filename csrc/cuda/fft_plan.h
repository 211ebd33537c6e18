// What the launches of the Fourier transforms look like: pure functions, as those of
// depthwise_plan.h.
#pragma once

#include <cmath>

#include "depthwise_plan.h"
#include "device/fft_conv2d.cuh"

namespace lka::cuda {

// Two blocks of as many leave a thread 80 registers, and nothing spills.
constexpr int kMostFftThreads = 384;

// One dimension of a convolution: the taps that touch the map, and the least size of a transform.
// Reads of the map run from shift to out_size - 1 + last shift; a circular correlation of `least`
// elements keeps those beside the map apart from those on it (lka_kernels/fft_plan.py).
struct FftAxisPlan {
  Taps taps;  // none where no tap touches the map
  int64_t least = 0;
};

inline FftAxisPlan plan_fft_axis(int64_t size, int64_t out_size, int64_t taps, int64_t before,
                                 int64_t dilation) {
  FftAxisPlan plan{taps_that_touch(size, out_size, taps, before, dilation)};
  const int64_t shift = -plan.taps.before;
  if (plan.taps.count == 1 && (shift <= -out_size || shift >= size)) plan.taps = {0, 0, 0};
  const int64_t first = -plan.taps.before;
  const int64_t last = first + (std::max<int64_t>(plan.taps.count, 1) - 1) * dilation;
  plan.least = std::max({size + std::max<int64_t>(0, -first), out_size + std::max<int64_t>(0, last),
                         last - first + 1});
  return plan;
}

inline Divisor divisor_of(int64_t d) {
  return {uint32_t(d), uint32_t(((uint64_t(1) << 32) + uint64_t(d) - 1) / uint64_t(d))};
}

// The sizes of transforms: their factors, and of rows the strides and free positions in shared
// memory that made the fewest threads wait for each other when all steps were gone through.
struct FftSize {
  int32_t size, small, large, digits, pitch, free_of_first, free_of_last;
};
inline constexpr FftSize kFftSizes[] = {
    {8, 2, 4, 8, 21, 19, 4},      {16, 2, 8, 8, 19, 16, 17},      {24, 2, 12, 12, 27, 24, 25},
    {32, 2, 16, 24, 49, 47, 16},  {48, 4, 12, 12, 51, 48, 49},    {64, 4, 16, 20, 81, 79, 16},
    {96, 8, 12, 14, 113, 27, 12}, {128, 8, 16, 18, 145, 143, 16},
};

// The least that has at least `least` elements, or nullptr.
inline const FftSize* fft_size(int64_t least) {
  for (const FftSize& s : kFftSizes)
    if (s.size >= least) return &s;
  return nullptr;
}

inline FftAxis make_fft_axis(int32_t first, int32_t second) {
  FftAxis axis;
  axis.size = first * second;
  axis.first = first;
  axis.second = second;
  axis.by_first = divisor_of(first);
  axis.by_second = divisor_of(second);
  for (int n2 = 0; n2 < second; ++n2)
    for (int j = 0; j < 4; ++j) {
      const double angle = -2 * M_PI * n2 * (j + 1) / axis.size;
      axis.roots[n2][j] = {float(std::cos(angle)), float(std::sin(angle))};
    }
  return axis;
}

// That of columns has the large factor first. Made once: sines take longer than the rest of a plan.
inline const FftAxis& fft_axis(const FftSize& size, bool columns) {
  constexpr int kSizes = sizeof(kFftSizes) / sizeof(FftSize);
  struct Axes {
    FftAxis axes[kSizes][2];
    Axes() {
      for (int i = 0; i < kSizes; ++i) {
        axes[i][0] = make_fft_axis(kFftSizes[i].small, kFftSizes[i].large);
        axes[i][1] = make_fft_axis(kFftSizes[i].large, kFftSizes[i].small);
      }
    }
  };
  static const Axes made;
  return made.axes[&size - kFftSizes][columns];
}

inline FftRows fft_rows(const FftAxis& axis, int64_t height) {
  return {int32_t(height), divisor_of(ceil_div(height, 2 * axis.second) * axis.second)};
}

inline int64_t fft_shared_bytes(const FftGeometry& g, int64_t maps) {
  return (maps * g.plane_pitch << g.planes_shift) * int64_t(sizeof(Complex)) +
         (g.x.size / 2 + 1) * int64_t(sizeof(FftColumn)) +
         4 * g.x.second * int64_t(sizeof(Complex));
}

// Strides of planes, where 16 neighbouring threads are served together.
inline void lay_out(FftGeometry& g, int planes_shift, bool in_lanes) {
  g.planes_shift = planes_shift;
  g.planes_in_lanes = in_lanes && planes_shift > 0;
  int32_t plane = g.y.size / 2 * g.pitch;
  const int32_t apart = 16 >> std::min(planes_shift, 4);
  while (g.planes_in_lanes && plane % 16 != apart) ++plane;
  g.plane_pitch = plane;
}

// Sizes of the transforms and the taps where they want them.
inline const char* describe_fft(const ConvParams& call, FftParams& p, FftTaps& taps) {
  if (const char* why = too_large(call)) return why;
  if (call.storage == Storage::float64) return "it serves float32, bfloat16 and float16";
  if (call.stride_h != 1 || call.stride_w != 1) return "it serves stride 1";
  const FftAxisPlan y = plan_fft_axis(call.input.height, call.output.height, call.kernel_h,
                                      call.pad_top, call.dilation_h);
  const FftAxisPlan x = plan_fft_axis(call.input.width, call.output.width, call.kernel_w,
                                      call.pad_left, call.dilation_w);
  const FftSize *height = fft_size(y.least), *width = fft_size(x.least);
  if (height == nullptr || width == nullptr)
    return "a map with the padding that its taps reach has more than 128 rows or columns";
  FftGeometry& g = p.geometry;
  g.y = fft_axis(*height, true);
  g.x = fft_axis(*width, false);
  g.digits = width->digits;
  g.pitch = width->pitch;
  g.free_of_first = width->free_of_first;
  g.free_of_last = width->free_of_last;
  const int64_t size_y = g.y.size, size_x = g.x.size;
  g.by_half = divisor_of(size_x / 2);
  p.batch = int32_t(call.batch);
  p.channels = int32_t(call.channels);
  p.scale = 1.0f / float(4 * size_y * size_x);  // of two spectra, each twice what it should be
  taps.storage = call.storage;
  const auto axis = [](const Taps& t, int64_t full, int64_t dilation, int64_t size) {
    const int64_t shift = ((-t.before) % size + size) % size;
    return FftTapAxis{int32_t(t.first),  int32_t(t.count), int32_t(full),
                      int32_t(dilation), int32_t(shift),   int32_t(size)};
  };
  taps.y = axis(y.taps, call.kernel_h, call.dilation_h, size_y);
  taps.x = axis(x.taps, call.kernel_w, call.dilation_w, size_x);
  return nullptr;
}

constexpr const char* kSpectraDoNotFit =
    "the spectra of two planes do not fit the device's shared memory";

// The planes of a block, with `maps` spectra each: enough for 128 threads; and where channels are
// neighbours in memory, for 32 bytes of them, within what lets two blocks share a multiprocessor.
inline const char* group_planes(const MapView& map, Storage storage, int64_t maps,
                                int64_t most_shared, FftParams& p) {
  FftGeometry& g = p.geometry;
  const bool in_lanes = channels_in_lanes(map);
  const int64_t items = int64_t(g.x.size / 2 + 1) * g.y.second;
  int64_t wanted = in_lanes ? (storage == Storage::float32 ? 8 : 16) : ceil_div(128, items);
  p.planes_are_channels = in_lanes || p.batch < wanted;
  wanted = std::min<int64_t>(wanted, p.planes_are_channels ? p.channels : p.batch);
  int shift = 0;
  while (1 << shift < wanted) ++shift;
  for (; shift >= 0; --shift) {
    lay_out(g, shift, in_lanes);
    const int64_t bytes = fft_shared_bytes(g, maps);
    if (bytes <= (shift > 2 ? most_shared / 2 : most_shared)) break;
  }
  if (shift < 0) return kSpectraDoNotFit;
  p.channel_groups =
      int32_t(p.planes_are_channels ? ceil_div(p.channels, int64_t(1) << shift) : p.channels);
  return nullptr;
}

// Planes of kernels: as group_planes, but channels always.
inline void group_channels(FftParams& p) {
  FftGeometry& g = p.geometry;
  const int64_t items = int64_t(g.x.size / 2 + 1) * g.y.second;
  const int64_t wanted = std::min<int64_t>(ceil_div(128, items), p.channels);
  int shift = 0;
  while (1 << shift < wanted) ++shift;
  lay_out(g, shift, false);
  p.planes_are_channels = true;
  p.channel_groups = int32_t(ceil_div(p.channels, int64_t(1) << shift));
}

// Transforms of `second` · columns parts of columns are the longest step of a block.
inline Plan fft_launch(const FftParams& p, int64_t blocks, int64_t maps) {
  if (blocks > kMostBlocks) return {{}, "more than 2^31 blocks"};
  const FftGeometry& g = p.geometry;
  const int64_t items = int64_t(g.x.size / 2 + 1) * g.y.second << g.planes_shift;
  const int threads = int(std::clamp<int64_t>(items / 128 * 128, 128, kMostFftThreads));
  return {{blocks, threads, fft_shared_bytes(g, maps)}};
}

// Transforms of the taps; what does not depend on weight and spectra.
inline Plan plan_fft_spectra(const ConvParams& call, FftSpectraParams& p) {
  if (const char* why = describe_fft(call, p, p.taps)) return {{}, why};
  group_channels(p);
  p.rows = fft_rows(p.geometry.y, p.geometry.y.size);  // taps go around the end
  return fft_launch(p, p.channel_groups, 1);
}

// Forward and backward-input; what does not depend on spectra and bias.
inline Plan plan_fft_correlate(const ConvParams& call, bool backward, FftCorrelateParams& p) {
  FftTaps taps;
  if (const char* why = describe_fft(call, p, taps)) return {{}, why};
  p.source = backward ? call.output : call.input;
  p.result = backward ? call.input : call.output;
  p.conjugated = !backward;
  if (const char* why = group_planes(p.source, call.storage, 1, kMostShared, p)) return {{}, why};
  p.source_rows = fft_rows(p.geometry.y, p.source.height);
  p.result_rows = fft_rows(p.geometry.y, p.result.height);
  const int64_t image_groups = p.planes_are_channels
                                   ? call.batch
                                   : ceil_div(call.batch, int64_t(1) << p.geometry.planes_shift);
  return fft_launch(p, image_groups * p.channel_groups, 1);
}

// Weight gradients; what does not depend on partial sums. `multiprocessors` only decides how many
// groups sum apart, so results are the same from run to run on one device.
inline Plan plan_fft_weight_gradient(const ConvParams& call, int multiprocessors,
                                     int64_t most_shared, FftWeightGradientParams& p) {
  FftTaps taps;
  if (const char* why = describe_fft(call, p, taps)) return {{}, why};
  p.grad_output = call.output;
  p.input = call.input;
  if (const char* why = group_planes(p.input, call.storage, 2, most_shared, p)) return {{}, why};
  p.grad_rows = fft_rows(p.geometry.y, call.output.height);
  p.input_rows = fft_rows(p.geometry.y, call.input.height);
  const int64_t steps = p.planes_are_channels
                            ? call.batch
                            : ceil_div(call.batch, int64_t(1) << p.geometry.planes_shift);
  const Plan plan = fft_launch(p, 1, 2);
  // As many blocks as can be under way: more groups would make more partial sums, and a few blocks
  // that are left would keep the device waiting.
  const int64_t fit = std::min(most_shared / (plan.shape.shared_bytes + 1024),
                               int64_t(2 * kMostFftThreads / plan.shape.threads));
  const int64_t groups =
      std::clamp<int64_t>(multiprocessors * std::max<int64_t>(fit, 1) / p.channel_groups, 1, steps);
  p.steps = int32_t(steps);
  p.steps_of_group = int32_t(ceil_div(steps, groups));
  p.groups = int32_t(ceil_div(steps, p.steps_of_group));
  return fft_launch(p, int64_t(p.groups) * p.channel_groups, 2);
}

// From the sums of the groups of plan_fft_weight_gradient to the gradients.
inline Plan plan_fft_tap_gradient(const ConvParams& call, const FftWeightGradientParams& sums,
                                  FftTapGradientParams& p) {
  if (const char* why = describe_fft(call, p, p.taps)) return {{}, why};
  group_channels(p);
  p.rows = fft_rows(p.geometry.y, p.geometry.y.size);
  p.spectra = sums.spectra;
  p.bias_sums = sums.bias_sums;
  p.groups = sums.groups;
  return fft_launch(p, p.channel_groups, 1);
}

}  // namespace lka::cuda
