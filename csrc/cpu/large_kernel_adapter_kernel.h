// The fused adapter for one instruction set. A thread takes whole images: the rank-r tensors of an
// image stay in its cache between the three steps, and x and y are each touched once. Or the steps
// around the convolution alone, where that is left to the depthwise kernels.
#pragma once

#include "activation.h"
#include "adapter_params.h"
#include "correlate.h"
#include "depthwise_conv2d_kernel.h"
#include "pack.h"
#include "philox.h"
#include "projection.h"
#include "storage_dispatch.h"

namespace {

using lka::PrefixMode;
using lka::cpu::AdapterGradients;
using lka::cpu::AdapterParams;

// Hands out pieces of the thread's scratch memory, each on a cache line of its own.
template <class T>
class Arena {
 public:
  explicit Arena(void* data) : next_(static_cast<T*>(data)) {}
  T* take(int64_t count) {
    T* piece = next_;
    next_ += round_up(count, 64 / sizeof(T));
    return piece;
  }

 private:
  T* next_;
};

// Tokens (count, dim) of storage S as T: in place if they are T already.
template <class T, int V, class S>
const T* widen(const S* from, int64_t count, T* tile) {
  if constexpr (sizeof(S) == sizeof(T)) {
    (void)count, (void)tile;
    return reinterpret_cast<const T*>(from);
  } else {
    for (int64_t i = 0; i < count; i += V) {
      load_ahead(from + i);
      const int some = count - i < V ? int(count - i) : V;
      store_some<T, V, T>(tile + i, load_some<T, V, S>(from + i, some), some);
    }
    return tile;
  }
}

// Tokens that a projection takes before the next group of ranks, or that both products with
// grad_output take in turn: some 160 KiB of float, or 12, in the second-level cache beside the
// weights. The tiles of a whole image are equal, as each loads and stores all sums of a gradient.
inline int64_t tokens_in_tile(const AdapterParams& p) {
  const int64_t fit = 40 * 1024 / p.dim / kTokensIn * kTokensIn;
  const int64_t most = fit < 12 ? 12 : fit > 96 ? 96 : fit;
  const int64_t tiles = (p.tokens + most - 1) / most;
  return round_up((p.tokens + tiles - 1) / tiles, kTokensIn);
}

inline Lanes rank_lanes(const AdapterParams& p, int64_t block, int64_t token_stride) {
  Lanes lanes;
  lanes.offset[0] = block * p.lanes;
  const int64_t left = p.rank - block * p.lanes;
  lanes.count = left < p.lanes ? int(left) : int(p.lanes);
  lanes.adjacent = true;
  lanes.stride_w = token_stride;
  lanes.stride_h = p.width * token_stride;
  return lanes;
}

inline Axis rank_axis(int64_t out, int64_t taps, int64_t out_step, int64_t tap_step, int64_t pad,
                      int64_t live) {
  return Axis{out, taps, out_step, tap_step, 0, pad, pad + live};
}

inline SourceBuffer grid_buffer(const AdapterParams& p) {
  return {p.buffer_columns, 1, p.height, p.buffer_rows};
}

// One block of the bottleneck: the grid part of `tokens` (stride elements apart) into `rows`, with
// `pad_top` rows of zeros above and `pad_left` columns of zeros to the left.
template <class T, int V>
void load_grid(const AdapterParams& p, const T* tokens, int64_t stride, int64_t block,
               int64_t pad_top, int64_t pad_left, SourceRows<T, V>& rows) {
  MapView map;
  map.data = const_cast<T*>(tokens + p.num_prefix_tokens * stride);
  map.height = p.height;
  map.width = p.width;
  const Lanes lanes = rank_lanes(p, block, stride);
  map.stride_h = lanes.stride_h;
  map.stride_w = lanes.stride_w;
  rows.begin(map, lanes, lanes.count, -pad_top, -pad_left, map.height);
  rows.template fill_until<T>(p.buffer_rows);
}

// Whether a kernel with this padding meets every grid element from every position (one dimension).
inline bool covers_grid(int64_t kernel, int64_t pad, int64_t dilation, int64_t grid) {
  return dilation == 1 && pad >= grid - 1 && kernel - pad >= grid;
}

// One block of the bottleneck: the grid part of `tokens` (stride elements apart) convolved with
// kernel [kernel_h·kernel_w][V], into `out`, which may be where the tokens stand: they are copied
// first, into `rows` or, if the kernel covers the grid, into the memory `dense`.
template <class T, int V>
void convolve_grid(const AdapterParams& p, const T* tokens, int64_t stride, int64_t block,
                   int64_t pad_top, int64_t pad_left, const T* kernel, const T* bias,
                   SourceRows<T, V>& rows, T* dense, T* out, int64_t out_column) {
  Correlation<T, V> k;
  k.bias = bias;
  k.accumulate = false;
  if (dense != nullptr) {
    // As in dense_conv2d_kernel.h: the grid are the taps, the kernel is the source.
    const T** kernel_rows = reinterpret_cast<const T**>(dense);
    for (int64_t m = 0; m < p.kernel_h; ++m) kernel_rows[m] = kernel + m * p.kernel_w * V;
    T* grid =
        dense + round_up(p.kernel_h * int64_t(sizeof(void*)) / int64_t(sizeof(T)), 64 / sizeof(T));
    pack_rows<T, V, T>(tokens + p.num_prefix_tokens * stride, rank_lanes(p, block, stride), 0,
                       p.height, p.width, grid, p.width * V);
    k.source_rows = kernel_rows;
    k.weight = grid;
    k.weight_row = p.width * V;
    k.weight_column = V;
    k.y = Axis{p.height, p.height, 1, 1, pad_top - (p.height - 1), 0, p.kernel_h};
    k.x = Axis{p.width, p.width, 1, 1, pad_left - (p.width - 1), 0, p.kernel_w};
    k.out = out + (p.height * p.width - 1) * out_column;
    k.out_column = -out_column;
  } else {
    load_grid<T, V>(p, tokens, stride, block, pad_top, pad_left, rows);
    k.source_rows = rows.table();
    k.weight = kernel;
    k.weight_row = p.kernel_w * V;
    k.weight_column = V;
    k.y = rank_axis(p.height, p.kernel_h, 1, p.dilation, pad_top, p.height);
    k.x = rank_axis(p.width, p.kernel_w, 1, p.dilation, pad_left, p.width);
    k.out = out;
    k.out_column = out_column;
  }
  k.out_row = p.width * k.out_column;
  correlate(k);
}

// Memory for convolve_grid's dense form: of the grid, and pointers to the rows of the kernel.
template <class T, int V>
int64_t dense_elements(const AdapterParams& p) {
  return p.height * p.width * V + p.kernel_h * int64_t(sizeof(void*)) / int64_t(sizeof(T)) + 2 * 64;
}

template <class T, int V>
T* take_dense(const AdapterParams& p, int64_t pad_top, int64_t pad_left, Arena<T>& arena) {
  T* memory = arena.take(dense_elements<T, V>(p));
  const bool dense = covers_grid(p.kernel_h, pad_top, p.dilation, p.height) &&
                     covers_grid(p.kernel_w, pad_left, p.dilation, p.width);
  return dense ? memory : nullptr;
}

// The tap that a 1×1 image meets under "same" padding; -1 if the padding falls between two taps.
inline int64_t center_tap(const AdapterParams& p) {
  if (p.pad_top % p.dilation || p.pad_left % p.dilation) return -1;
  return p.pad_top / p.dilation * p.kernel_w + p.pad_left / p.dilation;
}

// The weight of that tap, from packed weights that may be flipped.
template <class T, int V>
T center_weight(const AdapterParams& p, const T* conv, bool flipped, int64_t k) {
  const int64_t taps = p.kernel_h * p.kernel_w, tap = center_tap(p);
  if (tap < 0) return T(0);
  return conv[(k / V * taps + (flipped ? taps - 1 - tap : tap)) * V + k % V];
}

// z = x·down + bias for tokens [begin, end) of an image.
template <class T, int V, class S>
void adapter_down(const AdapterParams& p, int64_t image, int64_t begin, int64_t end, T* tile) {
  const int64_t step = tokens_in_tile(p);
  for (int64_t t = begin; t < end; t += step) {
    const int64_t tokens = end - t < step ? end - t : step;
    const int64_t row = image * p.tokens + t;
    const T* x = widen<T, V, S>(static_cast<const S*>(p.x) + row * p.dim, tokens * p.dim, tile);
    project_in<T, V>(x, tokens, p.dim, static_cast<const T*>(p.down), p.dim_padded,
                     static_cast<const T*>(p.down_bias), p.rank,
                     static_cast<T*>(p.z) + row * p.rank, p.rank);
  }
}

// c = conv(act(z)) for one image.
template <class T, int V, int kWide>
void adapter_convolve(const AdapterParams& p, int64_t image, T* scratch) {
  Arena<T> arena(scratch);
  T* a = arena.take(p.tokens * p.rank);
  SourceRows<T, V> rows(grid_buffer(p), arena.take(grid_buffer(p).elements(V, sizeof(T))));
  T* result = arena.take(p.height * p.width * V);
  T* dense = take_dense<T, V>(p, p.pad_top, p.pad_left, arena);
  const T* z = static_cast<const T*>(p.z) + image * p.tokens * p.rank;
  T* c = static_cast<T*>(p.c) + image * p.tokens * p.rank;
  if (p.activate_before)
    map_activation<T, kWide>(p.activation, z, static_cast<const T*>(nullptr), a,
                             static_cast<T*>(nullptr), p.tokens * p.rank);
  else
    memcpy(a, z, p.tokens * p.rank * sizeof(T));

  const int64_t taps = p.kernel_h * p.kernel_w;
  T* grid = c + p.num_prefix_tokens * p.rank;
  for (int64_t block = 0; block < p.rank_blocks; ++block) {
    const Lanes lanes = rank_lanes(p, block, p.rank);
    const bool direct = lanes.count == V;
    convolve_grid<T, V>(p, a, p.rank, block, p.pad_top, p.pad_left,
                        static_cast<const T*>(p.conv) + block * taps * V,
                        static_cast<const T*>(p.conv_bias) + block * V, rows, dense,
                        direct ? grid + block * V : result, direct ? p.rank : V);
    if (!direct) unpack_rows<T, V, T>(result, lanes, 0, p.height, p.width, grid);
  }
  for (int64_t t = 0; t < p.num_prefix_tokens; ++t)
    for (int64_t k = 0; k < p.rank; ++k) {
      const T value = a[t * p.rank + k];
      c[t * p.rank + k] =
          p.prefix_mode == PrefixMode::center_tap
              ? value * center_weight<T, V>(p, static_cast<const T*>(p.conv), false, k) +
                    static_cast<const T*>(p.conv_bias)[k]
              : value;
    }
}

// dropout(act(c)) for tokens [begin, begin + tokens) of an image: c itself where that is all.
// `factor` receives the dropout factors, `e` the result.
template <class T, int kWide>
const T* adapter_bottleneck_output(const AdapterParams& p, int64_t image, int64_t begin,
                                   int64_t tokens, T* factor, T* e) {
  const int64_t first = (image * p.tokens + begin) * p.rank, count = tokens * p.rank;
  const T* c = static_cast<const T*>(p.c) + first;
  if (!p.activate_after && !p.dropout) return c;
  if (p.dropout)
    dropout_factors<T>(p.seed, p.drop_threshold, T(p.keep_factor), first, count, factor);
  map_activation<T, kWide>(p.activate_after ? p.activation : Activation::none, c,
                           p.dropout ? factor : nullptr, e, static_cast<T*>(nullptr), count);
  return e;
}

// y = residual + scale·(dropout(act(c))·up + bias) for tokens [begin, end) of an image.
template <class T, int kWide, class S>
void adapter_up(const AdapterParams& p, int64_t image, int64_t begin, int64_t end, T* scratch) {
  constexpr int64_t kStep = 64;
  Arena<T> arena(scratch);
  T* factor = arena.take(kStep * p.rank);
  T* e = arena.take(kStep * p.rank);
  for (int64_t t = begin; t < end; t += kStep) {
    int64_t tokens = end - t < kStep ? end - t : kStep;
    const int64_t row = image * p.tokens + t;
    S* y = static_cast<S*>(p.y) + row * p.dim;
    const S* residual = p.residual ? static_cast<const S*>(p.residual) + row * p.dim : nullptr;
    const T* from = adapter_bottleneck_output<T, kWide>(p, image, t, tokens, factor, e);
    if (p.prefix_mode == PrefixMode::zero && t < p.num_prefix_tokens) {
      const int64_t left = p.num_prefix_tokens - t;
      const int64_t prefix = left < tokens ? left : tokens;
      if (residual)
        memcpy(y, residual, prefix * p.dim * sizeof(S));
      else
        memset(static_cast<void*>(y), 0, prefix * p.dim * sizeof(S));
      from += prefix * p.rank;
      y += prefix * p.dim;
      if (residual) residual += prefix * p.dim;
      tokens -= prefix;
    }
    project_out<T, kWide, S>(from, p.rank, tokens, p.rank, p.dim, static_cast<const T*>(p.up),
                             p.dim_padded, static_cast<const T*>(p.up_bias), residual, y);
  }
}

// Where the weight gradients of a part of the batch are summed.
template <class T, int V>
struct PartSums {
  PartSums(const AdapterParams& p, const AdapterGradients& g, int64_t part)
      : down(static_cast<T*>(g.parts) + part * g.part_elements),
        up(down + p.rank_rows * p.dim_padded),
        up_bias(up + p.rank_rows * p.dim_padded),
        down_bias(up_bias + p.dim_padded),
        conv(down_bias + p.rank_padded),
        conv_bias(conv + p.rank_blocks * p.kernel_h * p.kernel_w * V) {}
  T *down, *up, *up_bias, *down_bias, *conv, *conv_bias;
};

// Gradients of one part of the batch, image after image: [part_begin, part_end) of the parts.
template <class T, int V, int kWide, class S>
void adapter_backward_parts(const AdapterParams& p, const AdapterGradients& g, int64_t part_begin,
                            int64_t part_end, T* scratch) {
  const int64_t taps = p.kernel_h * p.kernel_w, padded = p.rank_padded;
  const int64_t per_image = p.tokens * padded;
  // Then the bottleneck's tensors are read as they are, without zeros between the tokens.
  const bool whole = padded == p.rank && p.rank % kRankGroup == 0;
  Arena<T> arena(scratch);
  T* tile = arena.take(tokens_in_tile(p) * p.dim);
  T* dense = arena.take(p.tokens * p.rank);   // a, or dropout(act(c)), rank apart
  T* factor = arena.take(p.tokens * p.rank);  // dropout factors
  T* wide = arena.take(per_image);            // dropout(act(c)), padded
  T* grad = arena.take(per_image);            // de, then dc, then da, then dz; padded
  // Even kernels pad more on one side, so what is padding to one pass holds values in the other.
  const SourceBuffer buffer = grid_buffer(p);
  SourceRows<T, V> input_rows(buffer, arena.take(buffer.elements(V, sizeof(T))));
  SourceRows<T, V> grad_rows(buffer, arena.take(buffer.elements(V, sizeof(T))));
  const int64_t last_y = (p.kernel_h - 1) * p.dilation, last_x = (p.kernel_w - 1) * p.dilation;
  T* dense_grid = take_dense<T, V>(p, last_y - p.pad_top, last_x - p.pad_left, arena);
  const int64_t step = tokens_in_tile(p);
  const int64_t first_token = p.prefix_mode == PrefixMode::zero ? p.num_prefix_tokens : 0;
  const int64_t grid_tokens = p.height * p.width;
  const bool need_bottleneck = g.need_down || g.need_conv || g.grad_x;

  for (int64_t part = part_begin; part < part_end; ++part) {
    const PartSums<T, V> sums(p, g, part);
    T *conv = sums.conv, *conv_bias = sums.conv_bias;
    // The first tokens begin the sums of the projections.
    memset(sums.down_bias, 0, (g.part_elements - (sums.down_bias - sums.down)) * sizeof(T));
    const int64_t first_image = part * p.batch / g.num_parts;
    const int64_t last_image = (part + 1) * p.batch / g.num_parts;
    for (int64_t image = first_image; image < last_image; ++image) {
      const T* z = static_cast<const T*>(p.z) + image * p.tokens * p.rank;
      const T* c = static_cast<const T*>(p.c) + image * p.tokens * p.rank;
      const S* grad_output = static_cast<const S*>(g.grad_output) + image * p.tokens * p.dim;
      const S* x = static_cast<const S*>(p.x) + image * p.tokens * p.dim;
      const auto widen_rank = [&](const T* from, T* to) {
        memset(to, 0, per_image * sizeof(T));
        for (int64_t t = 0; t < p.tokens; ++t)
          memcpy(to + t * padded, from + t * p.rank, p.rank * sizeof(T));
      };
      const auto multiply_grad = [&](const T* by) {
        if (!whole) widen_rank(by, wide);
        const T* factors = whole ? by : wide;
        for (int64_t i = 0; i < per_image; i += V)
          store<T, V>(grad + i, load<T, V>(grad + i) * load<T, V>(factors + i));
      };

      // grad_output, once: gradients of the up-projection and of its input.
      const T* e = adapter_bottleneck_output<T, kWide>(p, image, 0, p.tokens, factor, dense);
      if (!whole) widen_rank(e, wide), e = wide;
      memset(grad, 0, (whole ? first_token * padded : per_image) * sizeof(T));
      for (int64_t t = first_token; t < p.tokens; t += step) {
        const int64_t tokens = p.tokens - t < step ? p.tokens - t : step;
        const T* dy = widen<T, kWide, S>(grad_output + t * p.dim, tokens * p.dim, tile);
        if (need_bottleneck)
          project_in<T, kWide>(dy, tokens, p.dim, static_cast<const T*>(p.up), p.dim_padded,
                               static_cast<const T*>(nullptr), p.rank, grad + t * padded, padded);
        if (g.need_up)
          outer<T, kWide>(dy, tokens, p.dim, e + t * padded, padded, p.rank, sums.up, p.dim_padded,
                          sums.up_bias, image == first_image && t == first_token);
      }
      if (!need_bottleneck) continue;

      // Through dropout and the activation after the convolution: grad = dc. `wide` is free again.
      if (p.activate_after || p.dropout) {
        map_activation<T, kWide>(p.activate_after ? p.activation : Activation::none, c,
                                 p.dropout ? factor : nullptr, static_cast<T*>(nullptr), dense,
                                 p.tokens * p.rank);
        multiply_grad(dense);
      }

      // The convolution: gradients of its weights, its bias and its input. `factor` is free again.
      T* slope = factor;  // of the activation before the convolution
      if (p.activate_before)
        map_activation<T, kWide>(p.activation, z, static_cast<const T*>(nullptr), dense, slope,
                                 p.tokens * p.rank);
      else
        memcpy(dense, z, p.tokens * p.rank * sizeof(T));
      const int64_t tap = center_tap(p);
      for (int64_t t = first_token; t < p.num_prefix_tokens; ++t) {
        if (p.prefix_mode != PrefixMode::center_tap) break;
        for (int64_t k = 0; k < p.rank; ++k) {
          T& at = grad[t * padded + k];
          conv_bias[k] += at;
          if (tap >= 0) conv[(k / V * taps + tap) * V + k % V] += at * dense[t * p.rank + k];
          at *= center_weight<T, V>(p, static_cast<const T*>(g.conv_flipped), true, k);
        }
      }
      T* grid_grad = grad + p.num_prefix_tokens * padded;
      for (int64_t block = 0; block < p.rank_blocks; ++block) {
        // The gradient of the weights comes first: that of the input overwrites `grad`.
        if (g.need_conv) {
          Correlation<T, V> k;
          k.bias = nullptr;
          load_grid<T, V>(p, dense, p.rank, block, p.pad_top, p.pad_left, input_rows);
          k.source_rows = input_rows.table();
          k.weight = grid_grad + block * V;
          k.weight_row = p.width * padded;
          k.weight_column = padded;
          k.y = rank_axis(p.kernel_h, p.height, p.dilation, 1, p.pad_top, p.height);
          k.x = rank_axis(p.kernel_w, p.width, p.dilation, 1, p.pad_left, p.width);
          k.accumulate = true;
          k.out = conv + block * taps * V;
          k.out_row = p.kernel_w * V;
          k.out_column = V;
          correlate(k);
          for (int64_t i = 0; i < grid_tokens; i += p.width) {
            Vec<T, V> row_sum{};
            for (int64_t j = i; j < i + p.width; ++j) row_sum += load<T, V>(k.weight + j * padded);
            store<T, V>(conv_bias + block * V, load<T, V>(conv_bias + block * V) + row_sum);
          }
        }
        if (g.need_down || g.grad_x) {
          convolve_grid<T, V>(p, grad, padded, block, last_y - p.pad_top, last_x - p.pad_left,
                              static_cast<const T*>(g.conv_flipped) + block * taps * V, nullptr,
                              grad_rows, dense_grid, grid_grad + block * V, padded);
        }
      }
      if (!g.need_down && !g.grad_x) continue;

      // Through the activation before the convolution: grad = dz.
      if (p.activate_before) multiply_grad(slope);

      // x, once: gradients of the down-projection and of x.
      if (g.need_down) {
        for (int64_t t = first_token; t < p.tokens; t += step) {
          const int64_t tokens = p.tokens - t < step ? p.tokens - t : step;
          const T* tokens_x = widen<T, kWide, S>(x + t * p.dim, tokens * p.dim, tile);
          outer<T, kWide>(tokens_x, tokens, p.dim, grad + t * padded, padded, p.rank, sums.down,
                          p.dim_padded, static_cast<T*>(nullptr),
                          image == first_image && t == first_token);
          add_column_sums<T, V>(grad + t * padded, tokens, padded, padded, sums.down_bias);
        }
      }
      if (g.grad_x) {
        S* grad_x = static_cast<S*>(g.grad_x) + image * p.tokens * p.dim;
        const S* residual = g.add_grad_output ? grad_output : nullptr;
        const int64_t skipped = first_token * p.dim;
        if (residual)
          memcpy(grad_x, residual, skipped * sizeof(S));
        else
          memset(static_cast<void*>(grad_x), 0, skipped * sizeof(S));
        project_out<T, kWide, S>(grad + first_token * padded, padded, p.tokens - first_token,
                                 p.rank, p.dim, static_cast<const T*>(p.down), p.dim_padded,
                                 static_cast<const T*>(nullptr),
                                 residual ? residual + skipped : nullptr, grad_x + skipped);
      }
    }
  }
}

// a = act(z) for tokens [begin, end) of an image.
template <class T, int kWide>
void adapter_activate(const AdapterParams& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t first = (image * p.tokens + begin) * p.rank;
  map_activation<T, kWide>(p.activation, static_cast<const T*>(p.z) + first,
                           static_cast<const T*>(nullptr), static_cast<T*>(p.a) + first,
                           static_cast<T*>(nullptr), (end - begin) * p.rank);
}

template <class T, int V>
void multiply_by(T* values, const T* factors, int64_t count) {
  for (int64_t i = 0; i < count; i += V) {
    const int some = count - i < V ? int(count - i) : V;
    store_some<T, V, T>(
        values + i, load_some<T, V, T>(values + i, some) * load_some<T, V, T>(factors + i, some),
        some);
  }
}

// For tokens [begin, end) of an image: gradients of the up-projection, added to those of a part,
// and the gradient of the convolution's output.
template <class T, int V, int kWide, class S>
void adapter_backward_up(const AdapterParams& p, const AdapterGradients& g, int64_t part,
                         int64_t image, int64_t begin, int64_t end, T* scratch) {
  const PartSums<T, V> sums(p, g, part);
  const int64_t step = tokens_in_tile(p);
  const bool need_bottleneck = g.need_down || g.need_conv || g.grad_x;
  Arena<T> arena(scratch);
  T* tile = arena.take(step * p.dim);
  T* factor = arena.take(step * p.rank);
  T* e = arena.take(step * p.rank + kRankGroup);
  T* slope = arena.take(step * p.rank);
  if (p.prefix_mode == PrefixMode::zero && begin < p.num_prefix_tokens) begin = p.num_prefix_tokens;
  for (int64_t t = begin; t < end; t += step) {
    const int64_t tokens = end - t < step ? end - t : step, count = tokens * p.rank;
    const int64_t row = image * p.tokens + t;
    const S* grad_output = static_cast<const S*>(g.grad_output) + row * p.dim;
    const T* dy = widen<T, kWide, S>(grad_output, tokens * p.dim, tile);
    const T* output = adapter_bottleneck_output<T, kWide>(p, image, t, tokens, factor, e);
    if (g.need_up) {
      if (output != e && p.rank % kRankGroup != 0)  // read behind the last token too
        output = static_cast<const T*>(memcpy(e, output, size_t(count) * sizeof(T)));
      outer<T, kWide>(dy, tokens, p.dim, output, p.rank, p.rank, sums.up, p.dim_padded,
                      sums.up_bias, false);
    }
    if (!need_bottleneck) continue;
    T* grad = static_cast<T*>(g.grad_c) + row * p.rank;
    project_in<T, kWide>(dy, tokens, p.dim, static_cast<const T*>(p.up), p.dim_padded,
                         static_cast<const T*>(nullptr), p.rank, grad, p.rank);
    if (!p.activate_after && !p.dropout) continue;
    map_activation<T, kWide>(p.activate_after ? p.activation : Activation::none,
                             static_cast<const T*>(p.c) + row * p.rank,
                             p.dropout ? factor : nullptr, static_cast<T*>(nullptr), slope, count);
    multiply_by<T, kWide>(grad, slope, count);
  }
}

// For tokens [begin, end) of an image, from the gradient of a: gradients of the down-projection,
// added to those of a part, and of x.
template <class T, int V, int kWide, class S>
void adapter_backward_down(const AdapterParams& p, const AdapterGradients& g, int64_t part,
                           int64_t image, int64_t begin, int64_t end, T* scratch) {
  const PartSums<T, V> sums(p, g, part);
  const int64_t step = tokens_in_tile(p);
  Arena<T> arena(scratch);
  T* tile = arena.take(step * p.dim);
  T* slope = arena.take(step * p.rank);
  T* grad_z = arena.take(step * p.rank + kRankGroup);
  const S* grad_output = static_cast<const S*>(g.grad_output);
  S* grad_x = static_cast<S*>(g.grad_x);
  if (p.prefix_mode == PrefixMode::zero && begin < p.num_prefix_tokens) {
    const int64_t last = end < p.num_prefix_tokens ? end : p.num_prefix_tokens;
    const int64_t at = (image * p.tokens + begin) * p.dim, count = (last - begin) * p.dim;
    if (grad_x && g.add_grad_output)
      memcpy(grad_x + at, grad_output + at, size_t(count) * sizeof(S));
    else if (grad_x)
      memset(static_cast<void*>(grad_x + at), 0, size_t(count) * sizeof(S));
    begin = last;
  }
  for (int64_t t = begin; t < end; t += step) {
    const int64_t tokens = end - t < step ? end - t : step, count = tokens * p.rank;
    const int64_t row = image * p.tokens + t, at = row * p.dim;
    memcpy(grad_z, static_cast<const T*>(p.a) + row * p.rank, size_t(count) * sizeof(T));
    if (p.activate_before) {
      map_activation<T, kWide>(p.activation, static_cast<const T*>(p.z) + row * p.rank,
                               static_cast<const T*>(nullptr), static_cast<T*>(nullptr), slope,
                               count);
      multiply_by<T, kWide>(grad_z, slope, count);
    }
    if (g.need_down) {
      const T* x = widen<T, kWide, S>(static_cast<const S*>(p.x) + at, tokens * p.dim, tile);
      outer<T, kWide>(x, tokens, p.dim, grad_z, p.rank, p.rank, sums.down, p.dim_padded,
                      static_cast<T*>(nullptr), false);
      add_column_sums<T, V>(grad_z, tokens, p.rank, p.rank, sums.down_bias);
    }
    if (grad_x)
      project_out<T, kWide, S>(grad_z, p.rank, tokens, p.rank, p.dim, static_cast<const T*>(p.down),
                               p.dim_padded, static_cast<const T*>(nullptr),
                               g.add_grad_output ? grad_output + at : nullptr, grad_x + at);
  }
}

// Scratch elements that one thread needs for a step on tokens.
template <class T>
int64_t adapter_step_scratch(const AdapterParams& p) {
  constexpr int64_t kMostPieces = 4, kLine = 64 / sizeof(T), kMostTokens = 96;
  return tokens_in_tile(p) * p.dim + 3 * kMostTokens * p.rank + kRankGroup + kMostPieces * kLine;
}

// Scratch elements that one thread needs, for backward or a step of forward. `outer` reads up to
// kRankGroup - 1 elements behind the last of the four tensors of the bottleneck: others follow it.
template <class T>
int64_t adapter_scratch(const AdapterParams& p) {
  constexpr int64_t kMostPieces = 12, kLine = 64 / sizeof(T);  // each begins on a line of its own
  const int64_t tile = tokens_in_tile(p) * p.dim;
  const int64_t bottleneck = (4 * p.tokens + 2 * 64) * p.rank_padded;
  const int64_t rows = 2 * grid_buffer(p).elements(p.lanes, sizeof(T));
  const int64_t result_and_dense =
      2 * p.height * p.width * p.lanes + p.kernel_h * int64_t(sizeof(void*) / sizeof(T)) + 2 * 64;
  return tile + bottleneck + rows + result_and_dense + kMostPieces * kLine;
}

template <class T, int kWide>
void adapter_down_of(const AdapterParams& p, int64_t image, int64_t begin, int64_t end,
                     void* scratch) {
  with_storage<T>(p.storage, [&](auto s) {
    adapter_down<T, kWide, decltype(s)>(p, image, begin, end, static_cast<T*>(scratch));
  });
}

template <class T, int V, int kWide>
void adapter_convolve_of(const AdapterParams& p, int64_t image, void* scratch) {
  adapter_convolve<T, V, kWide>(p, image, static_cast<T*>(scratch));
}

template <class T, int kWide>
void adapter_up_of(const AdapterParams& p, int64_t image, int64_t begin, int64_t end,
                   void* scratch) {
  with_storage<T>(p.storage, [&](auto s) {
    adapter_up<T, kWide, decltype(s)>(p, image, begin, end, static_cast<T*>(scratch));
  });
}

template <class T, int V, int kWide>
void adapter_backward_up_of(const AdapterParams& p, const AdapterGradients& g, int64_t part,
                            int64_t image, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(p.storage, [&](auto s) {
    adapter_backward_up<T, V, kWide, decltype(s)>(p, g, part, image, begin, end,
                                                  static_cast<T*>(scratch));
  });
}

template <class T, int V, int kWide>
void adapter_backward_down_of(const AdapterParams& p, const AdapterGradients& g, int64_t part,
                              int64_t image, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(p.storage, [&](auto s) {
    adapter_backward_down<T, V, kWide, decltype(s)>(p, g, part, image, begin, end,
                                                    static_cast<T*>(scratch));
  });
}

template <class T, int V, int kWide>
void adapter_backward_of(const AdapterParams& p, const AdapterGradients& g, int64_t begin,
                         int64_t end, void* scratch) {
  with_storage<T>(p.storage, [&](auto s) {
    adapter_backward_parts<T, V, kWide, decltype(s)>(p, g, begin, end, static_cast<T*>(scratch));
  });
}

}  // namespace
