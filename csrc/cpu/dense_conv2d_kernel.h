// Depthwise convolution where the kernel covers the whole map from every position: each output is
// the inner product of the map and a window of the kernel. Map and kernel change places in the
// microkernel, so that no tile multiplies taps that lie outside the map: with taps t = p - i -
// origin and origin = -(outputs - 1), the reversed output i' = outputs - 1 - i meets input p at
// kernel element p + i'.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "pack.h"

namespace {

using lka::MapView;
using lka::cpu::ConvolvePlan;
using lka::cpu::Phase;

// `outputs` reversed outputs from `first` on: the kernel is the source, the map are the taps.
inline Axis dense_axis(const Phase& phase, int64_t source_size, int64_t first, int64_t outputs) {
  return Axis{outputs, source_size, 1, 1, first, 0, phase.taps};
}

template <class T, int V, class S>
void convolve_dense_as(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  const MapView &source = plan.source, &target = plan.target;
  const Phase &y = plan.phases_y[0], &x = plan.phases_x[0];
  T* map = static_cast<T*>(scratch);
  T* result = map + source.height * source.width * V;
  const T** kernel_rows = reinterpret_cast<const T**>(result + target.height * target.width * V);
  Correlation<T, V> c;
  c.source_rows = kernel_rows;
  c.weight = map;
  c.weight_row = source.width * V;
  c.weight_column = V;
  c.x = dense_axis(x, source.width, 0, x.count);
  c.accumulate = false;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const Lanes from = lanes_of<V>(plan.lanes, block, source, plan.batch, plan.channels);
    const Lanes to = lanes_of<V>(plan.lanes, block, target, plan.batch, plan.channels);
    const int64_t pattern = block % plan.lanes.num_patterns;
    const T* kernel = static_cast<const T*>(plan.packed_weight) + pattern * plan.packed_taps * V;
    for (int64_t m = 0; m < y.taps; ++m) kernel_rows[m] = kernel + m * x.taps * V;
    c.bias = plan.bias ? static_cast<const T*>(plan.packed_bias) + pattern * V : nullptr;
    pack_rows<T, V, S>(static_cast<const S*>(source.data), from, 0, source.height, source.width,
                       map, source.width * V);
    // Rows [first, last) of the target; its last row is the first of the reversed ones.
    const bool direct = plan.direct_store && to.adjacent && to.count == V;
    const int64_t row = direct ? target.stride_h : target.width * V;
    const int64_t column = direct ? target.stride_w : V;
    T* out = direct ? static_cast<T*>(target.data) + to.offset[0] + first * row : result;
    c.y = dense_axis(y, source.height, target.height - last, last - first);
    c.out = out + (last - first - 1) * row + (target.width - 1) * column;
    c.out_row = -row;
    c.out_column = -column;
    correlate(c);
    if (!direct)
      unpack_rows<T, V, S>(result, to, first, last, target.width, static_cast<S*>(target.data));
  }
}

}  // namespace
