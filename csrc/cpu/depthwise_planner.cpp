#include <algorithm>
#include <numeric>

#include "fft_planner.h"
#include "planner_parts.h"
#include "row_tile_sizes.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

// Positions of outputs for which the source is unpacked at a time, where channels are adjacent: two
// tiles.
constexpr int64_t kTogetherPositions = 28;
// Kernels that read maps where they stand without a stride: the share of the columns of tiles that
// are needed, at least, and with more taps than kMostTiledTaps; the weights of these, at most; and
// the distance of addresses in the same set of the first-level cache.
constexpr double kLeastTiledShare = 0.7, kLeastLongShare = 0.8;
constexpr int64_t kMostTiledTaps = 49;
constexpr int64_t kTiledWeightBytes = 384 * 1024;
constexpr int64_t kSetsBytes = 4096;
// Strided kernels in place: taps of a phase of outputs, at most; and where steps are this wide,
// taps for each element of a step in both directions, at most, and vectors of channels, at least.
constexpr int64_t kMostPhaseTaps = 9;
constexpr int64_t kWideStep = 3, kMostTapsPerStep = 4, kFewestChannelVectors = 4;

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

// Drop taps that meet no source element [0, size) for any output.
void clip(Phase& phase, int64_t size) {
  const int64_t reach = (phase.count - 1) * phase.out_step;
  const int64_t begin = std::max<int64_t>(0, ceil_div(-phase.origin - reach, phase.tap_step));
  const int64_t end = std::min(phase.taps, ceil_div(size - phase.origin, phase.tap_step));
  phase.taps = std::max<int64_t>(0, end - begin);
  phase.origin += begin * phase.tap_step;
  phase.first_kernel_index += begin * phase.kernel_index_step;
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

// Whether source elements may be widened for every row of taps, instead of once, in rows of so many
// columns.
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

// Whether tiles in place may take the taps of a row some at a time.
bool is_long_row(const Phase& x) { return x.taps > kRowTileColumns || x.taps == 6; }

// The share of the time of tiles of outputs in place, without a stride, that is spent on outputs
// that are needed.
double tiled_share(const ConvParams& p, const Phase& y, const Phase& x, const LanePlan& lanes) {
  const int64_t count = x.taps == 1 ? x.count : ceil_div(x.count, x.tap_step);
  const bool narrow = storage_bytes(p.storage) < arithmetic_bytes(p.storage);
  if (y.taps > rows_of_tile_run(x.taps, narrow)) return used_share(count, kRowTileColumns);
  const bool one_block = p.channels <= lanes.lanes && has_wide_vectors(p.storage);
  const bool wide = one_block && is_long_row(x) && wide_tiles_fit(count);
  return double(count) / double(tiled_outputs(count, wide ? kWideTileColumns : kRowTileColumns));
}

// Whether tiles of outputs read channels_last maps in place without a stride, beyond what row tiles
// serve: any padding and dilation. Pairs of rows in a buffer are better but for two rows of one or
// two taps; of two taps tiles in place make pairs themselves.
bool tiles_in_place_serve(const ConvParams& p, const Phase& y, const Phase& x,
                          const MapView& source, const MapView& target, const LanePlan& lanes) {
  if (p.stride_h * p.stride_w != 1 || source.stride_c != 1 || target.stride_c != 1 ||
      lanes.cross_images || x.taps < 1)
    return false;
  if (pairs_serve(p.storage, y)) return x.taps <= 2 && y.taps <= 2;
  // Of dilated taps so few outputs belong together that every tile lies at an edge: one block of
  // channels is sooner unpacked.
  if (p.channels <= lanes.lanes && x.tap_step > 1 &&
      ceil_div(x.count, x.tap_step) < 2 * kRowTileColumns)
    return false;
  const double share = tiled_share(p, y, x, lanes);
  if (y.taps * x.taps <= kMostTiledTaps && (!is_long_row(x) || y.taps == 1))
    return cheap_to_widen(p.storage, target.width) && share >= kLeastTiledShare;
  // Every tile goes through the weights of all channels, which should leave room in the second
  // cache, and reads as many pixels, which should not all fall into the same sets of the first.
  return cheap_to_widen(p.storage, INT64_MAX) && share >= kLeastLongShare &&
         y.taps * x.taps * p.channels * arithmetic_bytes(p.storage) <= kTiledWeightBytes &&
         source.stride_w * storage_bytes(p.storage) % kSetsBytes != 0;
}

// Whether strided maps are read where they stand beyond what in_place_serves says: for outputs of
// several phases, a row of few taps each, and for steps so wide that outputs share little, of
// channels that fill the blocks that are then summed together.
bool wide_steps_in_place(const ConvParams& p, const PlannedConvolution& planned) {
  const ConvolvePlan& plan = planned.plan;
  const auto most_taps = [](const std::vector<Phase>& phases) {
    int64_t most = 0;
    for (const Phase& phase : phases) most = std::max(most, phase.taps);
    return most;
  };
  if (plan.source.stride_c != 1 || plan.target.stride_c != 1 || plan.lanes.cross_images)
    return false;
  const int64_t taps = most_taps(planned.phases_y) * most_taps(planned.phases_x);
  if (planned.phases_y.size() > 1 && planned.phases_x.size() > 1) return taps <= kMostPhaseTaps;
  const Phase &y = planned.phases_y[0], &x = planned.phases_x[0];
  return y.out_step >= kWideStep && x.out_step >= kWideStep &&
         taps <= kMostTapsPerStep * y.out_step * x.out_step &&
         p.channels >= kFewestChannelVectors * planned.kernels->lanes &&
         p.channels % planned.kernels->lanes == 0;
}

// The distance between neighbouring source rows or columns that any output reads. With several
// phases outputs step by one.
int64_t read_apart(const Phase& phase) {
  return phase.taps > 1 ? std::gcd(phase.out_step, phase.tap_step) : phase.out_step;
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
  plan.rows_apart = read_apart(planned.phases_y[0]);
  plan.columns_apart = read_apart(planned.phases_x[0]);
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

// What planning without transforms would come to.
double direct_form_cost(const ConvParams& p, const Phase& y, const Phase& x, const MapView& source,
                        const MapView& target, const LanePlan& lanes) {
  if (covers(y, source.height) && covers(x, source.width))
    return dense_cost(y, x, source.height, source.width);
  if (tiles_in_place_serve(p, y, x, source, target, lanes))
    return tiles_in_place_cost(y, x, source.height, source.width) / tiled_share(p, y, x, lanes);
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
    const double direct = direct_form_cost(p, y, x, source, target, lanes);
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
  if (in_place_serves(p, plan.lanes) || wide_steps_in_place(p, planned)) {
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
  if (tiles_in_place_serve(p, first_y, first_x, source, target, plan.lanes)) {
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

}  // namespace lka::cpu
