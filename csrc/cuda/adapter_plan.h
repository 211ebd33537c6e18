// What the launches of the fused adapter look like: pure functions of sizes, strides and addresses,
// plain C++ that also runs where there is no GPU.
#pragma once

#include "adapter_call.h"
#include "adapter_narrow_backward_plan.h"
#include "device/adapter_backward.cuh"
#include "device/adapter_convolve_backward.cuh"
#include "device/adapter_forward.cuh"
#include "device/adapter_narrow_forward.cuh"
#include "device/adapter_sums.cuh"
#include "device/adapter_weight_gradient.cuh"
#include "tensor_core_form.h"

namespace lka::cuda {

// One launch; without blocks where nothing is needed.
template <class Params>
struct LaunchOf {
  Params params;
  LaunchShape shape;
};
using AdapterLaunch = LaunchOf<AdapterParams>;

// The convolution of the grid in a launch of its own, in one form of depthwise convolution.
struct AdapterCorrelation {
  LaunchOf<CorrelateParams> rows;
  LaunchOf<DenseCorrelateParams> dense;
  LaunchOf<PlaneCorrelateParams> planes;
};

// In the order of the launches.
struct AdapterForward {
  const char* refusal = nullptr;
  AdapterLaunch down, narrow_down;  // one of both
  AdapterCorrelation correlate;
  AdapterLaunch up, narrow_up;  // one of both
};

struct AdapterBackward {
  const char* refusal = nullptr;
  AdapterLaunch up, up_weight;
  AdapterCorrelation correlate;
  AdapterLaunch convolve;
  LaunchOf<WeightGradientParams> taps;
  LaunchOf<PlaneWeightGradientParams> plane_taps;
  AdapterLaunch down, down_weight;
  AdapterLaunch narrow_up, narrow_down;  // in place of up and down, and of those for their weights

  // The launches that leave partial sums of the projections' gradients.
  AdapterParams& of_up() { return first_of(narrow_up, up_weight, up); }
  AdapterParams& of_down() { return first_of(narrow_down, down_weight, down); }

 private:
  static AdapterParams& first_of(AdapterLaunch& a, AdapterLaunch& b, AdapterLaunch& c) {
    return a.shape.blocks > 0 ? a.params : b.shape.blocks > 0 ? b.params : c.params;
  }
};

// Whether the grid is worth a launch of its own for the tensor cores: where a token has far more
// taps than channels, or where there are so many taps in all that a launch is little beside them.
// Measured on an H100 with r 8 and K 7, µs within the other launches and apart, forward and
// backward: 64 images of 56² (79 million taps) 74.5 and 71.6, 135 and 118; of 28² (20 million) 34.4
// and 36.3, 69.3 and 66.1; 8 images of 56² (10 million) 14.9 and 23.3, 31.6 and 46.1.
inline bool convolves_apart(const AdapterCall& call, bool backward) {
  const auto taps = [&](int64_t size, int64_t kernel) {
    return taps_that_touch(size, size, kernel, call.dilation * (kernel - 1) / 2, call.dilation)
        .count;
  };
  const int64_t of_token =
      call.rank * taps(call.height, call.kernel_h) * taps(call.width, call.kernel_w);
  const double all = double(call.batch) * double(call.height * call.width) * double(of_token);
  return call.storage != Storage::float32 &&
         (of_token > 12 * call.channels || all > (backward ? 15e6 : 40e6));
}

// The same of the taps' gradients, to which prefix tokens must not belong.
inline bool sums_taps_apart(const AdapterCall& call) {
  return call.need_conv && convolves_apart(call, true) &&
         (call.prefix == 0 || call.prefix_mode != PrefixMode::center_tap);
}

namespace detail {

// Whether the kernels for narrow ranks (adapter_narrow_*.cuh) may take a call: 16-bit elements and
// whole fragments, token_fragments.cuh. The tensors that a launch reads and writes must besides be
// in_fragments.
inline bool is_narrow(const AdapterCall& call, const AdapterParams& p) {
  return call.storage != Storage::float32 && call.rank <= 16 && call.rank % 2 == 0 &&
         call.channels % TokenFragment::kChannels == 0 && p.down_vector == 8 && p.up_vector >= 2 &&
         call.batch * call.tokens < (int64_t(1) << 31);
}
inline bool in_fragments(const TokenTensor& t) {
  return t.data == nullptr || (!t.turned && t.vector == 8);
}

// Whether offsets in an image fit 32 bits.
inline bool has_short_images(const TokenTensor& t, const AdapterParams& p) {
  return p.tokens * std::abs(t.stride_t) + p.channels < int64_t(1) << 31;
}

// Shared memory of the convolution, within `budget` bytes from `at` on; returns the end, or 0 where
// not even one kernel row of one channel fits.
inline int64_t place_convolution(AdapterParams& p, int64_t at, int64_t budget,
                                 int64_t most_channels) {
  AdapterConvolution& k = p.convolution;
  const int64_t columns = round_up(p.tiling.columns, 4), taps = round_up(k.kernel_w, 4);
  k.taps_pitch = int32_t(taps);
  const int64_t width =
      columns + (k.dilation_w == 1 ? taps : int64_t(k.kernel_w - 1) * k.dilation_w);
  k.pitch = pitch_for<float>(int(width));
  const auto rows = [&](int64_t kernel_rows) {
    return std::min<int64_t>(p.height, p.tiling.rows + (kernel_rows - 1) * k.dilation_h);
  };
  const auto bytes = [&](int64_t kernel_rows) {
    return 4 * (rows(kernel_rows) * k.pitch + (kernel_rows + 2) * taps);
  };
  int64_t kernel_rows = k.kernel_h;
  while (kernel_rows > 0 && bytes(kernel_rows) > budget) --kernel_rows;
  if (kernel_rows == 0) return 0;
  int64_t channels = std::min({budget / bytes(kernel_rows), int64_t(p.rank), most_channels});
  if (kernel_rows < k.kernel_h) channels = 1;
  k.staged_taps = int32_t(kernel_rows);
  k.staged_rows = int32_t(rows(kernel_rows));
  k.staged_channels = int32_t(ceil_div(p.rank, ceil_div(p.rank, channels)));
  p.at_source = int32_t(at);
  p.at_taps = int32_t(at + 4 * int64_t(k.staged_channels) * k.staged_rows * k.pitch);
  return p.at_taps + 4 * int64_t(k.staged_channels) * (kernel_rows + 2) * taps;
}

constexpr const char* kWindowDoesNotFit =
    "the rows of the convolution's window do not fit shared memory";
constexpr const char* kStepDoesNotFit = "a step of the projection does not fit shared memory";

// Channels of a step and steps in flight: about 16 KB of a tensor, if that lets three blocks share
// an H100's multiprocessor, else what fits at all. `stage_bytes(p)` sets the places in a stage and
// returns its size; `least` is what the memory of the stages is needed for afterwards.
template <class StageBytes>
bool place_stages(AdapterParams& p, int64_t element, int64_t at, int64_t least,
                  StageBytes stage_bytes) {
  int32_t largest = int32_t(16 * 1024 / (element * p.tiling.slots));
  largest = std::min(largest, 256);
  // Each of the splits needs a step.
  while (largest > 32 && ceil_div(p.channels, largest) < p.splits) largest /= 2;
  for (const int64_t most : {int64_t(72 * 1024), kMostShared})
    for (int32_t block_c = largest; block_c >= 16; block_c /= 2) {
      if (block_c > 16 && block_c / 2 >= p.channels) continue;
      p.block_c = block_c;
      p.stage_bytes = int32_t(stage_bytes(p));
      for (p.stages = 3; p.stages > 1; --p.stages)
        if (at + std::max(least, int64_t(p.stages) * p.stage_bytes) <= most) {
          p.at_stages = int32_t(at);
          return true;
        }
    }
  return false;
}

// What AdapterBlock::join_sums needs.
inline int64_t joined_sums(const AdapterParams& p) {
  const AdapterTiling& t = p.tiling;
  return int64_t(4) * 32 * 32 * t.warps_r * t.warps_t * (t.warps_k - 1);
}

inline LaunchShape adapter_shape(const AdapterParams& p, int64_t blocks, int64_t least) {
  LaunchShape shape;
  shape.blocks = blocks;
  shape.threads = 32 * p.tiling.warps_r * p.tiling.warps_t * p.tiling.warps_k;
  shape.shared_bytes = p.at_stages + std::max(least, int64_t(p.stages) * p.stage_bytes);
  return shape;
}

inline void group_tiles(AdapterParams& p, int64_t multiprocessors) {
  const int64_t tiles = int64_t(p.batch) * p.tiling.tiles;
  p.tiles_of_group = int32_t(ceil_div(tiles, std::min(tiles, 2 * multiprocessors)));
  p.groups = int32_t(ceil_div(tiles, p.tiles_of_group));
}

constexpr int64_t kConvolutionBudget = 24 * 1024, kTapGradientBudget = 28 * 1024;

// Fragments are shared out among the warps of a block so that each has some six of a sum's terms,
// three where few blocks would leave multiprocessors idle: as many loads are under way together.
inline void plan_narrow_down(int64_t multiprocessors, AdapterLaunch& down) {
  AdapterParams& p = down.params;
  const int64_t units = p.channels / TokenFragment::kChannels;
  const int64_t tiles = ceil_div(int64_t(p.batch) * p.tokens, TokenFragment::kTokens);
  const int64_t terms = tiles < 16 * multiprocessors ? 3 : 6;
  p.channel_warps = int32_t(std::min<int64_t>(8, ceil_div(units, terms)));
  p.token_warps = p.channel_warps <= 4 ? 4 / p.channel_warps : 1;
  down.shape.blocks = ceil_div(tiles, p.token_warps);
  down.shape.threads = 32 * p.channel_warps * p.token_warps;
  down.shape.shared_bytes =
      p.channel_warps == 1 ? 0 : int64_t(4) * down.shape.threads * 4 * ceil_div(p.rank, 8);
}

// A convolution's halo is staged once for a tile: large tiles, as long as there are one and a half
// for a multiprocessor.
inline AdapterTiling narrow_tiling(const AdapterCall& call, int64_t multiprocessors) {
  for (int slots = 256;; slots /= 2) {
    const AdapterTiling t = tiling_with(slots, call.prefix, call.height, call.width, false);
    if (slots == 32 || (slots == 64 && call.batch * t.tiles >= multiprocessors / 2) ||
        call.batch * t.tiles >= multiprocessors * 3 / 2)
      return t;
  }
}

// `up` has what all launches share. Leaves no blocks where the window does not fit.
inline void plan_narrow_up(const AdapterCall& call, int64_t multiprocessors, AdapterLaunch& up) {
  AdapterParams& p = up.params;
  p.tiling = narrow_tiling(call, multiprocessors);
  const auto vector = [&](const void* data) {
    return widest(AdapterSizes(call.storage).element, data, {call.tokens});
  };
  p.rank_vector = std::min(vector(call.a), vector(call.c));
  while (!tiles_begin_at_multiples(p, p.rank_vector)) p.rank_vector /= 2;
  if (p.convolved)
    while (p.prefix % p.rank_vector != 0) p.rank_vector /= 2;
  const int64_t rank_tile = AdapterSizes(call.storage).tile(p.rank_rows, p.tiling.slots);
  up.shape.shared_bytes = rank_tile;
  if (!p.convolved) {
    up.shape.shared_bytes = place_convolution(p, rank_tile, kConvolutionBudget, p.rank);
    if (up.shape.shared_bytes == 0) return;
  }
  const int64_t tiles = call.batch * p.tiling.tiles;
  p.splits = int32_t(std::clamp<int64_t>(2 * multiprocessors / tiles, 1,
                                         call.channels / TokenFragment::kChannels));
  up.shape.blocks = tiles * p.splits;
  up.shape.threads = 256;
}

// Blocks of the taps' gradient; 0 where its pieces do not fit shared memory.
inline int64_t plan_tap_gradient(const AdapterCall& call, int64_t multiprocessors, AdapterParams& p,
                                 int64_t& shared_bytes) {
  using Block = AdapterTapGradientBlock<Float32>;
  AdapterTapGradient& t = p.taps;
  describe(adapter_convolution(call, call.z, call.grad_c), t);
  const int64_t chunks = ceil_div(t.kernel_w, Block::kTaps);
  int64_t tap_chunks = std::min<int64_t>(chunks, 16);
  int64_t tap_pairs = std::min<int64_t>(ceil_div(t.kernel_h, 2), Block::kThreads / tap_chunks);
  int64_t columns = call.width <= 128 ? call.width : 128;
  int64_t rows = std::min(call.height, std::max<int64_t>(1, 3200 / columns));
  rows = ceil_div(call.height, ceil_div(call.height, rows));  // of about the same height
  const auto fits = [&] {
    const int64_t taps = std::min<int64_t>(Block::kTaps * tap_chunks, t.kernel_w);
    t.source_pitch = pitch_for<float>(
        int(round_up(columns, 4) +
            (t.dilation_w == 1 ? Block::kTaps * tap_chunks : (taps - 1) * t.dilation_w)));
    t.grad_pitch = int32_t(round_up(columns, 4));
    t.staged_rows = int32_t(std::min(call.height, rows + (2 * tap_pairs - 1) * t.dilation_h));
    shared_bytes =
        4 * std::max<int64_t>(int64_t(t.staged_rows) * t.source_pitch + rows * t.grad_pitch,
                              Block::floats_of_sums(int(tap_pairs * tap_chunks)));
    return shared_bytes <= kTapGradientBudget;
  };
  while (!fits()) {
    if (rows > 1)
      rows = ceil_div(rows, 2);
    else if (tap_pairs > 1)
      tap_pairs = ceil_div(tap_pairs, 2);
    else if (tap_chunks > 1)
      tap_chunks = ceil_div(tap_chunks, 2);
    else if (columns > 16)
      columns = round_up(columns / 2, 4);
    else if (shared_bytes > kMostShared)
      return 0;
    else
      break;
  }
  t.tiles_h = int32_t(ceil_div(t.kernel_h, 2 * tap_pairs));
  t.tiles_w = int32_t(ceil_div(chunks, tap_chunks));
  t.tap_pairs = int32_t(tap_pairs);
  t.tap_chunks = int32_t(tap_chunks);
  t.rows = int32_t(rows);
  t.columns = int32_t(columns);
  // As many strips as threads can go down at once, but no shorter than two rows, of which a third
  // is met besides.
  const int64_t parts = Block::kThreads / (tap_pairs * tap_chunks);
  const int64_t of_phase = ceil_div(rows, t.dilation_h);
  const int64_t segments = parts / (ceil_div(columns, 4) * std::min<int64_t>(t.dilation_h, rows));
  t.strip_rows = int32_t(std::clamp<int64_t>(ceil_div(of_phase, std::max<int64_t>(segments, 1)),
                                             std::min<int64_t>(2, of_phase), of_phase));
  t.y_pieces = int32_t(ceil_div(call.height, rows));
  t.x_pieces = int32_t(ceil_div(call.width, columns));
  const int64_t pieces = call.batch * t.y_pieces * t.x_pieces;
  const int64_t blocks = call.rank * t.tiles_h * t.tiles_w;
  const int64_t groups = std::clamp<int64_t>(ceil_div(8 * multiprocessors, blocks), 1, pieces);
  t.pieces_of_group = ceil_div(pieces, groups);
  t.groups = int32_t(ceil_div(pieces, t.pieces_of_group));
  return blocks * t.groups;
}

// Leaves no blocks where no form can be; returns whether one can.
inline bool plan_correlation(const AdapterCall& call, bool backward, AdapterCorrelation& plan) {
  const ConvParams convolution = backward ? adapter_convolution(call, call.grad_z, call.grad_c)
                                          : adapter_convolution(call, call.a, call.c);
  const Correlation correlation = correlation_of(convolution, backward);
  const auto plan_form = [&](const Plan& form, auto& launch) {
    if (form.refusal != nullptr) return false;
    launch.shape = form.shape;
    launch.params.weight = call.conv_weight;
    launch.params.bias = backward ? nullptr : call.conv_bias;
    return true;
  };
  switch (correlate_form(convolution, backward)) {
    case TensorCoreForm::dense:
      return plan_form(plan_dense_correlate(correlation, plan.dense.params), plan.dense);
    case TensorCoreForm::planes:
      return plan_form(plan_plane_correlate(correlation, plan.planes.params), plan.planes);
    default: return plan_form(plan_correlate(correlation, plan.rows.params), plan.rows);
  }
}

// The gradients of a, or of z, and of the taps.
inline const char* plan_convolve_backward(const AdapterCall& call, int64_t multiprocessors,
                                          bool need_z, AdapterBackward& plan) {
  AdapterParams& p = plan.convolve.params;
  LaunchShape& shape = plan.convolve.shape;
  shape.threads = AdapterTapGradientBlock<Float32>::kThreads;
  if (need_z && convolves_apart(call, true))
    p.convolved = plan_correlation(call, true, plan.correlate);
  // The gradients of the taps need a, which is z or is left by the blocks of grad_z.
  if (sums_taps_apart(call) && (p.before == Activation::none || p.convolved)) {
    void* const a = p.before == Activation::none ? call.z : call.a;
    const ConvParams convolution = adapter_convolution(call, a, call.grad_c);
    const auto plan_form = [](const Plan& form, LaunchShape& launch) {
      if (form.refusal == nullptr) launch = form.shape;
      return form.refusal == nullptr;
    };
    if (!plan_form(
            plan_plane_weight_gradient(convolution, int(multiprocessors), plan.plane_taps.params),
            plan.plane_taps.shape))
      plan_form(plan_weight_gradient(convolution, int(multiprocessors), plan.taps.params),
                plan.taps.shape);
  }
  const bool taps_apart = plan.taps.shape.blocks > 0 || plan.plane_taps.shape.blocks > 0;
  if (!taps_apart) p.a = nullptr;
  if (need_z) {
    p.convolution.staged_channels = std::min(8, p.rank);  // for more blocks
    if (!p.convolved) {
      shape.shared_bytes = place_convolution(p, 0, kConvolutionBudget, 8);
      if (shape.shared_bytes == 0) return kWindowDoesNotFit;
    }
    // Then the correlation alone is the gradient.
    const bool finished = p.convolved && p.before == Activation::none && p.prefix == 0;
    if (!finished)
      p.first_weight_block =
          int64_t(p.batch) * p.tiling.tiles * ceil_div(p.rank, p.convolution.staged_channels);
  }
  shape.blocks = p.first_weight_block;
  if (call.need_conv && !taps_apart) {
    int64_t shared_bytes = 0;
    const int64_t blocks = plan_tap_gradient(call, multiprocessors, p, shared_bytes);
    if (blocks == 0) return kWindowDoesNotFit;
    shape.blocks += blocks;
    shape.shared_bytes = std::max(shape.shared_bytes, shared_bytes);
  }
  return shape.blocks > kMostBlocks ? "more than 2^31 blocks" : nullptr;
}

// Whether a projection's gradient takes a launch of its own: a tile's partial sums are read and
// written, 8 bytes for a channel and rank at the speed of the cache, about twice that of the memory
// that would give the tile once more. Where each tile is a group the sums are written in any case,
// but the cache must hold them.
inline bool sums_weights_apart(const AdapterParams& p, int64_t element) {
  constexpr int64_t kCached = 16 << 20;
  const int64_t partial_bytes = int64_t(p.groups) * p.channels * (p.rank + 1) * 4;
  return (p.tiles_of_group > 1 || partial_bytes > kCached) && 4 * p.rank > element * p.tiling.slots;
}

// Leaves no blocks where it cannot be.
inline void plan_projection_gradient(const AdapterSizes& sizes, bool of_up, int64_t multiprocessors,
                                     const AdapterParams& call, AdapterLaunch& launch) {
  using Block = AdapterWeightGradientBlock<Float32>;
  AdapterParams& p = launch.params = call;
  p.of_up = of_up;
  p.rank_rows = int32_t(round_up(p.rank, 16));
  p.tiling.warps_t = p.tiling.warps_k = p.tiling.row_tiles = 1;
  p.block_c = Block::kChannels;
  const int warps = p.tiling.warps_r * std::min(Block::kRowTiles, 8 / p.tiling.warps_r);
  const TokenTensor& rows = of_up ? p.grad_output : p.x;
  for (p.tiling.slots = 64; p.tiling.slots >= 16; p.tiling.slots /= 2) {
    p.at_weight = int32_t(sizes.tokens(rows, p));
    p.stage_bytes = int32_t(p.at_weight + sizes.tile(p.rank_rows, p.tiling.slots));
    for (p.stages = 3; p.stages > 1; --p.stages) {
      launch.shape.shared_bytes = int64_t(p.stages) * p.stage_bytes;
      if (launch.shape.shared_bytes > kMostShared) continue;
      const int64_t steps = p.batch * ceil_div(p.tokens, p.tiling.slots);
      if (steps > kMostBlocks) return;
      const int64_t blocks = ceil_div(p.channels, p.block_c);
      const int64_t groups = std::clamp<int64_t>(ceil_div(2 * multiprocessors, blocks), 1, steps);
      p.tiles_of_group = int32_t(ceil_div(steps, groups));
      p.groups = int32_t(ceil_div(steps, p.tiles_of_group));
      launch.shape.blocks = blocks * p.groups;
      launch.shape.threads = 32 * warps;
      return;
    }
  }
}

}  // namespace detail

inline AdapterForward plan_adapter_forward(const AdapterCall& call, int64_t multiprocessors) {
  AdapterForward plan;
  AdapterParams p;
  plan.refusal = detail::describe_adapter(call, false, multiprocessors, p);
  if (plan.refusal != nullptr) return plan;
  const detail::AdapterSizes sizes(call.storage);
  const int64_t tiles = call.batch * p.tiling.tiles;
  p.rank_rows = int32_t(detail::round_up(call.rank, 16));
  const int64_t rank_tile = sizes.tile(p.rank_rows, p.tiling.slots);
  const int64_t turned = std::max(rank_tile, detail::joined_sums(p));

  const bool narrow = detail::is_narrow(call, p);
  bool fits = true;
  if (narrow && detail::in_fragments(p.x)) {
    plan.narrow_down.params = p;
    detail::plan_narrow_down(multiprocessors, plan.narrow_down);
  } else {
    plan.down.params = p;
    fits &= detail::place_stages(plan.down.params, sizes.element, 0, turned, [&](AdapterParams& q) {
      q.at_weight = int32_t(sizes.tokens(q.x, q));
      return q.at_weight + sizes.tile(q.rank_rows, q.block_c);
    });
    plan.down.shape = detail::adapter_shape(plan.down.params, tiles, turned);
  }

  if (convolves_apart(call, false))
    p.convolved = detail::plan_correlation(call, false, plan.correlate);
  plan.narrow_up.params = p;
  const bool aligned = reinterpret_cast<uintptr_t>(call.up_bias) % 16 == 0;
  const auto serves = [&](const TokenTensor& t) {
    return detail::in_fragments(t) && detail::has_short_images(t, p);
  };
  if (narrow && aligned && serves(p.y) && serves(p.residual))
    detail::plan_narrow_up(call, multiprocessors, plan.narrow_up);
  if (plan.narrow_up.shape.blocks == 0) {
    AdapterParams& up = plan.up.params = p;
    // The grid's tokens of c are read from the first of them on.
    if (up.convolved)
      while (up.prefix % up.rank_vector != 0) up.rank_vector /= 2;
    int64_t convolution_end = rank_tile;
    if (!up.convolved) {
      convolution_end =
          detail::place_convolution(up, rank_tile, detail::kConvolutionBudget, up.rank);
      if (convolution_end == 0) {
        plan.refusal = detail::kWindowDoesNotFit;
        return plan;
      }
    }
    // With fewer tiles than multiprocessors, parts of the channels side by side: each convolves the
    // same tokens again.
    up.splits =
        int32_t(std::clamp<int64_t>(multiprocessors / tiles, 1, ceil_div(call.channels, 32)));
    fits &= detail::place_stages(up, sizes.element, convolution_end, 0, [&](AdapterParams& q) {
      q.at_weight = int32_t(sizes.tokens(q.y, q));
      return q.at_weight + sizes.tile(q.block_c, q.rank_rows);
    });
    plan.up.shape = detail::adapter_shape(up, tiles * up.splits, 0);
  }
  if (!fits || plan.narrow_up.shape.blocks > kMostBlocks) plan.refusal = detail::kStepDoesNotFit;
  return plan;
}

inline AdapterBackward plan_adapter_backward(const AdapterCall& call, int64_t multiprocessors) {
  AdapterBackward plan;
  AdapterParams p;
  plan.refusal = detail::describe_adapter(call, true, multiprocessors, p);
  if (plan.refusal != nullptr) return plan;
  const bool need_z = call.need_grad_x || call.need_down, need_c = need_z || call.need_conv;
  const detail::AdapterSizes sizes(call.storage);
  // One more for the row of ones.
  p.rank_rows = int32_t(detail::round_up(call.rank + 1, 16));
  const int64_t rank_tile = sizes.tile(p.rank_rows, p.tiling.slots);
  const int64_t turned =
      std::max<int64_t>(4 * call.rank * pitch_for<float>(p.tiling.slots), detail::joined_sums(p));
  bool fits = true;

  plan.up.params = plan.convolve.params = plan.down.params = p;
  if (detail::is_narrow(call, p) && (need_c || call.need_up) && detail::in_fragments(p.grad_output))
    detail::plan_narrow_up_backward(p, multiprocessors, plan.narrow_up.params,
                                    plan.narrow_up.shape);
  if (detail::is_narrow(call, p) && need_z && (!call.need_down || detail::in_fragments(p.x)) &&
      detail::in_fragments(p.residual) && detail::in_fragments(p.grad_x))
    detail::plan_narrow_down_backward(p, multiprocessors, plan.narrow_down.params,
                                      plan.narrow_down.shape);
  if (plan.narrow_up.shape.blocks == 0 && (need_c || call.need_up)) {
    AdapterParams& up = plan.up.params;
    detail::group_tiles(up, multiprocessors);
    fits &= detail::place_stages(up, sizes.element, rank_tile, turned, [&](AdapterParams& q) {
      q.at_weight = int32_t(sizes.tokens(q.grad_output, q));
      return q.at_weight + sizes.tile(q.block_c, q.rank_rows);
    });
    plan.up.shape = detail::adapter_shape(up, up.groups, turned);
    if (call.need_up && detail::sums_weights_apart(up, sizes.element))
      detail::plan_projection_gradient(sizes, true, multiprocessors, p, plan.up_weight);
  }
  if (need_z || call.need_conv)
    plan.refusal = detail::plan_convolve_backward(call, multiprocessors, need_z, plan);
  if (plan.narrow_down.shape.blocks == 0 && need_z) {
    AdapterParams& down = plan.down.params;
    detail::group_tiles(down, multiprocessors);
    if (call.need_down && detail::sums_weights_apart(down, sizes.element))
      detail::plan_projection_gradient(sizes, false, multiprocessors, p, plan.down_weight);
    const bool apart = plan.down_weight.shape.blocks > 0;
    fits &= detail::place_stages(down, sizes.element, rank_tile, 0, [&](AdapterParams& q) {
      q.at_weight = int32_t(call.need_down && !apart ? sizes.tokens(q.x, q) : 0);
      if (!call.need_grad_x) return int64_t(q.at_weight);
      q.at_added = int32_t(q.at_weight + sizes.tile(q.rank_rows, q.block_c));
      return q.at_added + sizes.tokens(q.grad_x, q);
    });
    if (call.need_grad_x || !apart) plan.down.shape = detail::adapter_shape(down, down.groups, 0);
  }
  if (plan.refusal == nullptr && !fits) plan.refusal = detail::kStepDoesNotFit;
  return plan;
}

// Groups of partial sums of the taps' gradients.
inline int64_t tap_groups(const AdapterBackward& plan) {
  if (plan.plane_taps.shape.blocks > 0) return plan.plane_taps.params.groups;
  return plan.taps.shape.blocks > 0 ? plan.taps.params.groups : plan.convolve.params.taps.groups;
}

// Adds one gradient to those that the last launch sums.
inline void add_adapter_sum(AdapterSums& sums, int64_t& blocks, AdapterSum sum) {
  sum.first_block = blocks;
  blocks += ceil_div(sum.channels * (int64_t(sum.full_h) * sum.full_w + 1), AdapterSums::kElements);
  sums.sums[sums.count++] = sum;
}

// Of a projection: all taps touch.
inline AdapterSum adapter_sum(const float* partials, int groups, int64_t rows, int64_t columns) {
  AdapterSum sum;
  sum.partials = partials;
  sum.groups = groups;
  sum.channels = int32_t(rows);
  sum.full_h = sum.kernel_h = 1;
  sum.full_w = sum.kernel_w = int32_t(columns);
  return sum;
}

template <class Taps>
AdapterSum adapter_sum(const float* partials, const Taps& taps, int64_t rank) {
  AdapterSum sum = adapter_sum(partials, taps.groups, rank, taps.full_w);
  sum.full_h = taps.full_h;
  sum.first_h = taps.first_h;
  sum.first_w = taps.first_w;
  sum.kernel_h = taps.kernel_h;
  sum.kernel_w = taps.kernel_w;
  return sum;
}

// One launch that fills the gradients (down weight, down bias, convolution's, up's; null where not
// asked for) from the partial sums.
inline LaunchShape plan_adapter_sums(const AdapterCall& call, AdapterBackward& plan,
                                     void* const (&grads)[6], AdapterSums& sums) {
  int64_t blocks = 0;
  const auto add = [&](AdapterSum sum, int i) {
    sum.weight = grads[i];
    sum.bias = grads[i + 1];
    add_adapter_sum(sums, blocks, sum);
  };
  const AdapterParams &down = plan.of_down(), &up = plan.of_up();
  if (call.need_down)
    add(adapter_sum(down.down_partials, down.groups, call.rank, call.channels), 0);
  if (plan.plane_taps.shape.blocks > 0)
    add(adapter_sum(plan.plane_taps.params.partials, plan.plane_taps.params, call.rank), 2);
  else if (plan.taps.shape.blocks > 0)
    add(adapter_sum(plan.taps.params.partials, plan.taps.params, call.rank), 2);
  else if (call.need_conv)
    add(adapter_sum(plan.convolve.params.conv_partials, plan.convolve.params.taps, call.rank), 2);
  if (call.need_up) add(adapter_sum(up.up_partials, up.groups, call.channels, call.rank), 4);
  constexpr int kThreads = AdapterSums::kElements * AdapterSums::kSlices;
  return {blocks, kThreads, kThreads * int64_t(sizeof(float))};
}

}  // namespace lka::cuda
