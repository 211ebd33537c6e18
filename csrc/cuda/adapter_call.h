// A call of the fused adapter and what all its launches share: how tokens are tiled and tensors
// accessed. Pure functions of sizes, strides and addresses, plain C++.
#pragma once

#include <cmath>

#include "depthwise_plan.h"
#include "device/adapter_params.cuh"
#include "device/stage_matrix.cuh"

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

constexpr int64_t kMostAdapterRank = 256;

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

// Elements of the widest vector by which address, strides and the length of a row divide: a vector
// beyond the end of the last row could leave the memory.
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
  if (!turned && (c == 1 || p.channels == 1))
    t.vector = widest(element, t.data, {b, tokens, p.channels});
  if (turned && (tokens == 1 || p.tokens == 1)) {
    t.vector = widest(element, t.data, {b, c, p.tokens});
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
  if (tensor != nullptr) map.data = static_cast<char*>(tensor) + call.prefix * element;
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

}  // namespace detail

}  // namespace lka::cuda
