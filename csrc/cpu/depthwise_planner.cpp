#include "depthwise_planner.h"

#include <algorithm>
#include <numeric>

#include "fft_planner.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

// Unpacked rows of the source, and the outputs in hand, should leave room in the second-level
// cache.
constexpr int64_t kBufferBytes = 128 * 1024;
// Blocks of channels that are unpacked together, so that memory is read in its order.
constexpr int64_t kBlocksTogether = 24;
// Positions of outputs for which the source is unpacked at a time, where it is transposed in
// registers: enough that few of these squares are only partly full.
constexpr int64_t kTransposedPositions = 96;
constexpr int64_t kTogetherPositions = 28;  // where it is not: two tiles
// Weight gradients are computed in about this many tasks, groups of channels times parts of the
// rows: a constant, so that the bits of the result do not depend on the number of threads.
constexpr int64_t kWeightGradientTasks = 16;
// A part of the batch has at least this many positions: its partial sums are added up at the end.
constexpr int64_t kPositionsPerPart = 384;

// Taps of kernels that read maps where they stand with a stride: with more it was mostly slower,
// but for 7 in a row, which have tiles of their own.
constexpr int64_t kMostInPlaceTaps = 25;
// The same without a stride, and the share of the columns of tiles of 7 that are needed.
constexpr int64_t kMostTiledTaps = 49;
constexpr double kLeastTiledShare = 0.7;
// Bytes of a pixel from which columns of taps are taken as rows.
constexpr int64_t kLeastTurnedPixel = 256;
// Blocks of channels that a weight gradient takes together there: a pixel is read in long runs.
constexpr int64_t kInPlaceBlocks = 12;

constexpr double kSupposedThreads = 4.0;
// The time of direct sums of pairs of rows over that of single rows. Seen: 0.50 to 0.63.
constexpr double kPairedCost = 0.55;

// Row tiles: the share of columns and channels, at least, that does not idle; what a row of outputs
// reads of a vector of channels, which should not be far from the first-level cache; rows of taps
// of which the sum need not be cut into runs; and of a chunk of rows.
constexpr double kLeastTileShare = 0.9;
constexpr int64_t kPairedRowsBytes = 64 * 1024;
constexpr int64_t kMostSingleRows = 7;
constexpr int64_t kTileChunkBytes = 64 * 1024;

// Rows of one plane that a planar kernel has in hand: they should stay in the first-level cache.
constexpr int64_t kPlanarBufferBytes = 24 * 1024;
// Sums of weight gradients of the channels that it takes together.
constexpr int64_t kPlanarSumsBytes = 16 * 1024;

// Drop taps that meet no source element [0, size) for any output.
void clip(Phase& phase, int64_t size) {
  const int64_t reach = (phase.count - 1) * phase.out_step;
  const int64_t begin = std::max<int64_t>(0, ceil_div(-phase.origin - reach, phase.tap_step));
  const int64_t end = std::min(phase.taps, ceil_div(size - phase.origin, phase.tap_step));
  phase.taps = std::max<int64_t>(0, end - begin);
  phase.origin += begin * phase.tap_step;
  phase.first_kernel_index += begin * phase.kernel_index_step;
}

double used_share(int64_t channels, int lanes) {
  return double(channels) / double(ceil_div(channels, lanes) * lanes);
}

int64_t arithmetic_bytes(Storage storage) { return storage == Storage::float64 ? 8 : 4; }

int64_t storage_bytes(Storage storage) {
  return storage == Storage::bfloat16 || storage == Storage::float16 ? 2
                                                                     : arithmetic_bytes(storage);
}

// Whether vectors have 64 bytes: then there are 32 of them, and masks.
bool has_wide_vectors(Storage storage) {
  return kernels(storage).full.lanes * arithmetic_bytes(storage) == 64;
}

LanePlan channel_blocks(int64_t batch, int64_t channels, int lanes) {
  const int64_t blocks = ceil_div(channels, lanes);
  return {lanes, false, blocks, blocks * batch, blocks};
}

// Full vectors of kernels that read maps where they stand: the last of an image ends with its
// channels. Two halves would take longer.
bool overlapping_blocks(Storage storage, int64_t batch, int64_t channels, LanePlan& plan,
                        const DepthwiseKernels*& chosen) {
  const DepthwiseKernels& full = kernels(storage).full;
  if (channels < full.lanes) return false;
  chosen = &full;
  plan = channel_blocks(batch, channels, full.lanes);
  plan.last_overlaps = true;
  return true;
}

// Channels of one image fill the lanes where at most a fifth of them would idle; else planes of
// different images share a vector, unless channels are adjacent in memory and fill a narrow vector,
// or half of it where a part of a vector is read by one instruction, or there is one image: then
// reading them together is worth more.
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

struct Extent {
  int64_t origin, span;  // source elements [origin, origin + span) for the first output of a phase
};

Extent extent_of(const std::vector<Phase>& phases) {
  int64_t begin = INT64_MAX, end = INT64_MIN;
  for (const Phase& phase : phases) {
    if (phase.taps == 0) continue;
    begin = std::min(begin, phase.origin);
    end = std::max(end, phase.origin + (phase.taps - 1) * phase.tap_step + 1);
  }
  return begin > end ? Extent{0, 1} : Extent{begin, end - begin};
}

// Blocks of lanes to unpack together and outputs to unpack for at a time: as many as fit the
// buffer. `least` outputs come first, then blocks, then more outputs.
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

// A square of 3, 5 or 7 taps.
bool small_square(int64_t taps_y, int64_t taps_x) {
  return (taps_y == 3 || taps_y == 5 || taps_y == 7) && taps_x == taps_y;
}

// Whether planar kernels serve a convolution with this many taps (clipped) between these maps. They
// widen 16-bit types once for every vector that they store and narrow them through memory: there
// the other kernels are mostly faster on rows of at most half a vector, and with 7 taps.
bool planar_serves(const ConvParams& p, int64_t taps_y, int64_t taps_x, const MapView& source,
                   const MapView& target) {
  const bool two_bytes = p.storage == Storage::bfloat16 || p.storage == Storage::float16;
  if (two_bytes && (taps_y == 7 || target.width <= kernels(p.storage).planar_half.lanes))
    return false;
  const bool single = taps_y == 1 && taps_x == 1;
  return unit_steps(p) && (single || small_square(taps_y, taps_x)) &&  //
         source.stride_w == 1 && target.stride_w == 1 &&               //
         target.height >= kFewestPlanarRows && target.width >= kFewestPlanarRows;
}

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

const DepthwiseKernels* planar_kernels(Storage storage, int64_t width) {
  const KernelSet& set = kernels(storage);
  return width <= set.planar_half.lanes ? &set.planar_half : &set.planar_full;
}

// Lanes of a planar kernel share no weights: to the rest of the plan, a block is one plane.
LanePlan one_plane_each(int64_t batch, int64_t channels) {
  return {1, false, channels, batch * channels, channels};
}

// Rows of `columns` elements at a time, and the buffer for them and `more` rows around them.
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

// Lanes of transform kernels, and which kernels have as many.
LanePlan plan_fft_lanes(const ConvParams& p, bool channels_adjacent,
                        const DepthwiseKernels*& chosen) {
  const KernelSet& set = kernels(p.storage);
  const LanePlan lanes = plan_lanes(p, channels_adjacent, chosen);
  chosen = lanes.lanes == set.fft_half.lanes ? &set.fft_half : &set.fft_full;
  return lanes;
}

// Whether every output of a clipped phase meets every source element.
bool covers(const Phase& phase, int64_t source_size) {
  return phase.tap_step == 1 && phase.origin == -(phase.count - 1) &&
         phase.taps == source_size - phase.origin;
}

// Whether two rows of the source can stand in a lane, where outputs have one phase, `y` its rows.
bool pairs_serve(Storage storage, const Phase& y) {
  return kernels(storage).paired_full.convolve != nullptr && y.tap_step == 1 && y.taps > 1 &&
         y.out_step <= 2;
}

// The phases of even and of odd output rows over pairs of source rows; with a stride of two every
// output row begins with a pair.
void pair_rows(PlannedConvolution& planned) {
  ConvolvePlan& plan = planned.plan;
  const Phase y = planned.phases_y[0];
  planned.kernel_name = "pairs";
  plan.paired = plan.direct_store = true;
  plan.unpaired_y = y;
  plan.pair_shift = -(y.origin & 1);
  plan.source_height = ceil_div(plan.source.height - plan.pair_shift, 2);
  const int64_t origin = (y.origin - plan.pair_shift) / 2;
  if (y.out_step == 2)
    planned.phases_y = {{0, 1, y.count, (y.taps + 1) / 2, origin, 1, 1, 0, 1}};
  else
    planned.phases_y = {{0, 2, (y.count + 1) / 2, (y.taps + 1) / 2, origin, 1, 1, 0, 1},
                        {1, 2, y.count / 2, y.taps / 2 + 1, origin, 1, 1, 0, 1}};
  plan.phases_y = planned.phases_y.data();
  plan.num_phases_y = int64_t(planned.phases_y.size());
  const KernelSet& set = kernels(plan.storage);
  planned.kernels = planned.kernels == &set.half ? &set.paired_half : &set.paired_full;
}

// Whether source elements may be widened for every row of taps, instead of once.
bool cheap_to_widen(Storage storage, int64_t columns) {
  const int lanes = kernels(storage).full.lanes;
  if (storage == Storage::bfloat16) return lanes == 16 || columns <= 2 * kRowTileColumns;
  return storage != Storage::float16 || lanes >= 8;  // else widened by integer arithmetic
}

// Whether row tiles serve a convolution with one phase of outputs, by `paired` rows or single ones,
// and `lanes` of the latter.
bool row_tiles_serve(const ConvParams& p, const Phase& y, const Phase& x, const MapView& source,
                     const MapView& target, const LanePlan& lanes, bool paired) {
  const int64_t columns = target.width;
  if (!unit_steps(p) || y.taps == 0 || source.stride_c != 1 || target.stride_c != 1 ||
      columns != source.width || x.origin != -(x.taps / 2) ||
      !(x.taps == 3 || x.taps == 5 || x.taps == 7))
    return false;
  // One tile may meet the padding on both sides, of several the first and the last on one.
  if (columns != kRowTileColumns && columns < kRowTileColumns + x.taps / 2) return false;
  // One row of taps takes so little time that loading ahead for every row of a tile comes in
  // bursts.
  if (!paired)
    return y.taps > 1 && y.taps <= kMostSingleRows && !lanes.cross_images &&
           cheap_to_widen(p.storage, columns) &&
           used_share(columns, kRowTileColumns) >= kLeastTileShare;
  const int interleaved = 2 * kernels(p.storage).paired_full.lanes;
  return y.taps * columns * interleaved * 2 <= kPairedRowsBytes &&
         used_share(p.channels, interleaved) * used_share(columns, kRowTileColumns) >=
             kLeastTileShare;
}

void plan_row_tiles(PlannedConvolution& planned, int num_threads, bool paired) {
  ConvolvePlan& plan = planned.plan;
  const Phase y = planned.phases_y[0], x = planned.phases_x[0];
  plan.row_tiles = true;
  plan.unpaired_y = y;
  plan.packed_taps = y.taps * x.taps;
  int64_t terms = y.taps;
  if (paired) {
    plan.paired = true;
    planned.kernels = &kernels(plan.storage).paired_full;
    const int lanes = planned.kernels->lanes;
    plan.lanes = channel_blocks(plan.batch, ceil_div(plan.channels, 2 * lanes) * 2 * lanes, lanes);
    terms = (y.taps + 1) / 2;
    planned.phases_y = {{0, 1, y.count, terms, y.origin, 1, 2, 0, 1}};
    plan.phases_y = planned.phases_y.data();
    plan.packed_taps += terms * x.taps;
  } else {
    overlapping_blocks(plan.storage, plan.batch, plan.channels, plan.lanes, planned.kernels);
  }
  plan.scratch_elements = 0;
  planned.packed_weight_elements = plan.lanes.num_patterns * plan.packed_taps * plan.lanes.lanes;
  const int64_t height = plan.target.height;
  plan.num_bands = 1;
  if (num_threads > 1 && plan.batch < 2 * num_threads)
    plan.num_bands = std::min(height, ceil_div(2 * num_threads, plan.batch));
  plan.band = ceil_div(height, plan.num_bands);
  plan.num_bands = ceil_div(height, plan.band);
  // Chunks are equally high, as each loads the next ahead, and not so low that all they do is to
  // load weights.
  const int64_t row_bytes = plan.channels * plan.target.width * storage_bytes(plan.storage);
  const int64_t most = std::max((y.taps + 1) / 2, kTileChunkBytes / row_bytes);
  plan.chunk = ceil_div(plan.band, ceil_div(plan.band, most));
  planned.num_tasks = plan.batch * plan.num_bands;
  planned.multiply_adds_per_task =
      double(plan.band * plan.target.width * plan.lanes.blocks_per_image) * double(terms * x.taps);
}

// Whether maps are read where they stand with a stride: with few taps, or with tiles of 7 in a row.
bool in_place_serves(const ConvParams& p, const LanePlan& lanes) {
  const bool few = p.kernel_h * p.kernel_w <= kMostInPlaceTaps;
  const bool tiles_of_seven =
      p.kernel_h <= 7 && p.kernel_w == 7 && p.stride_w == 2 && p.dilation_w == 1 && p.pad_left == 3;
  return p.stride_h * p.stride_w > 1 && (few || tiles_of_seven) &&  //
         p.input.stride_c == 1 && p.output.stride_c == 1 && !lanes.cross_images;
}

// Whether columns of taps are better taken as rows, so that an element is loaded once for all taps
// of a tile: where a pixel, of which the next is a row away then, is long enough to be loaded
// ahead.
bool column_of_taps(const ConvParams& p) {
  return p.kernel_w == 1 && p.kernel_h > 1 && p.input.stride_c == 1 && p.output.stride_c == 1 &&
         p.channels * storage_bytes(p.storage) >= kLeastTurnedPixel;
}

// The same convolution with rows for columns and columns for rows.
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

// Whether tiles of outputs read channels_last maps in place without a stride, beyond what row tiles
// serve: any padding and dilation. Pairs of rows are better but for two taps.
bool tiles_in_place_serve(const ConvParams& p, const Phase& y, const Phase& x,
                          const MapView& source, const MapView& target, const LanePlan& lanes,
                          bool paired) {
  if (p.stride_h * p.stride_w != 1 || source.stride_c != 1 || target.stride_c != 1 ||
      lanes.cross_images || x.taps < 1 || (x.taps > 7 && y.taps > 1) || x.taps == 6)
    return false;
  if (paired) return x.taps <= 2 && y.taps <= 2;
  return y.taps * x.taps <= kMostTiledTaps && cheap_to_widen(p.storage, target.width) &&
         used_share(x.taps == 1 ? x.count : ceil_div(x.count, x.tap_step), kRowTileColumns) >=
             kLeastTiledShare;
}

void plan_in_place(PlannedConvolution& planned, int num_threads) {
  ConvolvePlan& plan = planned.plan;
  // Elements of 16 bits are widened for every row of taps. What counts is the number of
  // instructions then, and a full vector with idle lanes takes as many as half a one.
  const bool narrow = plan.storage == Storage::bfloat16 || plan.storage == Storage::float16;
  const KernelSet& set = kernels(plan.storage);
  if (!overlapping_blocks(plan.storage, plan.batch, plan.channels, plan.lanes, planned.kernels) &&
      narrow && plan.channels > set.half.lanes) {
    planned.kernels = &set.full;
    plan.lanes = channel_blocks(plan.batch, plan.channels, set.full.lanes);
  }
  plan.in_place = true;
  plan.packed_taps = 0;
  double multiply_adds = 0;
  for (const Phase& y : planned.phases_y)
    for (const Phase& x : planned.phases_x) {
      plan.packed_taps += y.taps * x.taps;
      multiply_adds += double(y.taps * x.taps) * double(y.count * x.count);
    }
  const Extent y = extent_of(planned.phases_y);
  plan.origin_y = y.origin;
  plan.span_y = y.span;
  plan.scratch_elements = 0;
  planned.packed_weight_elements = plan.lanes.num_patterns * plan.packed_taps * plan.lanes.lanes;
  plan.num_bands = 1;
  if (num_threads > 1 && plan.batch < 2 * num_threads)
    plan.num_bands = std::min(plan.target.height, ceil_div(2 * num_threads, plan.batch));
  plan.band = ceil_div(plan.target.height, plan.num_bands);
  plan.num_bands = ceil_div(plan.target.height, plan.band);
  planned.num_tasks = plan.batch * plan.num_bands;
  planned.multiply_adds_per_task =
      multiply_adds * double(plan.lanes.blocks_per_image) / double(plan.num_bands);
}

void plan_dense(PlannedConvolution& planned, int num_threads) {
  ConvolvePlan& plan = planned.plan;
  const Phase &y = plan.phases_y[0], &x = plan.phases_x[0];
  const int64_t source_area = plan.source.height * plan.source.width;
  const int64_t target_area = plan.target.height * plan.target.width;
  const int64_t lanes = plan.lanes.lanes;
  plan.packed_taps = y.taps * x.taps;
  plan.scratch_elements = (source_area + target_area) * lanes +
                          y.taps * int64_t(sizeof(void*)) / arithmetic_bytes(plan.storage);
  planned.packed_weight_elements = plan.lanes.num_patterns * plan.packed_taps * lanes;
  const int64_t blocks = plan.lanes.num_blocks;
  plan.num_bands = 1;
  if (num_threads > 1 && blocks < 2 * num_threads)
    plan.num_bands = std::min(plan.target.height, ceil_div(2 * num_threads, blocks));
  plan.band = ceil_div(plan.target.height, plan.num_bands);
  plan.num_bands = ceil_div(plan.target.height, plan.band);
  planned.num_tasks = blocks * plan.num_bands;
  planned.multiply_adds_per_task =
      double(source_area) * double(target_area) / double(plan.num_bands);
}

void plan_planar(PlannedConvolution& planned, int num_threads) {
  ConvolvePlan& plan = planned.plan;
  const int64_t bytes = arithmetic_bytes(plan.storage);
  const int64_t taps = plan.phases_y[0].taps, height = plan.target.height;
  planned.kernels = planar_kernels(plan.storage, plan.target.width);
  const int lanes = planned.kernels->lanes;
  plan.lanes = one_plane_each(plan.batch, plan.channels);
  plan.origin_y = plan.phases_y[0].origin;
  plan.origin_x = plan.phases_x[0].origin;
  const int64_t planes = plan.lanes.num_blocks;
  plan.num_bands = 1;
  if (num_threads > 1 && planes < 2 * num_threads)
    plan.num_bands = std::max<int64_t>(
        1, std::min(height / (2 * kFewestPlanarRows), ceil_div(2 * num_threads, planes)));
  plan.band = ceil_div(height, plan.num_bands);
  plan.chunk = planar_chunk(plan.buffer, std::max<int64_t>(plan.target.width, lanes) + taps - 1,
                            lanes, bytes, plan.band, taps - 1);
  plan.packed_taps = taps * taps;
  plan.scratch_elements = plan.buffer.rows * plan.buffer.columns;
  planned.packed_weight_elements = plan.channels * plan.packed_taps;
  planned.num_tasks = planes * plan.num_bands;
  planned.multiply_adds_per_task =
      double(plan.band * ceil_div(plan.target.width, lanes)) * double(taps * taps + 4);
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
  const bool few_rows = taps_x == 3 ? taps_y == 3 : taps_x == 1 ? taps_y <= 7 : taps_y <= 4;
  return has_wide_vectors(p.storage) && unit_steps(p) && few_rows && p.input.stride_c == 1 &&
         p.output.stride_c == 1 && p.channels >= kernels(p.storage).full.lanes;
}

void plan_in_place(PlannedWeightGradient& planned) {
  WeightGradientPlan& plan = planned.plan;
  plan.in_place = true;
  overlapping_blocks(plan.storage, plan.batch, plan.channels, plan.lanes, planned.kernels);
  const int64_t blocks = plan.lanes.blocks_per_image, rows = plan.batch * plan.grad_output.height;
  plan.num_groups = std::min(ceil_div(blocks, kInPlaceBlocks), kWeightGradientTasks);
  plan.num_parts = std::min(rows, ceil_div(kWeightGradientTasks, plan.num_groups));
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

// What planning without transforms would come to.
double direct_form_cost(const ConvParams& p, const Phase& y, const Phase& x,
                        const MapView& source) {
  if (covers(y, source.height) && covers(x, source.width))
    return dense_cost(y, x, source.height, source.width);
  const double single = direct_cost(y, x, source.height, source.width);
  return pairs_serve(p.storage, y) ? kPairedCost * single : single;
}

// Plans transforms, if they serve and cost less than direct sums or are asked for.
bool plan_fft_if_better(const ConvParams& p, PlannedConvolution& planned) {
  ConvolvePlan& plan = planned.plan;
  const MapView &source = plan.source, &target = plan.target;
  const Phase &y = plan.phases_y[0], &x = plan.phases_x[0];
  if (p.form == Form::direct || p.stride_h != 1 || p.stride_w != 1 ||
      !plan_fft(y, x, source.height, source.width, plan.fft))
    return false;
  const FftConv& fft = plan.fft;
  const DepthwiseKernels* chosen;
  const LanePlan lanes = plan_fft_lanes(p, source.stride_c == 1 && target.stride_c == 1, chosen);
  const double plane = fft_cost(fft, source.height + target.height, true);
  if (p.form != Form::fft) {
    const double weights = fft_cost(fft, y.taps, false) * double(lanes.num_patterns);
    // Other kernels share a block among threads. Supposes a number of them, so that the choice, and
    // with it the rounding of the result, is the same for every number.
    const double idle = std::max(1.0, kSupposedThreads / double(lanes.num_blocks));
    const double direct = direct_form_cost(p, y, x, source);
    if (idle * (plane + weights / double(lanes.num_blocks)) >= direct) return false;
  }
  planned.kernels = chosen;
  planned.kernel_name = "fft";
  plan.lanes = lanes;
  add_twiddles(plan.fft, p.storage);
  const int64_t v = lanes.lanes, line = fft.line_elements(v), row = fft.spectrum_row(v);
  const int64_t map_rows = (fft.rows_together + 1) * std::max(source.width, target.width) * v;
  const int64_t weight_rows = 2 * row + y.taps * x.taps * v;  // not at the same time
  plan.packed_taps = 0;  // a thread makes the spectra that it needs
  planned.packed_weight_elements = 0;
  plan.scratch_elements = (fft.y.size + std::max(source.height, target.height)) * row + 3 * line +
                          std::max(map_rows, weight_rows);
  planned.num_tasks = ceil_div(lanes.num_blocks, lanes.num_patterns) * lanes.num_patterns;
  planned.multiply_adds_per_task = plane;
  return true;
}

PlannedConvolution plan_convolution(const ConvParams& p, const MapView& source,
                                    const MapView& target, std::vector<Phase> phases_y,
                                    std::vector<Phase> phases_x, int num_threads) {
  PlannedConvolution planned;
  planned.phases_y = std::move(phases_y);
  planned.phases_x = std::move(phases_x);
  ConvolvePlan& plan = planned.plan;
  plan.storage = p.storage;
  plan.batch = p.batch;
  plan.channels = p.channels;
  plan.kernel_h = p.kernel_h;
  plan.kernel_w = p.kernel_w;
  plan.source = source;
  plan.target = target;
  plan.phases_y = planned.phases_y.data();
  plan.phases_x = planned.phases_x.data();
  plan.num_phases_y = int64_t(planned.phases_y.size());
  plan.num_phases_x = int64_t(planned.phases_x.size());

  const Phase &first_y = planned.phases_y[0], &first_x = planned.phases_x[0];
  if (plan_fft_if_better(p, planned)) return planned;
  if (planar_serves(p, first_y.taps, first_x.taps, source, target)) {
    plan_planar(planned, num_threads);
    planned.kernel_name = "planar";
    return planned;
  }

  plan.lanes = plan_lanes(p, source.stride_c == 1 && target.stride_c == 1, planned.kernels);
  plan.direct_store = p.storage == Storage::float32 || p.storage == Storage::float64;
  plan.dense = p.stride_h == 1 && p.stride_w == 1 && covers(first_y, source.height) &&
               covers(first_x, source.width);
  if (plan.dense) {
    plan_dense(planned, num_threads);
    planned.kernel_name = "dense";
    return planned;
  }
  if (in_place_serves(p, plan.lanes)) {
    plan_in_place(planned, num_threads);
    planned.kernel_name = "in_place";
    return planned;
  }
  const bool paired =
      planned.phases_y.size() * planned.phases_x.size() == 1 && pairs_serve(p.storage, first_y);
  if (row_tiles_serve(p, first_y, first_x, source, target, plan.lanes, paired)) {
    plan_row_tiles(planned, num_threads, paired);
    planned.kernel_name = paired ? "pairs_in_place" : "in_place";
    return planned;
  }
  if (tiles_in_place_serve(p, first_y, first_x, source, target, plan.lanes, paired)) {
    plan_in_place(planned, num_threads);
    planned.kernel_name = "in_place";
    return planned;
  }
  plan.source_height = source.height;
  planned.kernel_name = "blocks";
  if (paired) pair_rows(planned);
  const bool together = source.stride_c == 1 && !plan.lanes.cross_images;

  const Extent y = extent_of(planned.phases_y), x = extent_of(planned.phases_x);
  const int64_t longest = planned.phases_y[0].count;  // phase 0 has the most outputs
  const int64_t widest = planned.phases_x[0].count;
  const int64_t step = planned.phases_y[0].out_step;
  plan.origin_y = y.origin;
  plan.origin_x = x.origin;
  plan.span_y = y.span;
  plan.buffer.columns = x.span + (widest - 1) * planned.phases_x[0].out_step;

  const int64_t bytes = plan.lanes.lanes * arithmetic_bytes(p.storage);
  const int64_t positions = together ? kTogetherPositions : kTransposedPositions;
  const int64_t result_row =
      together && plan.direct_store ? 0 : planned.phases_y[0].output_stride * target.width * bytes;
  plan.chunk = choose_chunk(plan.buffer, together ? plan.lanes.blocks_per_image : 1, bytes, y.span,
                            step, result_row, longest, ceil_div(positions, target.width));
  plan.groups_per_image = together ? ceil_div(plan.lanes.blocks_per_image, plan.buffer.blocks) : 0;
  const int64_t groups = together ? plan.batch * plan.groups_per_image : plan.lanes.num_blocks;
  int64_t num_bands = 1;
  if (num_threads > 1 && groups < 2 * num_threads)
    num_bands = std::min(ceil_div(longest, 4), ceil_div(2 * num_threads, groups));
  plan.band = ceil_div(longest, num_bands);
  plan.num_bands = ceil_div(longest, plan.band);
  plan.chunk = std::min(plan.chunk, plan.band);
  plan.buffer.ring_rows = y.span + (plan.chunk - 1) * step;
  plan.buffer.rows = y.span + (plan.band - 1) * step;

  plan.packed_taps = plan.paired ? plan.unpaired_y.taps * first_x.taps : 0;
  plan.tap_rows = 0;
  double taps_of_all_outputs = 0;
  for (const Phase& py : planned.phases_y) plan.tap_rows += py.taps;
  plan.tap_rows = std::max<int64_t>(1, plan.tap_rows);
  for (const Phase& py : planned.phases_y)
    for (const Phase& px : planned.phases_x) {
      plan.packed_taps += py.taps * px.taps;
      taps_of_all_outputs += double(py.taps * px.taps) * double(py.count * px.count);
    }
  const int64_t result_rows =
      std::min(plan.chunk * planned.phases_y[0].output_stride, target.height);
  plan.scratch_elements = plan.buffer.elements(plan.lanes.lanes, arithmetic_bytes(p.storage)) +
                          result_rows * target.width * plan.lanes.lanes;
  planned.packed_weight_elements = plan.lanes.num_patterns * plan.packed_taps * plan.lanes.lanes;
  planned.num_tasks = groups * plan.num_bands;
  planned.multiply_adds_per_task = (taps_of_all_outputs / double(plan.num_bands) +
                                    4.0 * double(plan.buffer.rows * plan.buffer.columns)) *
                                   double(plan.lanes.num_blocks) / double(groups);
  return planned;
}

// As for a convolution.
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

std::vector<Phase> forward_phases(int64_t input, int64_t output, int64_t kernel, int64_t stride,
                                  int64_t dilation, int64_t pad) {
  Phase phase{0, 1, output, kernel, -pad, stride, dilation, 0, 1};
  clip(phase, input);
  return {phase};
}

// grad_input[i] sums grad_output[(i + pad - k·dilation) / stride] over the k that divide evenly.
// Inputs i = phase, phase + stride, … share their taps k = k0, k0 + stride/g, …, g = gcd(stride,
// dilation), and read grad_output at unit steps: a convolution with the kernel flipped.
std::vector<Phase> backward_input_phases(int64_t input, int64_t output, int64_t kernel,
                                         int64_t stride, int64_t dilation, int64_t pad) {
  const int64_t gcd = std::gcd(stride, dilation);
  const int64_t kernel_step = stride / gcd, tap_step = dilation / gcd;
  std::vector<Phase> phases;
  for (int64_t i = 0; i < stride && i < input; ++i) {
    Phase phase{i, stride, (input - i + stride - 1) / stride, 0, 0, 1, tap_step, 0, -kernel_step};
    int64_t first = 0;
    while (first < kernel && first < kernel_step && (i + pad - first * dilation) % stride != 0)
      ++first;
    if (first < kernel && first < kernel_step) {
      phase.taps = (kernel - 1 - first) / kernel_step + 1;
      phase.first_kernel_index = first + (phase.taps - 1) * kernel_step;
      phase.origin = (i + pad - phase.first_kernel_index * dilation) / stride;
      clip(phase, output);
    }
    phases.push_back(phase);
  }
  return phases;
}

PlannedConvolution plan_forward(const ConvParams& p, int num_threads) {
  if (column_of_taps(p)) return plan_forward(turned(p), num_threads);
  return plan_convolution(p, p.input, p.output,
                          forward_phases(p.input.height, p.output.height, p.kernel_h, p.stride_h,
                                         p.dilation_h, p.pad_top),
                          forward_phases(p.input.width, p.output.width, p.kernel_w, p.stride_w,
                                         p.dilation_w, p.pad_left),
                          num_threads);
}

PlannedConvolution plan_backward_input(const ConvParams& p, int num_threads) {
  if (column_of_taps(p)) return plan_backward_input(turned(p), num_threads);
  return plan_convolution(p, p.output, p.input,
                          backward_input_phases(p.input.height, p.output.height, p.kernel_h,
                                                p.stride_h, p.dilation_h, p.pad_top),
                          backward_input_phases(p.input.width, p.output.width, p.kernel_w,
                                                p.stride_w, p.dilation_w, p.pad_left),
                          num_threads);
}

PlannedWeightGradient plan_backward_weight(const ConvParams& p) {
  // In place, 7 kernel rows are taken together.
  if (p.kernel_h > 7 && column_of_taps(p)) return plan_backward_weight(turned(p));
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
  plan.num_groups = std::min(blocks, ceil_div(kWeightGradientTasks, plan.num_parts));

  const int64_t bytes = plan.lanes.lanes * arithmetic_bytes(p.storage);
  const int64_t span = std::max<int64_t>(1, (plan.y.count - 1) * plan.y.out_step + 1);
  const int64_t step = plan.y.tap_step;
  const bool together = p.input.stride_c == 1 && p.output.stride_c == 1 && !plan.lanes.cross_images;
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
