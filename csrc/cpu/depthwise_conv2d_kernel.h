// Depthwise convolution for one instruction set: pack a block of planes into a zero-padded buffer,
// run the microkernel, unpack. Sources of every layout and dtype share one arithmetic.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "pack.h"

namespace {

using lka::MapView;
using lka::cpu::ConvolvePlan;
using lka::cpu::LanePlan;
using lka::cpu::Phase;
using lka::cpu::WeightGradientPlan;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <int V>
Lanes lanes_of(const LanePlan& plan, int64_t block, const MapView& map, int64_t batch,
               int64_t channels) {
  Lanes lanes;
  lanes.stride_h = map.stride_h;
  lanes.stride_w = map.stride_w;
  int64_t first_plane, planes;
  if (plan.cross_images) {
    first_plane = block * V;
    planes = batch * channels - first_plane;
  } else {
    const int64_t channel = block % plan.blocks_per_image * V;
    first_plane = block / plan.blocks_per_image * channels + channel;
    planes = channels - channel;
  }
  lanes.count = planes < V ? int(planes) : V;
  lanes.adjacent = true;
  for (int l = 0; l < lanes.count; ++l) {
    const int64_t plane = first_plane + l;
    lanes.offset[l] = plane / channels * map.stride_b + plane % channels * map.stride_c;
    lanes.adjacent = lanes.adjacent && lanes.offset[l] == lanes.offset[0] + l;
  }
  // One plane of a dense map is better read along its rows than one element at a time.
  if (lanes.count == 1 && map.stride_w == 1) lanes.adjacent = false;
  return lanes;
}

inline int64_t channel_of_lane(const LanePlan& plan, int64_t pattern, int lane, int64_t channels) {
  const int64_t plane = pattern * plan.lanes + lane;
  return plan.cross_images ? plane % channels : (plane < channels ? plane : -1);
}

// Weights of patterns [begin, end), every phase, flipped or not as the phases say.
template <class T, int V, class S>
void pack_weights_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const S* weight = static_cast<const S*>(plan.weight);
  const S* bias = static_cast<const S*>(plan.bias);
  for (int64_t pattern = begin; pattern < end; ++pattern) {
    T* to = static_cast<T*>(plan.packed_weight) + pattern * plan.packed_taps * V;
    int64_t channel[V];
    for (int l = 0; l < V; ++l) channel[l] = channel_of_lane(plan.lanes, pattern, l, plan.channels);
    for (int64_t py = 0; py < plan.num_phases_y; ++py)
      for (int64_t px = 0; px < plan.num_phases_x; ++px) {
        const Phase &y = plan.phases_y[py], &x = plan.phases_x[px];
        for (int64_t m = 0; m < y.taps; ++m)
          for (int64_t n = 0; n < x.taps; ++n, to += V) {
            const int64_t at = (y.first_kernel_index + m * y.kernel_index_step) * plan.kernel_w +
                               x.first_kernel_index + n * x.kernel_index_step;
            const int64_t taps = plan.kernel_h * plan.kernel_w;
            for (int l = 0; l < V; ++l)
              to[l] = channel[l] < 0 ? T(0) : load_one<T>(weight + channel[l] * taps + at);
          }
      }
    if (bias) {
      T* to_bias = static_cast<T*>(plan.packed_bias) + pattern * V;
      for (int l = 0; l < V; ++l)
        to_bias[l] = channel[l] < 0 ? T(0) : load_one<T>(bias + channel[l]);
    }
  }
}

inline Axis axis_of(const Phase& phase, int64_t first_out, int64_t count, int64_t buffer_begin,
                    int64_t live_size) {
  return Axis{count,
              phase.taps,
              phase.out_step,
              phase.tap_step,
              phase.origin + first_out * phase.out_step - buffer_begin,
              -buffer_begin,
              live_size - buffer_begin};
}

// Copy the source rows that exist into the buffer and zero what lies around them. The buffer's
// (0, 0) is source element (begin_y, begin_x).
template <class T, int V, class S>
void fill_buffer(const MapView& source, const Lanes& lanes, int64_t begin_y, int64_t begin_x,
                 int64_t rows, int64_t columns, T* buffer) {
  const int64_t first = begin_y > 0 ? begin_y : 0;
  const int64_t last = begin_y + rows < source.height ? begin_y + rows : source.height;
  // With padding larger than the kernel, or a stride that skips the edge, columns may be cut.
  const int64_t skip = begin_x > 0 ? begin_x : 0;
  const int64_t end = begin_x + columns < source.width ? begin_x + columns : source.width;
  const auto zero = [&](int64_t row, int64_t column, int64_t count) {
    memset(buffer + (row * columns + column) * V, 0, size_t(count * V) * sizeof(T));
  };
  if (first >= last || skip >= end) return zero(0, 0, rows * columns);
  const int64_t top = first - begin_y, bottom = last - begin_y;
  const int64_t left = skip - begin_x, right = end - begin_x;
  zero(0, 0, top * columns);
  for (int64_t row = top; row < bottom; ++row) {
    if (left > 0) zero(row, 0, left);
    if (right < columns) zero(row, right, columns - right);
  }
  zero(bottom, 0, (rows - bottom) * columns);
  const S* data = static_cast<const S*>(source.data) + skip * source.stride_w;
  pack_rows<T, V, S>(data, lanes, first, last, end - skip, buffer + (top * columns + left) * V,
                     columns);
}

template <class T, int V, class S>
void convolve_as(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  T* buffer = static_cast<T*>(scratch);
  T* result = buffer + plan.buffer_rows * plan.buffer_columns * V;
  const MapView& target = plan.target;
  const int64_t output_stride_y = plan.phases_y[0].output_stride;
  const int64_t output_stride_x = plan.phases_x[0].output_stride;
  for (int64_t task = begin; task < end; ++task) {
    int64_t block = task / plan.num_bands, band = task % plan.num_bands;
    if (plan.blocks_share_lines) {
      // Neighbouring blocks lie side by side in memory: take them one after the other, band by
      // band, while their cache lines and pages are near.
      const int64_t per_image = plan.lanes.blocks_per_image;
      const int64_t image = task / (per_image * plan.num_bands);
      band = task / per_image % plan.num_bands;
      block = image * per_image + task % per_image;
    }
    const int64_t first_j = band * plan.band;
    const Lanes from = lanes_of<V>(plan.lanes, block, plan.source, plan.batch, plan.channels);
    const Lanes to = lanes_of<V>(plan.lanes, block, target, plan.batch, plan.channels);
    const int64_t begin_y = plan.origin_y + first_j * plan.phases_y[0].out_step;
    fill_buffer<T, V, S>(plan.source, from, begin_y, plan.origin_x, plan.buffer_rows,
                         plan.buffer_columns, buffer);

    const int64_t row_begin = first_j * output_stride_y;
    int64_t row_end = (first_j + plan.band) * output_stride_y;
    if (row_end > target.height) row_end = target.height;
    const bool direct = plan.direct_store && to.adjacent && to.count == V;
    Correlation<T, V> c;
    c.source = buffer;
    c.source_columns = plan.buffer_columns;
    c.accumulate = false;
    const int64_t pattern = block % plan.lanes.num_patterns;
    c.bias = plan.bias ? static_cast<const T*>(plan.packed_bias) + pattern * V : nullptr;
    c.weight = static_cast<const T*>(plan.packed_weight) + pattern * plan.packed_taps * V;
    T* base;
    int64_t row, column;
    if (direct) {
      base = static_cast<T*>(target.data) + to.offset[0] + row_begin * target.stride_h;
      row = target.stride_h;
      column = target.stride_w;
    } else {
      base = result;
      row = target.width * V;
      column = V;
    }
    c.out_row = row * output_stride_y;
    c.out_column = column * output_stride_x;
    for (int64_t py = 0; py < plan.num_phases_y; ++py)
      for (int64_t px = 0; px < plan.num_phases_x; ++px) {
        const Phase &y = plan.phases_y[py], &x = plan.phases_x[px];
        const int64_t left = y.count - first_j;
        const int64_t count = left < plan.band ? left : plan.band;
        c.y = axis_of(y, first_j, count, begin_y, plan.source.height);
        c.x = axis_of(x, 0, x.count, plan.origin_x, plan.source.width);
        c.weight_row = x.taps * V;
        c.weight_column = V;
        c.out = base + y.first_output * row + x.first_output * column;
        if (count > 0) correlate<T, V>(c);
        c.weight += y.taps * x.taps * V;
      }
    if (!direct)
      unpack_rows<T, V, S>(result, to, row_begin, row_end, target.width,
                           static_cast<S*>(target.data));
  }
}

template <class T, int V, class S>
void weight_gradient_as(const WeightGradientPlan& plan, int64_t begin, int64_t end, void* scratch) {
  const MapView& grad = plan.grad_output;
  const int64_t taps = plan.kernel_h * plan.kernel_w;
  const int64_t buffer_rows =
      (plan.band - 1) * plan.y.tap_step + (plan.y.count - 1) * plan.y.out_step + 1;
  T* weights = static_cast<T*>(scratch);  // grad_output, [band][width][V]
  T* buffer = weights + plan.band * grad.width * V;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t blocks =
        plan.lanes.cross_images ? plan.lanes.num_blocks : plan.lanes.blocks_per_image;
    const int64_t part = task / blocks, block_in_part = task % blocks;
    T* partial = static_cast<T*>(plan.partial) + task * (taps + 1) * V;
    memset(partial, 0, (taps + 1) * V * sizeof(T));
    int64_t first_image = 0, last_image = 1;
    if (!plan.lanes.cross_images) {
      first_image = part * plan.batch / plan.num_parts;
      last_image = (part + 1) * plan.batch / plan.num_parts;
    }
    for (int64_t image = first_image; image < last_image; ++image) {
      const int64_t block = plan.lanes.cross_images
                                ? block_in_part
                                : image * plan.lanes.blocks_per_image + block_in_part;
      const Lanes x_lanes = lanes_of<V>(plan.lanes, block, plan.input, plan.batch, plan.channels);
      const Lanes g_lanes = lanes_of<V>(plan.lanes, block, grad, plan.batch, plan.channels);
      for (int64_t band = 0; band < plan.num_bands; ++band) {
        const int64_t row_begin = band * plan.band;
        const int64_t left = grad.height - row_begin;
        const int64_t rows = left < plan.band ? left : plan.band;
        // Where lanes are adjacent and need no widening, grad_output is read where it stands.
        const T* taps_at = weights;
        int64_t tap_row = grad.width * V, tap_column = V;
        if (sizeof(S) == sizeof(T) && g_lanes.adjacent && g_lanes.count == V) {
          taps_at =
              static_cast<const T*>(grad.data) + g_lanes.offset[0] + row_begin * grad.stride_h;
          tap_row = grad.stride_h;
          tap_column = grad.stride_w;
        } else {
          pack_rows<T, V, S>(static_cast<const S*>(grad.data), g_lanes, row_begin, row_begin + rows,
                             grad.width, weights, grad.width);
        }
        Vec<T, V> bias_sum = load_aligned<V>(partial + taps * V);
        for (int64_t row = 0; row < rows; ++row) {  // row by row, for the rounding error's sake
          Vec<T, V> row_sum{};
          const T* at = taps_at + row * tap_row;
          for (int64_t x = 0; x < grad.width; ++x) row_sum += load<T, V>(at + x * tap_column);
          bias_sum += row_sum;
        }
        store_aligned<V>(partial + taps * V, bias_sum);
        if (plan.y.count <= 0 || plan.x.count <= 0) continue;

        const int64_t begin_y = plan.y.origin + row_begin * plan.y.tap_step;
        fill_buffer<T, V, S>(plan.input, x_lanes, begin_y, plan.x.origin, buffer_rows,
                             plan.buffer_columns, buffer);
        Correlation<T, V> c;
        c.source = buffer;
        c.source_columns = plan.buffer_columns;
        c.weight = taps_at;
        c.weight_row = tap_row;
        c.weight_column = tap_column;
        c.bias = nullptr;
        c.accumulate = true;
        Phase y = plan.y;
        y.taps = rows;
        y.origin = begin_y;
        c.y = axis_of(y, 0, y.count, begin_y, plan.input.height);
        c.x = axis_of(plan.x, 0, plan.x.count, plan.x.origin, plan.input.width);
        c.out = partial + (y.first_output * plan.kernel_w + plan.x.first_output) * V;
        c.out_row = plan.kernel_w * V;
        c.out_column = V;
        correlate<T, V>(c);
      }
    }
  }
}

// float64 keeps its own arithmetic; narrower types widen to float.
template <class T, int V>
void pack_weights(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 8) {
    pack_weights_as<T, V, double>(plan, begin, end);
  } else {
    switch (plan.storage) {
      case lka::Storage::bfloat16: return pack_weights_as<T, V, bfloat16_t>(plan, begin, end);
      case lka::Storage::float16: return pack_weights_as<T, V, float16_t>(plan, begin, end);
      default: return pack_weights_as<T, V, float>(plan, begin, end);
    }
  }
}

template <class T, int V>
void convolve(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  if constexpr (sizeof(T) == 8) {
    convolve_as<T, V, double>(plan, begin, end, scratch);
  } else {
    switch (plan.storage) {
      case lka::Storage::bfloat16: return convolve_as<T, V, bfloat16_t>(plan, begin, end, scratch);
      case lka::Storage::float16: return convolve_as<T, V, float16_t>(plan, begin, end, scratch);
      default: return convolve_as<T, V, float>(plan, begin, end, scratch);
    }
  }
}

template <class T, int V>
void weight_gradient(const WeightGradientPlan& plan, int64_t begin, int64_t end, void* scratch) {
  if constexpr (sizeof(T) == 8) {
    weight_gradient_as<T, V, double>(plan, begin, end, scratch);
  } else {
    switch (plan.storage) {
      case lka::Storage::bfloat16:
        return weight_gradient_as<T, V, bfloat16_t>(plan, begin, end, scratch);
      case lka::Storage::float16:
        return weight_gradient_as<T, V, float16_t>(plan, begin, end, scratch);
      default: return weight_gradient_as<T, V, float>(plan, begin, end, scratch);
    }
  }
}

}  // namespace
