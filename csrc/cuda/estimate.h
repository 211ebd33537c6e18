// What launches of transforms and of the adapter have to do, as depthwise_estimate.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "adapter_plan.h"
#include "depthwise_estimate.h"
#include "fft_plan.h"

namespace lka::cuda {

namespace detail {

// A plane's transform of `size_y` × `size_x` real numbers: instructions of a lane for one of the
// size_y · (size_x / 2 + 1) complex numbers, forward or inverse, with its half of the product.
// 172 for both at 128² and 151 at 32², counted in the compiled passes; they grow by the number of
// factors.
inline double lane_instructions(const FftGeometry& g) {
  return 50 + 2.6 * std::log2(double(g.y.size) * g.x.size);
}
inline double numbers(const FftGeometry& g) { return double(g.x.size / 2 + 1) * g.y.size; }

// `transforms` of planes: instructions, and six accesses of shared memory for a number.
inline void add_transforms(Work& work, const FftGeometry& g, double transforms) {
  work.instructions += transforms * numbers(g) * lane_instructions(g) / 32;
  work.shared += transforms * numbers(g) * 6 * 8 * 1.25;  // bank conflicts, on an average
}

}  // namespace detail

inline Work work_of(const FftSpectraParams& p, const LaunchShape& shape, double element) {
  Work work;
  work.blocks = double(shape.blocks);
  detail::add_transforms(work, p.geometry, p.channels);
  work.memory = element * p.channels * p.taps.y.full * p.taps.x.full;
  detail::add_partials(work, 8 * p.channels * detail::numbers(p.geometry));
  return work;
}

// The spectra of the weights are read from the cache for every image.
inline Work work_of(const FftCorrelateParams& p, const LaunchShape& shape, double element) {
  Work work;
  work.blocks = double(shape.blocks);
  const double planes = double(p.batch) * p.channels;
  detail::add_transforms(work, p.geometry, 2 * planes);
  work.memory = element * (detail::elements(p.source, p.batch, p.channels) +
                           detail::elements(p.result, p.batch, p.channels));
  const double spectra = 8 * detail::numbers(p.geometry);
  work.cache = work.memory + planes * spectra;
  if (p.channels * spectra > detail::kStaysInCache) work.memory += planes * spectra;
  return work;
}

// Sums of spectra are read and written for every step but the first.
inline Work work_of(const FftWeightGradientParams& p, const LaunchShape& shape, double element) {
  Work work;
  work.blocks = double(shape.blocks);
  const double planes = double(p.batch) * p.channels;
  detail::add_transforms(work, p.geometry, 2 * planes);
  work.memory = element * (detail::elements(p.input, p.batch, p.channels) +
                           detail::elements(p.grad_output, p.batch, p.channels));
  const double spectra = 8 * detail::numbers(p.geometry) * p.channels;
  const double sums = (2.0 * p.steps - p.groups) * spectra;
  work.cache = work.memory + sums;
  work.instructions += 4 * double(p.steps) * spectra / 8 / 32;
  if (p.groups * spectra > detail::kStaysInCache) work.memory += sums;
  return work;
}

inline Work work_of(const FftTapGradientParams& p, const LaunchShape& shape, double element) {
  Work work;
  work.blocks = double(shape.blocks);
  detail::add_transforms(work, p.geometry, p.channels);
  const double sums = 8 * detail::numbers(p.geometry) * p.channels * p.groups;
  work.memory = element * p.channels * (p.taps.y.full * p.taps.x.full + 1.0);
  detail::add_partials(work, sums);
  work.instructions += sums / 8 / 32 * 6;
  return work;
}

namespace detail {

struct AdapterWork {
  const AdapterCall& call;
  double element, tokens, x, rank;  // bytes of an element; tokens; bytes of x, of a rank-r tensor
  double grid;                      // bytes of its grid

  explicit AdapterWork(const AdapterCall& c)
      : call(c),
        element(double(AdapterSizes(c.storage).element)),
        tokens(double(c.batch * c.tokens)),
        x(element * tokens * double(c.channels)),
        rank(element * tokens * double(c.rank)),
        grid(element * double(c.batch * c.height * c.width * c.rank)) {}

  // A product of every token's channels with the projection's weights, or of its gradient.
  void project(Work& work, const AdapterParams& p) const {
    const double products = tokens * double(call.channels) * p.rank_rows / 2048;
    if (call.storage == Storage::float32) {
      work.instructions += products * 2048 / 32 * 1.5;
    } else {
      work.products += products;
      work.instructions += products * 1.6;
    }
    work.shared += products * 2 * 256;
  }
  // `per_element` instructions of a lane for one element of x, beside the products'.
  void step(Work& work, double per_element) const {
    work.instructions += tokens * double(call.channels) * per_element / 32;
  }
  // Every block reads the weights of a projection.
  void weights(Work& work, double blocks) const {
    const double bytes = element * double(call.rank * call.channels);
    work.memory += bytes;
    work.cache += blocks * bytes;
  }
  // Kernels for narrow ranks, for each fragment: instructions and products, counted in the compiled
  // loops, and bytes of shared memory. Partial sums are written once.
  void narrow(Work& work, const AdapterLaunch& launch, double instructions, double products,
              double shared, bool sums) const {
    const double fragments = std::ceil(tokens / 16) * double(call.channels) / 32;
    const double bytes = sums ? 4.0 * launch.params.groups * call.channels * (call.rank + 1) : 0;
    work.blocks = double(launch.shape.blocks);
    work.instructions += fragments * instructions;
    work.products += fragments * products;
    work.shared += fragments * shared;
    (bytes <= kStaysInCache ? work.cache : work.memory) += bytes;
    weights(work, launch.params.groups);
  }
  // The convolution by multiply-adds, or the gradient of its taps.
  void convolve(Work& work) const {
    const auto taps = [&](int64_t size, int64_t kernel) {
      return double(
          taps_that_touch(size, size, kernel, call.dilation * (kernel - 1) / 2, call.dilation)
              .count);
    };
    const double of_rank =
        double(call.rank) * taps(call.height, call.kernel_h) * taps(call.width, call.kernel_w);
    work.instructions += tokens * of_rank * 1.7 / 32;
    work.memory += element * of_rank;
  }
};

// A launch between others of the adapter: what they leave for each other stays in the cache, if it
// is not too much.
template <class Launch>
void add_between(std::vector<Work>& all, const Launch& launch, double grid_bytes) {
  if (launch.shape.blocks == 0) return;
  Work work = work_of(launch.params, launch.shape);
  // The grids of two rank-r tensors; they are counted as the cache's too.
  if (2 * grid_bytes <= kStaysInCache) work.memory -= 2 * grid_bytes;
  all.push_back(work);
}

inline void add_correlation(std::vector<Work>& all, const AdapterCorrelation& plan,
                            double grid_bytes) {
  add_between(all, plan.rows, grid_bytes);
  add_between(all, plan.dense, grid_bytes);
  add_between(all, plan.planes, grid_bytes);
}

}  // namespace detail

// In the order of the launches; those without blocks are left out.
inline std::vector<Work> work_of(const AdapterCall& call, const AdapterForward& plan) {
  const detail::AdapterWork of(call);
  std::vector<Work> all;
  // Instructions of the general kernels as counted on an H100, of those for narrow ranks in their
  // machine code for 9.0.
  const bool narrow_down = plan.narrow_down.shape.blocks > 0;
  const AdapterLaunch& first = narrow_down ? plan.narrow_down : plan.down;
  Work down;
  down.blocks = double(first.shape.blocks);
  down.memory = of.x;
  down.cache = of.x + of.rank;
  if (first.params.before != Activation::none) down.cache += of.rank;
  of.weights(down, down.blocks * (narrow_down ? first.params.token_warps : 1));
  of.step(down, narrow_down ? 2.5 : 26);
  of.project(down, first.params);
  all.push_back(down);
  detail::add_correlation(all, plan.correlate, of.grid);
  const bool narrow_up = plan.narrow_up.shape.blocks > 0;
  const AdapterLaunch& last = narrow_up ? plan.narrow_up : plan.up;
  const AdapterParams& p = last.params;
  Work up;
  up.blocks = double(last.shape.blocks);
  up.memory = of.x * (call.residual.data == nullptr ? 1 : 2);
  const double halo =
      p.convolved ? 1 : double(p.convolution.staged_rows) / std::max<int32_t>(1, p.tiling.rows);
  up.cache = up.memory + of.rank * p.splits * (halo + 1);
  of.weights(up, up.blocks / p.splits);
  of.step(up, narrow_up ? 10 : 50);
  of.project(up, p);
  if (!p.convolved)
    for (int i = 0; i < p.splits; ++i) of.convolve(up);
  all.push_back(up);
  return all;
}

inline std::vector<Work> work_of(const AdapterCall& call, AdapterBackward& plan) {
  const detail::AdapterWork of(call);
  std::vector<Work> all;
  const double partial = 4.0 * double(call.channels) * double(call.rank + 1);
  double partials = 0;
  const auto gradient = [&](const AdapterLaunch& launch) {
    if (launch.shape.blocks == 0) return;
    Work work;
    work.blocks = double(launch.shape.blocks);
    work.memory = of.x;
    work.cache = of.x + of.rank * std::ceil(double(call.channels) / launch.params.block_c) +
                 launch.params.groups * partial;
    of.step(work, 2);
    of.project(work, launch.params);
    all.push_back(work);
  };
  const auto sums = [&](Work& work, const AdapterParams& p) {
    // A tile adds to the block's partial sums: read and written.
    const double bytes = p.groups * partial, times = 2.0 * p.tiles_of_group - 1;
    (bytes <= detail::kStaysInCache ? work.cache : work.memory) += times * bytes;
    of.project(work, p);
  };
  const double tiles = call.rank <= 8 ? 1 : 2;  // of 8 channels of the rank
  if (plan.narrow_up.shape.blocks > 0) {
    Work up;
    up.memory = of.x;
    up.cache = of.x + 2 * of.rank;
    of.narrow(up, plan.narrow_up, 115 + 25 * (tiles - 1), 6 + 2 * tiles, 1024 + 512 * tiles,
              call.need_up);
    if (call.need_up) partials += plan.of_up().groups * partial;
    all.push_back(up);
  }
  if (plan.up.shape.blocks > 0) {
    Work up;
    up.blocks = double(plan.up.shape.blocks);
    up.memory = of.x;
    up.cache = of.x + 2 * of.rank;
    of.weights(up, double(call.batch) * plan.up.params.tiling.tiles);
    of.step(up, 6);
    of.project(up, plan.up.params);
    if (call.need_up && plan.up_weight.shape.blocks == 0) sums(up, plan.up.params);
    if (call.need_up) partials += plan.of_up().groups * partial;
    all.push_back(up);
  }
  gradient(plan.up_weight);
  detail::add_correlation(all, plan.correlate, of.grid);
  if (plan.convolve.shape.blocks > 0) {
    Work convolve;
    convolve.blocks = double(plan.convolve.shape.blocks);
    convolve.cache = 4 * of.rank;
    if (!plan.convolve.params.convolved) of.convolve(convolve);
    if (call.need_conv && plan.taps.shape.blocks == 0 && plan.plane_taps.shape.blocks == 0)
      of.convolve(convolve);
    all.push_back(convolve);
  }
  detail::add_between(all, plan.plane_taps, of.grid);
  detail::add_between(all, plan.taps, of.grid);
  if (call.need_conv)
    partials += 4.0 * double(tap_groups(plan) * call.rank * (call.kernel_h * call.kernel_w + 1));
  // x, grad_x, and grad_output where x was its own residual.
  const double down_memory =
      of.x * (1 + (call.need_grad_x ? 1 : 0) + (call.need_grad_x && call.residual_is_x ? 1 : 0));
  if (plan.narrow_down.shape.blocks > 0) {
    Work down;
    down.memory = down_memory - (call.need_down ? 0 : of.x);
    down.cache = down.memory + of.rank * plan.narrow_down.params.splits;
    of.narrow(down, plan.narrow_down, 175 + 25 * (tiles - 1), 5 * tiles, 0, call.need_down);
    if (call.need_down) partials += plan.of_down().groups * partial;
    all.push_back(down);
  }
  if (plan.down.shape.blocks > 0) {
    Work down;
    down.blocks = double(plan.down.shape.blocks);
    down.memory = down_memory;
    if (plan.down_weight.shape.blocks > 0) down.memory -= of.x;  // x is read there
    down.cache = down.memory + of.rank;
    of.weights(down, double(call.batch) * plan.down.params.tiling.tiles);
    of.step(down, 14);
    of.project(down, plan.down.params);
    if (call.need_down && plan.down_weight.shape.blocks == 0) sums(down, plan.down.params);
    if (call.need_down) partials += plan.of_down().groups * partial;
    all.push_back(down);
  }
  gradient(plan.down_weight);
  Work last;
  last.blocks = std::ceil(double(call.channels * call.rank) / 16);
  last.memory = of.element * double(2 * call.channels * call.rank + call.channels +
                                    call.rank * (call.kernel_h * call.kernel_w + 2));
  detail::add_partials(last, partials);
  last.instructions = partials / 4 / 32 * 4;
  all.push_back(last);
  return all;
}

}  // namespace lka::cuda
