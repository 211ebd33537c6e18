#include <algorithm>

#include "fft_planner.h"
#include "planner_parts.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

// Weight gradients are computed in about this many tasks, groups of channels times parts of the
// rows: a constant, so that the bits of the result do not depend on the number of threads.
constexpr int64_t kWeightGradientTasks = 16;
// A part of the batch has at least this many positions: its partial sums are added up at the end.
constexpr int64_t kPositionsPerPart = 384;
// Blocks of channels that are taken together where maps are read where they stand: a pixel is read
// in long runs.
constexpr int64_t kInPlaceBlocks = 12;
// Columns of taps in place: seven kernel rows are summed together, and twice as many in turn on
// images of so many rows or more. There, with this many taps or more, parts begin with a multiple
// of kGradRows rows: on lower images too many are left over, and of fewer taps little is shared.
constexpr int64_t kColumnTaps = 7, kFewestRowsOfParts = 28, kFewestTapsOfParts = 4;
// Sums of the channels that planar kernels take together.
constexpr int64_t kPlanarSumsBytes = 16 * 1024;

// Whether the elements of a plane follow each other.
bool without_gaps(const MapView& map) {
  return map.stride_w == 1 && (map.height == 1 || map.stride_h == map.width);
}

// Whether the flat kernel serves the weight gradient with this many taps (clipped).
bool flat_serves(const ConvParams& p, int64_t taps_y, int64_t taps_x) {
  const MapView &input = p.input, &grad = p.output;
  if (kernels(p.storage).flat.weight_gradient == nullptr || !small_square(taps_y, taps_x) ||
      p.dilation_h != 1 || p.dilation_w != 1 || input.stride_w != 1 || !without_gaps(grad))
    return false;
  if (unit_steps(p))
    return input.width == grad.width && without_gaps(input) &&
           grad.height * grad.width <= kMostFlatPositions;
  return input.width <= kMostSpreadColumns && grad.width <= kMostSpreadColumns;
}

// Weight gradients where a task takes some channels of some images.
void divide_planes(PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  plan.lanes = one_plane_each(plan.batch, plan.channels);
  plan.num_groups = std::min(plan.channels, kWeightGradientTasks);
  plan.num_parts = std::min(plan.batch, ceil_div(kWeightGradientTasks, plan.num_groups));
  planned.num_tasks = plan.num_groups * plan.num_parts;
  planned.partial_elements = plan.channels * plan.num_parts * (plan.kernel_h * plan.kernel_w + 1);
}

void plan_flat(PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  planned.kernels = &kernels(plan.storage).flat;
  divide_planes(planned);
  plan.scratch_elements = 0;
  const int64_t vectors =
      ceil_div(plan.grad_output.height * plan.grad_output.width, planned.kernels->lanes);
  planned.multiply_adds_per_task = double(plan.batch * plan.channels) / double(planned.num_tasks) *
                                   double(vectors) *
                                   double((plan.y.count + 2) * (plan.x.count + 2));
}

// Weight gradients of few taps read both maps where they stand without a stride, too, with the 32
// registers of vectors of 64 bytes, if channels fill one.
bool in_place_serves_unit_steps(const ConvParams& p, int64_t taps_y, int64_t taps_x) {
  const int64_t column = p.output.height >= kFewestRowsOfParts ? 2 * kColumnTaps : kColumnTaps;
  const bool few_rows = taps_x == 3 ? taps_y == 3 : taps_x == 1 ? taps_y <= column : taps_y <= 4;
  return has_wide_vectors(p.storage) && unit_steps(p) && few_rows && p.input.stride_c == 1 &&
         p.output.stride_c == 1 && p.channels >= kernels(p.storage).full.lanes;
}

void plan_in_place(PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  plan.in_place = true;
  overlapping_blocks(plan.storage, plan.batch, plan.channels, plan.lanes, planned.kernels);
  const int64_t blocks = plan.lanes.blocks_per_image, rows = plan.batch * plan.grad_output.height;
  const auto unit_step = [](const Phase& f) { return f.out_step == 1 && f.tap_step == 1; };
  if (plan.x.count == 1 && plan.y.count >= kFewestTapsOfParts && unit_step(plan.y) &&
      unit_step(plan.x) && plan.grad_output.height >= kFewestRowsOfParts)
    plan.part_rows = kGradRows;
  const int64_t units = plan.batch * ceil_div(plan.grad_output.height, plan.part_rows);
  plan.num_groups = std::min(ceil_div(blocks, kInPlaceBlocks), kWeightGradientTasks);
  plan.num_parts = std::min(units, ceil_div(kWeightGradientTasks, plan.num_groups));
  // Of few parts there are more groups, of two blocks, or one where their number is odd.
  plan.num_groups = std::max(plan.num_groups,
                             std::min(ceil_div(blocks, 2), kWeightGradientTasks / plan.num_parts));
  planned.num_tasks = plan.num_groups * plan.num_parts;
  const int64_t taps = plan.kernel_h * plan.kernel_w;
  planned.partial_elements = blocks * plan.num_parts * (taps + 1) * plan.lanes.lanes;
  plan.scratch_elements = 0;
  planned.multiply_adds_per_task = double(rows * plan.grad_output.width) * double(taps + 1) *
                                   double(blocks) / double(planned.num_tasks);
}

void plan_planar(PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  const int64_t bytes = arithmetic_bytes(plan.storage);
  const int64_t taps = plan.y.count, height = plan.grad_output.height;
  planned.kernels = planar_kernels(plan.storage, plan.grad_output.width);
  const int lanes = planned.kernels->lanes;
  divide_planes(planned);
  const int64_t vectors = ceil_div(plan.grad_output.width, lanes);
  plan.chunk =
      planar_chunk(plan.buffer, vectors * lanes + taps - 1, lanes, bytes, height, 2 * (taps - 1));
  const int64_t sums = (taps * taps + 1) * lanes;  // of one channel
  plan.channels_together = std::max<int64_t>(1, kPlanarSumsBytes / (sums * bytes));
  plan.scratch_elements = plan.buffer.rows * plan.buffer.columns + plan.channels_together * sums;
  planned.multiply_adds_per_task = double(plan.batch * plan.channels) / double(planned.num_tasks) *
                                   double(height * vectors) * double(taps * taps + 4);
}

// Plans transforms, if they serve and cost less than direct sums or are asked for.
bool plan_fft_if_better(const ConvParams& p, PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  if (p.form == Form::direct || p.stride_h != 1 || p.stride_w != 1) return false;
  // The convolution whose weight this is: its taps are the outputs here.
  const auto of_convolution = [](const Phase& axis) {
    return Phase{0, 1, axis.taps, axis.count, axis.origin, 1, axis.out_step, 0, 1};
  };
  const Phase y = of_convolution(plan.y), x = of_convolution(plan.x);
  if (!plan_fft(y, x, p.input.height, p.input.width, plan.fft)) return false;
  const FftConv& fft = plan.fft;
  const DepthwiseKernels* chosen;
  const LanePlan lanes = plan_fft_lanes(p, p.input.stride_c == 1 && p.output.stride_c == 1, chosen);
  const int64_t blocks = lanes.cross_images ? lanes.num_blocks : lanes.blocks_per_image;
  const int64_t parts =
      lanes.cross_images ? 1 : std::min(p.batch, ceil_div(kWeightGradientTasks, blocks));
  const double images = lanes.cross_images ? 1.0 : double(p.batch) / double(parts);
  const int64_t rows = p.input.height + p.output.height;
  const double plane = fft_cost(fft, rows, true) + fft_cost(fft, y.taps, false) / images;
  const double direct = direct_cost(plan.y, plan.x, p.input.height, p.input.width);
  if (p.form != Form::fft && plane >= direct) return false;
  planned.kernels = chosen;
  planned.kernel_name = "fft";
  plan.lanes = lanes;
  add_twiddles(plan.fft, p.storage);
  plan.num_parts = parts;
  plan.num_groups = blocks;
  const int64_t v = lanes.lanes, line = fft.line_elements(v);
  const int64_t width = std::max(p.input.width, p.output.width);
  plan.scratch_elements =
      (fft.y.size + p.input.height + std::max(p.output.height, y.taps)) * fft.spectrum_row(v) +
      3 * line + std::max(line, (fft.rows_together + 1) * width * v);
  planned.num_tasks = blocks * parts;
  planned.partial_elements = blocks * parts * (p.kernel_h * p.kernel_w + 1) * v;
  planned.multiply_adds_per_task = plane * images;
  return true;
}

}  // namespace

PlannedWeightGradient plan_backward_weight(const ConvParams& p) {
  if (p.kernel_h > kColumnTaps && column_of_taps(p) &&
      !in_place_serves_unit_steps(p, p.kernel_h, p.kernel_w))
    return plan_backward_weight(turned(p));
  PlannedWeightGradient planned;
  WeightGradientPlan& plan = planned.plan;
  plan.storage = p.storage;
  plan.batch = p.batch;
  plan.channels = p.channels;
  plan.kernel_h = p.kernel_h;
  plan.kernel_w = p.kernel_w;
  plan.input = p.input;
  plan.grad_output = p.output;
  // Outputs are the kernel elements that forward keeps; taps are the positions of grad_output.
  const auto axis = [](const Phase& f, int64_t output, int64_t stride, int64_t dilation) {
    return Phase{f.first_kernel_index, 1, f.taps, output, f.origin, dilation, stride, 0, 1};
  };
  plan.y = axis(forward_phases(p.input.height, p.output.height, p.kernel_h, p.stride_h,
                               p.dilation_h, p.pad_top)[0],
                p.output.height, p.stride_h, p.dilation_h);
  plan.x = axis(forward_phases(p.input.width, p.output.width, p.kernel_w, p.stride_w, p.dilation_w,
                               p.pad_left)[0],
                p.output.width, p.stride_w, p.dilation_w);
  if (plan_fft_if_better(p, planned)) return planned;
  if (flat_serves(p, plan.y.count, plan.x.count)) {
    plan_flat(planned);
    planned.kernel_name = "flat";
    return planned;
  }
  // Of one tap there is no planar weight gradient.
  if (plan.y.count > 1 && planar_serves(p, plan.y.count, plan.x.count, p.input, p.output)) {
    plan_planar(planned);
    planned.kernel_name = "planar";
    return planned;
  }

  planned.kernel_name = "blocks";
  plan.lanes = plan_lanes(p, p.input.stride_c == 1 && p.output.stride_c == 1, planned.kernels);

  // Fewer channels than half a vector has lanes are better unpacked once than read for every tap.
  const bool few_channels = p.channels < kernels(p.storage).half.lanes;
  if (plan.x.count > 0 && plan.x.count <= 3 && plan.y.count > 0 &&
      ((in_place_serves(p, plan.lanes) && !few_channels) ||
       in_place_serves_unit_steps(p, plan.y.count, plan.x.count))) {
    plan_in_place(planned);
    planned.kernel_name = "in_place";
    return planned;
  }

  plan.buffer.columns = std::max<int64_t>(
      1, (plan.x.count - 1) * plan.x.out_step + (plan.x.taps - 1) * plan.x.tap_step + 1);

  const int64_t positions = p.output.height * p.output.width;
  const int64_t blocks =
      plan.lanes.cross_images ? plan.lanes.num_blocks : plan.lanes.blocks_per_image;
  plan.num_parts = plan.lanes.cross_images
                       ? 1
                       : std::min({p.batch * p.output.height, kWeightGradientTasks,
                                   std::max<int64_t>(1, p.batch * positions / kPositionsPerPart)});
  const int64_t span = std::max<int64_t>(1, (plan.y.count - 1) * plan.y.out_step + 1);
  const int64_t step = plan.y.tap_step;
  const bool together = p.input.stride_c == 1 && p.output.stride_c == 1 && !plan.lanes.cross_images;
  // Every part unpacks what its first rows read before them: of planes, which have no neighbours to
  // be read with, rather more groups.
  if (!together)
    plan.num_parts =
        std::min(plan.num_parts, std::max<int64_t>(1, p.batch * p.output.height * step / span));
  plan.num_groups = std::min(blocks, ceil_div(kWeightGradientTasks, plan.num_parts));

  const int64_t bytes = plan.lanes.lanes * arithmetic_bytes(p.storage);
  plan.chunk = choose_chunk(plan.buffer, together ? ceil_div(blocks, plan.num_groups) : 1, bytes,
                            span, step, together ? 0 : p.output.width * bytes, p.output.height,
                            ceil_div(kTransposedPositions, p.output.width));
  plan.buffer.ring_rows = span + (plan.chunk - 1) * step;
  plan.buffer.rows = span + (p.output.height - 1) * step;
  planned.num_tasks = plan.num_groups * plan.num_parts;
  planned.partial_elements =
      blocks * plan.num_parts * (p.kernel_h * p.kernel_w + 1) * plan.lanes.lanes;
  plan.scratch_elements = plan.buffer.elements(plan.lanes.lanes, arithmetic_bytes(p.storage)) +
                          plan.chunk * p.output.width * plan.lanes.lanes;
  const double images = plan.lanes.cross_images ? 1.0 : double(p.batch) / double(plan.num_parts);
  planned.multiply_adds_per_task = images * double(positions) *
                                   double(plan.y.count * plan.x.count + 8) * double(blocks) /
                                   double(plan.num_groups);
  return planned;
}

bool plan_shared_spectra(const PlannedConvolution& input, const PlannedWeightGradient& weight,
                         int num_threads, SharedSpectra& shared) {
  const ConvolvePlan& convolution = input.plan;
  const WeightGradientPlan& plan = weight.plan;
  const FftConv& fft = plan.fft;
  // The same kernels have the same lanes. The sizes agree wherever both are planned: clipped, the
  // two phases meet the same pairs of elements.
  if (input.kernels != weight.kernels || weight.kernels->both_gradients == nullptr ||
      convolution.lanes.cross_images != plan.lanes.cross_images ||
      convolution.kernel_h != plan.kernel_h ||  // one is turned
      convolution.fft.y.size != fft.y.size || convolution.fft.x.size != fft.x.size)
    return false;
  const bool cross_images = plan.lanes.cross_images;
  const int64_t images = cross_images ? 1 : ceil_div(plan.batch, plan.num_parts);
  // A task takes half as long again as for the weight's gradient alone. Where there are fewer of
  // them than threads, the input's gradient can be cut into more and is better left to all threads.
  if (2 * ceil_div(input.num_tasks, num_threads) < images * ceil_div(weight.num_tasks, num_threads))
    return false;
  const int64_t v = plan.lanes.lanes, line = fft.line_elements(v), row = fft.spectrum_row(v);
  const Phase &y = convolution.phases_y[0], &x = convolution.phases_x[0];
  const int64_t width = std::max(plan.input.width, plan.grad_output.width);
  const int64_t map_rows =
      (std::max(fft.rows_together, convolution.fft.rows_together) + 1) * width * v;
  const int64_t weight_rows = 2 * row + y.taps * x.taps * v;  // not at the same time
  const int64_t rows = std::max({plan.grad_output.height, plan.input.height, plan.y.count});
  shared.scratch_elements = (2 * fft.y.size + plan.input.height + rows) * row + 3 * line +
                            std::max({line, map_rows, weight_rows});
  const int64_t patterns = plan.lanes.num_patterns;
  shared.num_tasks = ceil_div(weight.num_tasks, patterns) * patterns;
  shared.multiply_adds_per_task = 1.5 * weight.multiply_adds_per_task;
  return true;
}

}  // namespace lka::cpu
