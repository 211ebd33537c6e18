// Depthwise convolution that reads channels_last maps where they stand, for kernels with few taps
// and a stride. The other kernels unpack the source first, which pays where each element meets many
// taps; with stride 2 an element meets a quarter as many.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "pack.h"
#include "prefetch.h"
#include "simd.h"

namespace {

using lka::cpu::ConvolvePlan;
using lka::cpu::Phase;
using lka::cpu::WeightGradientPlan;

// Taps of output j that meet an element of the source.
inline TapRange taps_of(const Phase& phase, int64_t j, int64_t source_size) {
  return live_taps(axis_of(phase, 0, phase.count, 0, source_size), j, 1);
}

struct OutputRange {
  int64_t begin, end;
};

// Outputs of which every tap meets an element of the source.
inline OutputRange whole_outputs(const Phase& phase, int64_t source_size) {
  if (phase.taps == 0) return {0, phase.count};
  const int64_t last = source_size - 1 - phase.origin - (phase.taps - 1) * phase.tap_step;
  int64_t begin = phase.origin < 0 ? ceil_div(-phase.origin, phase.out_step) : 0;
  int64_t end = last < 0 ? 0 : last / phase.out_step + 1;
  if (begin > phase.count) begin = phase.count;
  if (end > phase.count) end = phase.count;
  return {begin, end > begin ? end : begin};
}

// Sums of one block of channels for neighbouring outputs of a row: what `rows` × `columns` taps
// meet. Steps are elements.
template <class T, class S>
struct InPlaceSums {
  const S* source;  // of tap (0, 0) of the first output
  int64_t rows, columns, source_row, source_column, source_output;
  const T* weight;  // of tap (0, 0), [row][column][V]
  int64_t weight_row;
  const T* bias;  // or null
  S* out;
  int64_t out_column;
  int channels;  // in the block
};

template <class T, int V, class S, int kOutputs, bool kWhole>
inline void in_place_sums(const InPlaceSums<T, S>& sums) {
  const Vec<T, V> start = sums.bias ? load_aligned<V>(sums.bias) : Vec<T, V>{};
  Vec<T, V> sum[kOutputs];
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t) sum[t] = start;
  for (int64_t m = 0; m < sums.rows; ++m) {
    const S* from = sums.source + m * sums.source_row;
    const T* w = sums.weight + m * sums.weight_row;
    for (int64_t n = 0; n < sums.columns; ++n, from += sums.source_column, w += V) {
      Vec<T, V> tap = load_aligned<V>(w);
      keep_in_register(tap);
#pragma GCC unroll 8
      for (int t = 0; t < kOutputs; ++t) {
        const S* at = from + t * sums.source_output;
        sum[t] += tap * (kWhole ? load<T, V, S>(at) : load_some<T, V, S>(at, sums.channels));
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t)
    store_some<T, V, S>(sums.out + t * sums.out_column, sum[t], kWhole ? V : sums.channels);
}

// The same for all blocks of channels of a pixel, one after the other, in the order of memory.
template <class T, int V, class S, int kOutputs>
void in_place_pixels(InPlaceSums<T, S> sums, int64_t channels, int64_t weight_block, Ahead& ahead) {
  for (; channels >= V; channels -= V) {
    ahead.step();
    in_place_sums<T, V, S, kOutputs, true>(sums);
    sums.source += V;
    sums.out += V;
    sums.weight += weight_block;
    if (sums.bias) sums.bias += V;
  }
  sums.channels = int(channels);
  if (channels > 0) in_place_sums<T, V, S, kOutputs, false>(sums);
}

// Outputs side by side: enough for sums not to wait for themselves.
constexpr int kInPlaceOutputs = LKA_VECTOR_BYTES == 64 ? 4 : 6;

// Outputs of one phase of a row of the target.
template <class T, int V, class S>
void convolve_row_in_place(const ConvolvePlan& plan, const S* source, const Phase& y, int64_t j,
                           const Phase& x, const T* weight, S* out, Ahead& ahead) {
  const TapRange rows = taps_of(y, j, plan.source.height);
  InPlaceSums<T, S> sums;
  sums.rows = rows.end > rows.begin ? rows.end - rows.begin : 0;
  sums.source_row = y.tap_step * plan.source.stride_h;
  sums.source_column = x.tap_step * plan.source.stride_w;
  sums.source_output = x.out_step * plan.source.stride_w;
  sums.weight_row = x.taps * V;
  sums.bias = plan.bias ? static_cast<const T*>(plan.packed_bias) : nullptr;
  sums.out_column = x.output_stride * plan.target.stride_w;
  source += (y.origin + j * y.out_step + rows.begin * y.tap_step) * plan.source.stride_h;
  out += x.first_output * plan.target.stride_w;
  weight += rows.begin * sums.weight_row;
  const auto from = [&](int64_t output, TapRange columns) {
    sums.columns = columns.end > columns.begin ? columns.end - columns.begin : 0;
    if (sums.columns == 0) sums.rows = 0;
    sums.source = source + (x.origin + output * x.out_step + columns.begin * x.tap_step) *
                               plan.source.stride_w;
    sums.weight = weight + columns.begin * V;
    sums.out = out + output * sums.out_column;
  };
  const int64_t weight_block = plan.packed_taps * V;
  const int64_t all_rows = sums.rows;
  const auto one = [&](int64_t output) {
    from(output, taps_of(x, output, plan.source.width));
    in_place_pixels<T, V, S, 1>(sums, plan.channels, weight_block, ahead);
    sums.rows = all_rows;
  };
  const OutputRange whole = whole_outputs(x, plan.source.width);
  int64_t output = 0;
  for (; output < whole.begin; ++output) one(output);
  const auto some = [&](auto many) {
    constexpr int kOutputs = decltype(many)::value;
    for (; output + kOutputs <= whole.end; output += kOutputs) {
      from(output, {0, x.taps});
      in_place_pixels<T, V, S, kOutputs>(sums, plan.channels, weight_block, ahead);
      sums.rows = all_rows;
    }
  };
  some(Constant<kInPlaceOutputs>{});
  some(Constant<2>{});
  for (; output < x.count; ++output) one(output);
}

// A task is one band of rows of the target of one image.
template <class T, int V, class S>
void convolve_in_place_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const MapView &source = plan.source, &target = plan.target;
  const int64_t tiles = target.width / kInPlaceOutputs + 1;
  const int64_t steps = tiles * (plan.channels / V > 0 ? plan.channels / V : 1);
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const S* from = static_cast<const S*>(source.data) + image * source.stride_b;
    S* to = static_cast<S*>(target.data) + image * target.stride_b;
    for (int64_t row = first; row < last; ++row) {
      const int64_t phase = row % plan.phases_y[0].output_stride;
      // Meanwhile the next row, and what it reads beyond this one, come into the cache.
      const int64_t next = row / plan.phases_y[0].output_stride * plan.phases_y[0].out_step;
      const int64_t first_read = plan.origin_y + next + plan.span_y;
      ahead.first.begin(channels_region<S>(source, image * source.stride_b, plan.channels,
                                           first_read, first_read + plan.phases_y[0].out_step),
                        steps);
      ahead.second.begin(
          channels_region<S>(target, image * target.stride_b, plan.channels, row + 1, row + 2),
          steps, true);
      const T* weight = static_cast<const T*>(plan.packed_weight);
      for (int64_t py = 0; py < plan.num_phases_y; ++py)
        for (int64_t px = 0; px < plan.num_phases_x; ++px) {
          const Phase &y = plan.phases_y[py], &x = plan.phases_x[px];
          if (py == phase)
            convolve_row_in_place<T, V, S>(plan, from, y, row / y.output_stride, x, weight,
                                           to + row * target.stride_h, ahead);
          weight += y.taps * x.taps * V;
        }
    }
  }
}

// Columns of one row of grad_output against one row of the input, for one block of channels: adds
// to the gradients of kTaps taps of a kernel row. Steps are elements.
template <class T, class S>
struct InPlaceProducts {
  const S *grad, *input;  // at the first column, and what its first tap meets
  int64_t grad_column, input_column, input_tap;
  int channels;
  T* gradient;  // [tap][V]
};

template <class T, int V, class S, int kTaps, bool kWhole>
void in_place_products(const InPlaceProducts<T, S>& p, int64_t columns, Ahead* ahead) {
  Vec<T, V> even[kTaps], odd[kTaps];  // one sum alone would wait for itself
#pragma GCC unroll 8
  for (int n = 0; n < kTaps; ++n) even[n] = odd[n] = Vec<T, V>{};
  const S *grad = p.grad, *input = p.input;
  const auto add = [&](Vec<T, V>(&sum)[kTaps]) __attribute__((always_inline)) {
    Vec<T, V> g = kWhole ? load<T, V, S>(grad) : load_some<T, V, S>(grad, p.channels);
    keep_in_register(g);
#pragma GCC unroll 8
    for (int n = 0; n < kTaps; ++n) {
      const S* at = input + n * p.input_tap;
      sum[n] += g * (kWhole ? load<T, V, S>(at) : load_some<T, V, S>(at, p.channels));
    }
    grad += p.grad_column;
    input += p.input_column;
  };
  int64_t column = 0;
  for (; column + 1 < columns; column += 2) {
    add(even);
    add(odd);
    ahead->step();
  }
  if (column < columns) add(even);
#pragma GCC unroll 8
  for (int n = 0; n < kTaps; ++n) {
    T* to = p.gradient + n * V;
    store_aligned<V>(to, load_aligned<V>(to) + (even[n] + odd[n]));
  }
}

// All columns of a row of grad_output against the input row that kernel row m meets.
template <class T, int V, class S, int kTaps>
void weight_gradient_row_in_place(const WeightGradientPlan& plan, InPlaceProducts<T, S> p,
                                  Ahead* ahead) {
  // As a convolution has it: outputs are columns of grad_output, taps are kernel elements.
  const Phase x = {0, 1, plan.x.taps, kTaps, plan.x.origin, plan.x.tap_step, plan.x.out_step, 0, 1};
  const OutputRange whole = whole_outputs(x, plan.input.width);
  const InPlaceProducts<T, S> first = p;
  const auto at = [&](int64_t column) {
    p.grad = first.grad + column * p.grad_column;
    p.input = first.input + column * p.input_column;
  };
  const auto edge = [&](int64_t column) {
    const TapRange taps = taps_of(x, column, plan.input.width);
    for (int64_t n = taps.begin; n < taps.end; ++n) {
      at(column);
      p.input += n * p.input_tap;
      p.gradient = first.gradient + n * V;
      in_place_products<T, V, S, 1, false>(p, 1, nullptr);
    }
    p.gradient = first.gradient;
  };
  for (int64_t column = 0; column < whole.begin; ++column) edge(column);
  at(whole.begin);
  if (p.channels == V)
    in_place_products<T, V, S, kTaps, true>(p, whole.end - whole.begin, ahead);
  else
    in_place_products<T, V, S, kTaps, false>(p, whole.end - whole.begin, ahead);
  for (int64_t column = whole.end; column < x.count; ++column) edge(column);
}

// A task is one group of blocks of channels over one part of the rows of all images, as for the
// other kernel.
template <class T, int V, class S>
void weight_gradient_in_place_as(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  constexpr int kTaps = 3;
  const MapView &input = plan.input, &grad = plan.grad_output;
  const int64_t taps = plan.kernel_h * plan.kernel_w, elements = (taps + 1) * V;
  const int64_t blocks = plan.lanes.blocks_per_image, height = grad.height;
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / plan.num_groups, group = task % plan.num_groups;
    const int64_t first_block = group * blocks / plan.num_groups;
    const int64_t last_block = (group + 1) * blocks / plan.num_groups;
    T* partial = static_cast<T*>(plan.partial) + part * blocks * elements;
    memset(static_cast<void*>(partial + first_block * elements), 0,
           size_t((last_block - first_block) * elements) * sizeof(T));
    const int64_t last_row = (part + 1) * plan.batch * height / plan.num_parts;
    for (int64_t row = part * plan.batch * height / plan.num_parts; row < last_row; ++row) {
      const int64_t image = row / height, i = row % height;
      const S* grad_row =
          static_cast<const S*>(grad.data) + image * grad.stride_b + i * grad.stride_h;
      const S* image_input = static_cast<const S*>(input.data) + image * input.stride_b;
      const int64_t channel = first_block * V;
      const int64_t count = (last_block - first_block) * V;
      const int64_t channels = plan.channels - channel < count ? plan.channels - channel : count;
      const int64_t steps = (last_block - first_block) * plan.y.count * (grad.width / 2 + 1);
      const int64_t next =
          plan.y.origin + i * plan.y.tap_step + (plan.y.count - 1) * plan.y.out_step;
      ahead.first.begin(channels_region<S>(input, image * input.stride_b + channel, channels,
                                           next + 1, next + 1 + plan.y.tap_step),
                        steps);
      ahead.second.begin(
          channels_region<S>(grad, image * grad.stride_b + channel, channels, i + 1, i + 2), steps);
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t left = plan.channels - block * V;
        T* gradient = partial + block * elements;
        InPlaceProducts<T, S> p;
        p.channels = left < V ? int(left) : V;
        p.grad = grad_row + block * V;
        p.grad_column = grad.stride_w;
        p.input_column = plan.x.tap_step * input.stride_w;
        p.input_tap = plan.x.out_step * input.stride_w;
        for (int64_t m = 0; m < plan.y.count; ++m) {
          const int64_t y = plan.y.origin + i * plan.y.tap_step + m * plan.y.out_step;
          if (y < 0 || y >= input.height) continue;
          p.input = image_input + y * input.stride_h + plan.x.origin * input.stride_w + block * V;
          p.gradient =
              gradient + ((plan.y.first_output + m) * plan.kernel_w + plan.x.first_output) * V;
          weight_gradient_row_in_place<T, V, S, kTaps>(plan, p, &ahead);
        }
        Vec<T, V> even{}, odd{};
        for (int64_t x = 0; x < grad.width; ++x, p.grad += grad.stride_w) {
          const Vec<T, V> g = load_some<T, V, S>(p.grad, p.channels);
          x& 1 ? odd += g : even += g;
        }
        T* bias = gradient + taps * V;
        store_aligned<V>(bias, load_aligned<V>(bias) + (even + odd));
      }
    }
  }
}

}  // namespace
