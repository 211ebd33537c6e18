// What the launches of the fused adapter look like: pure functions of sizes, strides and addresses,
// plain C++ that also runs where there is no GPU.
#pragma once

#include <cmath>

#include "depthwise_plan.h"
#include "device/adapter_backward.cuh"
#include "device/adapter_convolve_backward.cuh"
#include "device/adapter_forward.cuh"
#include "device/adapter_sums.cuh"
#include "device/adapter_weight_gradient.cuh"

namespace lka::cuda {

// A call of either operator. Tensors that it has not are null; of TokenTensor, data and strides.
struct AdapterCall {
  Storage storage = Storage::float32;
  Activation activation = Activation::none;
  PrefixMode prefix_mode = PrefixMode::center_tap;
  bool activate_before = false, activate_behind = false;
  bool need_grad_x = false, need_down = false, need_conv = false, need_up = false;
  bool residual_is_x = false;
  int64_t batch = 0, tokens = 0, channels = 0, rank = 0;
  int64_t prefix = 0, height = 0, width = 0;
  int64_t kernel_h = 0, kernel_w = 0, dilation = 1;
  double dropout_p = 0, scale = 1;
  const int64_t* seed = nullptr;
  const void *down_weight = nullptr, *down_bias = nullptr;
  const void *conv_weight = nullptr, *conv_bias = nullptr;
  const void *up_weight = nullptr, *up_bias = nullptr;
  TokenTensor x, y, residual, grad_output, grad_x;
  void *z = nullptr, *a = nullptr, *c = nullptr, *grad_c = nullptr, *grad_z = nullptr;
};

// One launch; without blocks where nothing is needed.
template <class Params>
struct LaunchOf {
  Params params;
  LaunchShape shape;
};
using AdapterLaunch = LaunchOf<AdapterParams>;

// In the order of the launches.
struct AdapterForward {
  const char* refusal = nullptr;
  AdapterLaunch down;
  LaunchOf<CorrelateParams> correlate;
  AdapterLaunch up;
};

struct AdapterBackward {
  const char* refusal = nullptr;
  AdapterLaunch up, up_weight;
  LaunchOf<CorrelateParams> correlate;
  AdapterLaunch convolve;
  LaunchOf<WeightGradientParams> taps;
  AdapterLaunch down, down_weight;

  // The launches that leave partial sums of the projections' gradients.
  AdapterParams& of_up() { return up_weight.shape.blocks > 0 ? up_weight.params : up.params; }
  AdapterParams& of_down() {
    return down_weight.shape.blocks > 0 ? down_weight.params : down.params;
  }
};

constexpr int64_t kMostAdapterRank = 256;

// Whether the grid is worth a launch of its own for the tensor cores. About 1.7 instructions a tap,
// channel and token, of the 128 of a clock, hide behind the 4 or 6 bytes that a token's channel
// takes of the 13 that memory gives: up to some 24 taps a channel if all overlaps, which it does
// not; a launch costs little beside what half of them take.
inline bool convolves_apart(const AdapterCall& call) {
  const auto taps = [&](int64_t size, int64_t kernel) {
    return taps_that_touch(size, size, kernel, call.dilation * (kernel - 1) / 2, call.dilation)
        .count;
  };
  return call.storage != Storage::float32 &&
         call.rank * taps(call.height, call.kernel_h) * taps(call.width, call.kernel_w) >
             12 * call.channels;
}

// The same of the taps' gradients, to which prefix tokens must not belong.
inline bool sums_taps_apart(const AdapterCall& call) {
  return call.need_conv && convolves_apart(call) &&
         (call.prefix == 0 || call.prefix_mode != PrefixMode::center_tap);
}

namespace detail {

inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

struct AdapterSizes {
  int64_t element;  // bytes

  explicit AdapterSizes(Storage storage) : element(storage == Storage::float32 ? 4 : 2) {}

  // Bytes of a tile in shared memory.
  int64_t tile(int64_t rows, int64_t columns) const {
    return element * rows *
           (element == 4 ? pitch_for<float>(int(columns)) : pitch_for<uint16_t>(int(columns)));
  }
  int64_t tokens(const TokenTensor& tensor, const AdapterParams& p) const {
    return tensor.turned ? tile(p.block_c, p.tiling.slots) : tile(p.tiling.slots, p.block_c);
  }
};

inline AdapterTiling tiling_with(int64_t slots, int64_t prefix, int64_t height, int64_t width,
                                 bool prefix_apart) {
  AdapterTiling t;
  t.slots = int32_t(slots);
  int64_t rows = 1, columns = width;
  if (width <= slots) {
    const bool room = !prefix_apart && prefix + width <= slots;
    rows = (room ? slots - prefix : slots) / width;
    rows = ceil_div(height, ceil_div(height, rows));  // of about the same height
  } else {
    columns = round_up(ceil_div(width, ceil_div(width, slots)), 8);
  }
  t.rows = int32_t(rows);
  t.columns = int32_t(columns);
  t.x_tiles = int32_t(ceil_div(width, columns));
  t.prefix_in_first = prefix > 0 && !prefix_apart && prefix + rows * columns <= slots;
  if (!t.prefix_in_first) t.prefix_tiles = int32_t(ceil_div(prefix, slots));
  t.tiles = int32_t(t.prefix_tiles + ceil_div(height, rows) * t.x_tiles);
  return t;
}

// A warp has 32 channels of the rank and up to 32 tokens; a block has four warps, or eight for the
// largest ranks. Tiles are smaller where there would be few: 128 tokens for two blocks on every
// multiprocessor, fewer than 64 only so that hardly any multiprocessor is idle. Warps that have no
// tokens of their own take a share of the terms.
inline AdapterTiling adapter_tiling(const AdapterCall& call, bool prefix_apart,
                                    int64_t multiprocessors) {
  const int warps_r = call.rank <= 32 ? 1 : call.rank <= 64 ? 2 : call.rank <= 128 ? 4 : 8;
  const int warps = std::max(4, warps_r);
  for (int slots = 32 * warps / warps_r;; slots /= 2) {
    AdapterTiling t = tiling_with(slots, call.prefix, call.height, call.width, prefix_apart);
    t.warps_r = warps_r;
    t.row_tiles = slots >= 16 * 2 * warps / warps_r ? 2 : 1;
    t.warps_t = slots / (16 * t.row_tiles);
    t.warps_k = warps / (warps_r * t.warps_t);
    const int64_t wanted = slots > 64 ? 2 * multiprocessors : multiprocessors * 3 / 4;
    if (slots == 16 || call.batch * t.tiles >= wanted) return t;
  }
}

// Whether the first token of every tile of an image is at a multiple of `vector`.
inline bool tiles_begin_at_multiples(const AdapterParams& p, int64_t vector) {
  const AdapterTiling& t = p.tiling;
  if (t.tiles == 1) return true;
  if (p.prefix % vector != 0 || int64_t(t.rows) * p.width % vector != 0) return false;
  return t.x_tiles == 1 || t.columns % vector == 0;
}

inline int32_t widest(int64_t element, const void* data, std::initializer_list<int64_t> strides) {
  int64_t vector = 16 / element;
  const auto divides = [&] {
    if (reinterpret_cast<uintptr_t>(data) % (element * vector) != 0) return false;
    return std::all_of(strides.begin(), strides.end(),
                       [&](int64_t stride) { return stride % vector == 0; });
  };
  while (vector > 1 && !divides()) vector /= 2;
  return int32_t(vector);
}

// How a tensor is accessed, channel by channel or token by token, whichever are neighbours.
inline TokenTensor token_access(TokenTensor t, const AdapterParams& p, int64_t element,
                                bool turned) {
  t.turned = turned;
  t.vector = 1;
  // A dimension of one element is never stepped along.
  const int64_t b = p.batch > 1 ? t.stride_b : 0;
  const int64_t tokens = p.tokens > 1 ? t.stride_t : 0, c = p.channels > 1 ? t.stride_c : 0;
  if (!turned && (c == 1 || p.channels == 1)) t.vector = widest(element, t.data, {b, tokens});
  if (turned && (tokens == 1 || p.tokens == 1)) {
    t.vector = widest(element, t.data, {b, c});
    while (!tiles_begin_at_multiples(p, t.vector)) t.vector /= 2;
  }
  return t;
}

inline bool tokens_are_neighbours(const TokenTensor& t) {
  return t.stride_c != 1 && t.stride_t == 1;
}

// The grid of a rank-r tensor.
inline MapView rank_map(const AdapterCall& call, void* tensor) {
  const int64_t element = AdapterSizes(call.storage).element;
  MapView map;
  map.data = static_cast<char*>(tensor) + call.prefix * element;
  map.height = call.height;
  map.width = call.width;
  map.stride_b = call.rank * call.tokens;
  map.stride_c = call.tokens;
  map.stride_h = call.width;
  map.stride_w = 1;
  return map;
}

// The convolution of a as one of maps, c being its output.
inline ConvParams adapter_convolution(const AdapterCall& call, void* input, void* output) {
  ConvParams p;
  p.storage = call.storage;
  p.batch = call.batch;
  p.channels = call.rank;
  p.input = rank_map(call, input);
  p.output = rank_map(call, output);
  p.kernel_h = call.kernel_h;
  p.kernel_w = call.kernel_w;
  p.dilation_h = p.dilation_w = call.dilation;
  p.pad_top = call.dilation * (call.kernel_h - 1) / 2;
  p.pad_left = call.dilation * (call.kernel_w - 1) / 2;
  return p;
}

inline Correlation adapter_correlation(const AdapterCall& call, bool backward) {
  return correlation_of(backward ? adapter_convolution(call, call.grad_z, call.grad_c)
                                 : adapter_convolution(call, call.a, call.c),
                        backward);
}

// What all launches of a call share; returns why there can be none.
inline const char* describe_adapter(const AdapterCall& call, bool backward, int64_t multiprocessors,
                                    AdapterParams& p) {
  if (call.storage == Storage::float64) return "it serves float32, bfloat16 and float16";
  if (call.rank > kMostAdapterRank) return "it serves a rank of at most 256";
  if (const char* why =
          too_large({call.batch, call.tokens, call.channels, call.dilation * call.kernel_h,
                     call.dilation * call.kernel_w, call.kernel_h * call.kernel_w}))
    return why;
  const int64_t element = AdapterSizes(call.storage).element;
  p.batch = int32_t(call.batch);
  p.tokens = int32_t(call.tokens);
  p.channels = int32_t(call.channels);
  p.rank = int32_t(call.rank);
  p.prefix = int32_t(call.prefix);
  p.height = int32_t(call.height);
  p.width = int32_t(call.width);
  p.prefix_mode = call.prefix_mode;
  const int64_t top = call.dilation * (call.kernel_h - 1) / 2;
  const int64_t left = call.dilation * (call.kernel_w - 1) / 2;
  // With an even kernel and a dilation the padding may fall between two taps: see
  // center_tap_index of the specification.
  if (call.prefix > 0 && call.prefix_mode == PrefixMode::center_tap && top % call.dilation == 0 &&
      left % call.dilation == 0)
    p.center = int32_t(top / call.dilation * call.kernel_w + left / call.dilation);
  p.before = call.activate_before ? call.activation : Activation::none;
  p.behind = call.activate_behind ? call.activation : Activation::none;
  p.scale = float(call.scale);
  if (call.seed != nullptr && call.dropout_p > 0) {
    p.dropout.seed = call.seed;
    p.dropout.threshold =
        uint64_t(std::min(std::floor(call.dropout_p * 4294967296.0), 4294967296.0));
    p.dropout.keep_factor = call.dropout_p >= 1 ? 0.0f : float(1 / (1 - call.dropout_p));
  }
  p.down_weight = call.down_weight;
  p.down_bias = call.down_bias;
  p.conv_weight = call.conv_weight;
  p.conv_bias = call.conv_bias;
  p.up_weight = call.up_weight;
  p.up_bias = call.up_bias;
  p.down_vector = widest(element, call.down_weight, {call.channels});
  p.up_vector = widest(element, call.up_weight, {call.rank});
  const bool prefix_apart = backward && call.prefix_mode == PrefixMode::zero;
  p.tiling = adapter_tiling(call, prefix_apart, multiprocessors);
  if (call.batch * p.tiling.tiles > kMostBlocks / 2) return "more than 2^31 blocks";

  p.x = token_access(call.x, p, element, tokens_are_neighbours(call.x));
  const TokenTensor& result = backward ? call.grad_x : call.y;
  const bool turned = tokens_are_neighbours(result);
  (backward ? p.grad_x : p.y) = token_access(result, p, element, turned);
  if (!backward)
    p.residual = token_access(call.residual, p, element, turned);
  else if (call.residual_is_x && call.need_grad_x)
    p.residual = token_access(call.grad_output, p, element, turned);
  p.grad_output =
      token_access(call.grad_output, p, element, tokens_are_neighbours(call.grad_output));
  p.z = call.z;
  p.a = call.a;
  p.c = call.c;
  p.grad_c = call.grad_c;
  p.grad_z = call.grad_z;
  const auto vector = [&](const void* data) { return widest(element, data, {call.tokens}); };
  p.rank_vector = std::min(
      {vector(call.z), vector(call.a), vector(call.c), vector(call.grad_c), vector(call.grad_z)});
  while (!tiles_begin_at_multiples(p, p.rank_vector)) p.rank_vector /= 2;

  describe(adapter_correlation(call, backward), p.convolution);
  return nullptr;
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
    return 4 * (rows(kernel_rows) * k.pitch + kernel_rows * taps);
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
  return p.at_taps + 4 * int64_t(k.staged_channels) * kernel_rows * taps;
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

constexpr int64_t kConvolutionBudget = 24 * 1024;

// Blocks of the taps' gradient; 0 where its pieces do not fit shared memory.
inline int64_t plan_tap_gradient(const AdapterCall& call, int64_t multiprocessors, AdapterParams& p,
                                 int64_t& shared_bytes) {
  using Block = AdapterTapGradientBlock<Float32>;
  AdapterTapGradient& t = p.taps;
  describe(adapter_convolution(call, call.z, call.grad_c), t);
  const int64_t chunks = ceil_div(t.kernel_w, Block::kTaps);
  int64_t tap_chunks = std::min<int64_t>(chunks, 16);
  int64_t tap_rows = std::min<int64_t>(t.kernel_h, Block::kThreads / tap_chunks);
  int64_t columns = call.width <= 128 ? call.width : 128;
  int64_t rows = std::min(call.height, std::max<int64_t>(1, 1024 / columns));
  const auto fits = [&] {
    const int64_t taps = std::min<int64_t>(Block::kTaps * tap_chunks, t.kernel_w);
    t.source_pitch = pitch_for<float>(
        int(round_up(columns, 4) +
            (t.dilation_w == 1 ? Block::kTaps * tap_chunks : (taps - 1) * t.dilation_w)));
    t.grad_pitch = int32_t(round_up(columns, 4));
    t.staged_rows = int32_t(std::min(call.height, rows + (tap_rows - 1) * t.dilation_h));
    shared_bytes =
        std::max<int64_t>(4 * (int64_t(t.staged_rows) * t.source_pitch + rows * t.grad_pitch),
                          4 * Block::kThreads * Block::kSums);
    return shared_bytes <= kConvolutionBudget;
  };
  while (!fits()) {
    if (rows > 1)
      rows = ceil_div(rows, 2);
    else if (tap_rows > 1)
      tap_rows = ceil_div(tap_rows, 2);
    else if (tap_chunks > 1)
      tap_chunks = ceil_div(tap_chunks, 2);
    else if (columns > 16)
      columns = round_up(columns / 2, 4);
    else if (shared_bytes > kMostShared)
      return 0;
    else
      break;
  }
  t.tiles_h = int32_t(ceil_div(t.kernel_h, tap_rows));
  t.tiles_w = int32_t(ceil_div(chunks, tap_chunks));
  t.tap_rows = int32_t(tap_rows);
  t.tap_chunks = int32_t(tap_chunks);
  t.rows = int32_t(rows);
  t.columns = int32_t(columns);
  t.y_pieces = int32_t(ceil_div(call.height, rows));
  t.x_pieces = int32_t(ceil_div(call.width, columns));
  const int64_t pieces = call.batch * t.y_pieces * t.x_pieces;
  const int64_t blocks = call.rank * t.tiles_h * t.tiles_w;
  const int64_t groups = std::clamp<int64_t>(ceil_div(8 * multiprocessors, blocks), 1, pieces);
  t.pieces_of_group = ceil_div(pieces, groups);
  t.groups = int32_t(ceil_div(pieces, t.pieces_of_group));
  return blocks * t.groups;
}

// The gradients of a, or of z, and of the taps.
inline const char* plan_convolve_backward(const AdapterCall& call, int64_t multiprocessors,
                                          bool need_z, AdapterBackward& plan) {
  AdapterParams& p = plan.convolve.params;
  LaunchShape& shape = plan.convolve.shape;
  shape.threads = AdapterTapGradientBlock<Float32>::kThreads;
  if (need_z && convolves_apart(call)) {
    const Plan correlate = plan_correlate(adapter_correlation(call, true), plan.correlate.params);
    if (correlate.refusal == nullptr) {
      p.convolved = true;
      plan.correlate.params.weight = call.conv_weight;
      plan.correlate.shape = correlate.shape;
    }
  }
  // The gradients of the taps need a, which is z or is left by the blocks of grad_z.
  if (sums_taps_apart(call) && (p.before == Activation::none || p.convolved)) {
    void* const a = p.before == Activation::none ? call.z : call.a;
    const Plan taps = plan_weight_gradient(adapter_convolution(call, a, call.grad_c),
                                           int(multiprocessors), plan.taps.params);
    if (taps.refusal == nullptr) plan.taps.shape = taps.shape;
  }
  if (plan.taps.shape.blocks == 0) p.a = nullptr;
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
  if (call.need_conv && plan.taps.shape.blocks == 0) {
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
// that would give the tile once more.
inline bool sums_weights_apart(const AdapterParams& p, int64_t element) {
  return p.tiles_of_group > 1 && 4 * p.rank > element * p.tiling.slots;
}

// Leaves no blocks where it cannot be.
inline void plan_weight_gradient(const AdapterSizes& sizes, bool of_up, int64_t multiprocessors,
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

  plan.down.params = p;
  const bool down_fits =
      detail::place_stages(plan.down.params, sizes.element, 0, turned, [&](AdapterParams& q) {
        q.at_weight = int32_t(sizes.tokens(q.x, q));
        return q.at_weight + sizes.tile(q.rank_rows, q.block_c);
      });
  plan.down.shape = detail::adapter_shape(plan.down.params, tiles, turned);

  AdapterParams& up = plan.up.params = p;
  if (convolves_apart(call)) {
    const Plan correlate =
        plan_correlate(detail::adapter_correlation(call, false), plan.correlate.params);
    if (correlate.refusal == nullptr) {
      up.convolved = true;
      plan.correlate.params.weight = call.conv_weight;
      plan.correlate.params.bias = call.conv_bias;
      plan.correlate.shape = correlate.shape;
    }
  }
  int64_t convolution_end = rank_tile;
  if (!up.convolved) {
    convolution_end = detail::place_convolution(up, rank_tile, detail::kConvolutionBudget, up.rank);
    if (convolution_end == 0) {
      plan.refusal = detail::kWindowDoesNotFit;
      return plan;
    }
  }
  // With fewer tiles than multiprocessors, parts of the channels side by side: each convolves the
  // same tokens again.
  up.splits = int32_t(std::clamp<int64_t>(multiprocessors / tiles, 1, ceil_div(call.channels, 32)));
  const bool up_fits =
      detail::place_stages(up, sizes.element, convolution_end, 0, [&](AdapterParams& q) {
        q.at_weight = int32_t(sizes.tokens(q.y, q));
        return q.at_weight + sizes.tile(q.block_c, q.rank_rows);
      });
  plan.up.shape = detail::adapter_shape(up, tiles * up.splits, 0);
  if (!down_fits || !up_fits) plan.refusal = detail::kStepDoesNotFit;
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
  if (need_c || call.need_up) {
    AdapterParams& up = plan.up.params;
    detail::group_tiles(up, multiprocessors);
    fits &= detail::place_stages(up, sizes.element, rank_tile, turned, [&](AdapterParams& q) {
      q.at_weight = int32_t(sizes.tokens(q.grad_output, q));
      return q.at_weight + sizes.tile(q.block_c, q.rank_rows);
    });
    plan.up.shape = detail::adapter_shape(up, up.groups, turned);
    if (call.need_up && detail::sums_weights_apart(up, sizes.element))
      detail::plan_weight_gradient(sizes, true, multiprocessors, p, plan.up_weight);
  }
  if (need_z || call.need_conv)
    plan.refusal = detail::plan_convolve_backward(call, multiprocessors, need_z, plan);
  if (need_z) {
    AdapterParams& down = plan.down.params;
    detail::group_tiles(down, multiprocessors);
    if (call.need_down && detail::sums_weights_apart(down, sizes.element))
      detail::plan_weight_gradient(sizes, false, multiprocessors, p, plan.down_weight);
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
  if (plan.taps.shape.blocks > 0)
    add(adapter_sum(plan.taps.params.partials, plan.taps.params, call.rank), 2);
  else if (call.need_conv)
    add(adapter_sum(plan.convolve.params.conv_partials, plan.convolve.params.taps, call.rank), 2);
  if (call.need_up) add(adapter_sum(up.up_partials, up.groups, call.channels, call.rank), 4);
  return {blocks, AdapterSums::kElements * AdapterSums::kSlices, 0};
}

}  // namespace lka::cuda
