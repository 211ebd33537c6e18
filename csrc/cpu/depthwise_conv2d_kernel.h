// Depthwise convolution for one instruction set: unpack rows of the source into vectors of planes,
// run the microkernel on them, pack the result. Sources of every layout and dtype share one
// arithmetic.
#pragma once

#include "correlate.h"
#include "dense_conv2d_kernel.h"
#include "depthwise_plan.h"
#include "in_place_conv2d_kernel.h"
#include "in_place_weight_gradient.h"
#include "pack.h"
#include "paired_rows.h"
#include "row_tiles_kernel.h"
#include "storage_dispatch.h"

namespace {

using lka::cpu::LanePlan;
using lka::cpu::SourceBuffer;
using lka::cpu::WeightGradientPlan;

constexpr int64_t kPageBytes = 4096;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t channel_of_lane(const LanePlan& plan, int64_t pattern, int lane, int64_t channels) {
  int64_t plane = pattern * plan.lanes + lane;
  if (plan.last_overlaps && pattern * plan.lanes > channels - plan.lanes)
    plane = channels - plan.lanes + lane;
  return plan.cross_images ? plane % channels : (plane < channels ? plane : -1);
}

// A run of `count` weights of V channels, transposed to [count][V], backwards if `reversed`. A lane
// without a channel has a null pointer and gets zeros.
template <class T, int V, class S>
void pack_weight_run(const S* const (&from)[V], int64_t count, bool reversed, T* to) {
  for (int64_t at = 0; at < count; at += V) {
    const int some = count - at < V ? int(count - at) : V;
    Vec<T, V> square[V];
    for (int l = 0; l < V; ++l)
      square[l] = from[l] ? load_some<T, V, S>(from[l] + at, some) : Vec<T, V>{};
    transpose<T, V>(square);
    for (int q = 0; q < some; ++q)
      store_aligned<V>(to + (reversed ? count - 1 - at - q : at + q) * V, square[q]);
  }
}

// Weights of one pattern's channels for one phase.
template <class T, int V, class S>
void pack_phase_weights(const ConvolvePlan& plan, const Phase& y, const Phase& x,
                        const int64_t (&channel)[V], T* to) {
  const S* weight = static_cast<const S*>(plan.weight);
  const int64_t step_y = y.kernel_index_step * plan.kernel_w, step_x = x.kernel_index_step;
  const bool reversed = step_x == -1;
  // All taps stand side by side, or those of a row do, or none.
  const bool whole = x.taps == plan.kernel_w && y.kernel_index_step == step_x;
  const int64_t run = step_x != 1 && step_x != -1 ? 1 : whole ? y.taps * x.taps : x.taps;
  if (run == 0) return;
  const int64_t first = y.first_kernel_index * plan.kernel_w + x.first_kernel_index;
  for (int64_t tap = 0; tap < y.taps * x.taps; tap += run) {
    const int64_t m = tap / x.taps, n = tap % x.taps;
    const int64_t at = first + m * step_y + n * step_x - (reversed ? run - 1 : 0);
    const S* from[V];
    for (int l = 0; l < V; ++l)
      from[l] = channel[l] < 0 ? nullptr : weight + channel[l] * plan.kernel_h * plan.kernel_w + at;
    pack_weight_run<T, V, S>(from, run, reversed, to + tap * V);
  }
}

// The bias of one pattern's channels.
template <class T, int V, class S>
void pack_bias(const ConvolvePlan& plan, int64_t pattern, const int64_t (&channel)[V]) {
  if (plan.bias == nullptr) return;
  T* to = static_cast<T*>(plan.packed_bias) + pattern * V;
  for (int l = 0; l < V; ++l)
    to[l] = channel[l] < 0 ? T(0) : load_one<T>(static_cast<const S*>(plan.bias) + channel[l]);
}

// Weights of patterns [begin, end), every phase, flipped or not as the phases say.
template <class T, int V, class S, class Taps = SingleTaps>
void pack_weights_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  for (int64_t pattern = begin; pattern < end; ++pattern) {
    T* to = static_cast<T*>(plan.packed_weight) + pattern * plan.packed_taps * V;
    int64_t channel[V];
    for (int l = 0; l < V; ++l) channel[l] = channel_of_lane(plan.lanes, pattern, l, plan.channels);
    if constexpr (Taps::kPaired) {
      if (plan.row_tiles)
        for (int l = 0; l < V; ++l) channel[l] = interleaved_channel(pattern, l, plan.channels);
      const Phase &y = plan.unpaired_y, &x = plan.phases_x[0];
      T* single = to + (plan.packed_taps - y.taps * x.taps) * V;
      pack_phase_weights<T, V, S>(plan, y, x, channel, single);
      pair_taps<V>(plan, single, to);
    } else {
      for (int64_t py = 0; py < plan.num_phases_y; ++py)
        for (int64_t px = 0; px < plan.num_phases_x; ++px) {
          const Phase &y = plan.phases_y[py], &x = plan.phases_x[px];
          pack_phase_weights<T, V, S>(plan, y, x, channel, to);
          to += y.taps * x.taps * V;
        }
    }
    pack_bias<T, V, S>(plan, pattern, channel);
  }
}

// The rows of a source that a band of outputs reads, as a SourceBuffer says, in scratch memory; or
// its pairs of rows.
template <class T, int V, class Taps = SingleTaps>
class SourceRows {
 public:
  // Zeros are written here, once: rows are later overwritten between the same columns only.
  SourceRows(const SourceBuffer& plan, T* memory)
      : plan_(plan),
        block_(plan.columns * V),
        row_(plan.blocks * block_),
        ring_(memory),
        zeros_(memory + plan.ring_rows * row_),
        table_(reinterpret_cast<const T**>(zeros_ + row_)) {
    memset(static_cast<void*>(memory), 0, size_t((plan.ring_rows + 1) * row_) * sizeof(T));
  }

  T* end() const { return reinterpret_cast<T*>(table_ + plan_.table_size()); }
  const T* const* table() const { return table_; }

  // A band whose row 0 and column 0 are source element (begin_y, begin_x); `count` lanes from
  // `lanes` on. Rows are pairs of rows if taps are paired: then `height` is their number, and the
  // first begins at row `pair_shift` of the source.
  void begin(const MapView& source, const Lanes& lanes, int64_t count, int64_t begin_y,
             int64_t begin_x, int64_t height, int64_t pair_shift = 0) {
    source_ = source;
    height_ = height;
    pair_shift_ = pair_shift;
    lanes_ = lanes;
    count_ = count;
    begin_y_ = begin_y;
    // With padding larger than the kernel, or a stride that skips the edge, columns may be cut.
    first_column_ = begin_x > 0 ? begin_x : 0;
    const int64_t end = begin_x + plan_.columns;
    columns_ = (end < source.width ? end : source.width) - first_column_;
    left_ = first_column_ - begin_x;
    next_ = begin_y < 0 ? -begin_y : 0;
    for (int64_t row = 0, slot = 0; row < plan_.rows; ++row) {
      const bool exists = row >= next_ && begin_y + row < height && columns_ > 0;
      table_[row] = exists ? ring_ + slot * row_ : zeros_;
      if (++slot == plan_.ring_rows) slot = 0;
    }
  }

  // Make rows up to `end` of the band ready; of those, the last ring_rows stay so.
  template <class S>
  void fill_until(int64_t end) {
    if (end > height_ - begin_y_) end = height_ - begin_y_;
    if (columns_ <= 0) return;
    const S* data = static_cast<const S*>(source_.data) + first_column_ * source_.stride_w;
    while (next_ < end) {
      const int64_t slot = next_ % plan_.ring_rows;
      int64_t rows = end - next_;
      if (rows > plan_.ring_rows - slot) rows = plan_.ring_rows - slot;
      T* to = ring_ + slot * row_ + left_ * V;
      const int64_t y = begin_y_ + next_;
      if constexpr (Taps::kPaired) {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t upper = 2 * (y + row) + pair_shift_, lower = upper + 1;
          pack_pair<V>(upper >= 0 ? data + upper * source_.stride_h : nullptr,
                       lower < source_.height ? data + lower * source_.stride_h : nullptr, lanes_,
                       count_, columns_, to + row * row_, block_);
        }
      } else if (plan_.blocks == 1) {
        pack_rows<T, V, S>(data, lanes_, y, y + rows, columns_, to, row_);
      } else {
        for (int64_t row = 0; row < rows; ++row)
          pack_channels<T, V, S>(data + lanes_.offset[0] + (y + row) * source_.stride_h,
                                 source_.stride_w, count_, columns_, to + row * row_, block_);
      }
      next_ += rows;
    }
  }

 private:
  const SourceBuffer plan_;
  const int64_t block_, row_;  // elements
  T* const ring_;
  T* const zeros_;
  const T** const table_;
  MapView source_;
  Lanes lanes_;
  int64_t height_ = 0, pair_shift_ = 0;
  int64_t count_ = 0, begin_y_ = 0, first_column_ = 0, columns_ = 0, left_ = 0, next_ = 0;
};

// The same columns, in block `block` of a row of blocks.
inline Axis in_block(Axis axis, int64_t block, int64_t columns) {
  axis.first += block * columns;
  axis.live_begin += block * columns;
  axis.live_end += block * columns;
  return axis;
}

// Outputs j in [first_j, first_j + count) of every phase, of one block of planes. `begin_y` is the
// source row at the beginning of `rows`, `place` the block's place in them.
template <class T, int V, class S, class Taps>
void convolve_block(const ConvolvePlan& plan, int64_t block, int64_t first_j, int64_t count,
                    const SourceRows<T, V, Taps>& rows, int64_t begin_y, int64_t place,
                    typename Taps::template Output<T>* result, Ahead* ahead) {
  const MapView& target = plan.target;
  const int64_t output_stride_y = plan.phases_y[0].output_stride;
  const int64_t output_stride_x = plan.phases_x[0].output_stride;
  const Lanes to = lanes_of<V>(plan.lanes, block, target, plan.batch, plan.channels);
  const int64_t row_begin = first_j * output_stride_y;
  int64_t row_end = (first_j + count) * output_stride_y;
  if (row_end > target.height) row_end = target.height;
  const bool direct = plan.direct_store && to.adjacent && to.count == V;
  Correlation<T, V, Taps> c;
  c.source_rows = rows.table();
  c.ahead = ahead;
  c.accumulate = false;
  const int64_t pattern = block % plan.lanes.num_patterns;
  c.bias = plan.bias ? static_cast<const T*>(plan.packed_bias) + pattern * V : nullptr;
  c.weight = static_cast<const T*>(plan.packed_weight) + pattern * plan.packed_taps * V;
  using Output = typename Taps::template Output<T>;
  Output* base;
  int64_t row, column;
  if (direct) {
    base = static_cast<Output*>(target.data) + to.offset[0] + row_begin * target.stride_h;
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
      c.y = axis_of(y, first_j, left < count ? left : count, begin_y, plan.source_height);
      c.x = in_block(axis_of(x, 0, x.count, plan.origin_x, plan.source.width), place,
                     plan.buffer.columns);
      c.weight_row = x.taps * V;
      c.weight_column = V;
      c.out = base + y.first_output * row + x.first_output * column;
      if (c.y.out_count > 0) correlate(c);
      c.weight += y.taps * x.taps * V;
    }
  if (!direct)
    unpack_rows<T, V, S>(result, to, row_begin, row_end, target.width,
                         static_cast<S*>(target.data));
}

// What one task of a convolution covers.
struct ConvolveTask {
  int64_t block, num_blocks;  // blocks of lanes
  int64_t first_j, last_j;    // outputs of every phase
};

inline ConvolveTask task_of(const ConvolvePlan& plan, int64_t task) {
  ConvolveTask t;
  int64_t band;
  if (plan.groups_per_image > 0) {
    // Neighbouring groups of channels one after the other, while their pages are near.
    const int64_t per_image = plan.lanes.blocks_per_image;
    const int64_t group = task % plan.groups_per_image, rest = task / plan.groups_per_image;
    const int64_t first = group * plan.buffer.blocks, left = per_image - first;
    t.num_blocks = left < plan.buffer.blocks ? left : plan.buffer.blocks;
    t.block = rest / plan.num_bands * per_image + first;
    band = rest % plan.num_bands;
  } else {
    t.num_blocks = 1;
    t.block = task / plan.num_bands;
    band = task % plan.num_bands;
  }
  const int64_t longest = plan.phases_y[0].count;
  t.first_j = band * plan.band;
  t.last_j = t.first_j + plan.band < longest ? t.first_j + plan.band : longest;
  return t;
}

// Channels of so many blocks of lanes, if `left` are left from the first of them on.
template <int V>
int64_t channels_of(int64_t num_blocks, const Lanes& lanes, int64_t left) {
  if (num_blocks == 1) return lanes.count;
  return left < num_blocks * V ? left : num_blocks * V;
}

// Channels of a task.
template <int V>
int64_t channels_of(const ConvolvePlan& plan, const ConvolveTask& task, const Lanes& lanes) {
  if (task.num_blocks == 1) return lanes.count;  // across images there are none in an image
  return channels_of<V>(task.num_blocks, lanes,
                        plan.channels - task.block % plan.lanes.blocks_per_image * V);
}

// Outputs [j, j + outputs) of a task, and the source rows that they read beyond those before them.
template <class T, int V, class S>
void look_ahead(const ConvolvePlan& plan, const ConvolveTask& task, int64_t j, int64_t steps,
                Ahead& ahead) {
  const MapView &source = plan.source, &target = plan.target;
  const Lanes from = lanes_of<V>(plan.lanes, task.block, source, plan.batch, plan.channels);
  const Lanes to = lanes_of<V>(plan.lanes, task.block, target, plan.batch, plan.channels);
  const int64_t count = channels_of<V>(plan, task, from);
  const int64_t step = plan.phases_y[0].out_step, output_stride = plan.phases_y[0].output_stride;
  const int64_t end_j = j + plan.chunk < task.last_j ? j + plan.chunk : task.last_j;
  const int64_t first_row = j == task.first_j ? j * step : (j - 1) * step + plan.span_y;
  int64_t row_begin = plan.origin_y + first_row;
  int64_t row_end = plan.origin_y + (end_j - 1) * step + plan.span_y;
  if (plan.paired) {
    row_begin = 2 * row_begin + plan.pair_shift;
    row_end = 2 * row_end + plan.pair_shift;
  }
  ahead.first.begin(planes_region<S>(source, from, count, row_begin, row_end), steps);
  ahead.second.begin(planes_region<S>(target, to, count, j * output_stride, end_j * output_stride),
                     steps, true);
}

template <class T, int V, class S, class Taps = SingleTaps>
void convolve_as(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  SourceRows<T, V, Taps> rows(plan.buffer, static_cast<T*>(scratch));
  auto* result = reinterpret_cast<typename Taps::template Output<T>*>(rows.end());
  const int64_t step = plan.phases_y[0].out_step;
  const bool loads_ahead = plan.groups_per_image > 0
                               ? plan.target.stride_c == 1
                               : plan.source.stride_w == 1 && plan.target.stride_w == 1;
  const Phase& columns = plan.phases_x[0];
  Ahead ahead;
  ConvolveTask task = task_of(plan, begin);
  for (int64_t at = begin; at < end; ++at) {
    const ConvolveTask next = at + 1 < end ? task_of(plan, at + 1) : task;
    const Lanes from = lanes_of<V>(plan.lanes, task.block, plan.source, plan.batch, plan.channels);
    const int64_t begin_y = plan.origin_y + task.first_j * step;
    rows.begin(plan.source, from, channels_of<V>(plan, task, from), begin_y, plan.origin_x,
               plan.source_height, plan.pair_shift);
    for (int64_t j = task.first_j; j < task.last_j; j += plan.chunk) {
      const int64_t outputs = task.last_j - j < plan.chunk ? task.last_j - j : plan.chunk;
      rows.template fill_until<S>((j + outputs - 1 - task.first_j) * step + plan.span_y);
      if (loads_ahead) {
        const int64_t steps =
            task.num_blocks * Tiling(columns.count).tiles(outputs) * plan.num_phases_x *
            steps_of_rows(plan.tap_rows, columns.taps, columns.out_step, columns.tap_step);
        if (j + outputs < task.last_j)
          look_ahead<T, V, S>(plan, task, j + outputs, steps, ahead);
        else if (at + 1 < end)
          look_ahead<T, V, S>(plan, next, next.first_j, steps, ahead);
      }
      for (int64_t place = 0; place < task.num_blocks; ++place)
        convolve_block<T, V, S, Taps>(plan, task.block + place, j, outputs, rows, begin_y, place,
                                      result, loads_ahead ? &ahead : nullptr);
    }
    task = next;
  }
}

// Rows [row_begin, row_begin + num_rows) of grad_output against the input, for one block of lanes:
// adds to the gradients in `partial`. `begin_y` is the input row at the beginning of `rows`,
// `place` the block's place in them.
template <class T, int V, class S>
void weight_gradient_block(const WeightGradientPlan& plan, int64_t block, int64_t row_begin,
                           int64_t num_rows, const SourceRows<T, V>& rows, int64_t begin_y,
                           int64_t place, T* widened, T* partial, Ahead* ahead) {
  const MapView& grad = plan.grad_output;
  const int64_t taps = plan.kernel_h * plan.kernel_w;
  const Lanes lanes = lanes_of<V>(plan.lanes, block, grad, plan.batch, plan.channels);
  Correlation<T, V> c;
  // Where lanes are adjacent and need no widening, grad_output is read where it stands.
  if (sizeof(S) == sizeof(T) && lanes.adjacent && lanes.count == V) {
    c.weight = static_cast<const T*>(grad.data) + lanes.offset[0] + row_begin * grad.stride_h;
    c.weight_row = grad.stride_h;
    c.weight_column = grad.stride_w;
  } else {
    pack_rows<T, V, S>(static_cast<const S*>(grad.data), lanes, row_begin, row_begin + num_rows,
                       grad.width, widened, grad.width * V);
    c.weight = widened;
    c.weight_row = grad.width * V;
    c.weight_column = V;
  }
  Vec<T, V> bias_sum = load_aligned<V>(partial + taps * V);
  for (int64_t row = 0; row < num_rows; ++row) {  // row by row, for the rounding error's sake
    Vec<T, V> even{}, odd{};                      // one sum alone would wait for itself
    const T* at = c.weight + row * c.weight_row;
    int64_t x = 0;
    for (; x + 1 < grad.width; x += 2, at += 2 * c.weight_column) {
      even += load<T, V>(at);
      odd += load<T, V>(at + c.weight_column);
    }
    if (x < grad.width) even += load<T, V>(at);
    bias_sum += even + odd;
  }
  store_aligned<V>(partial + taps * V, bias_sum);
  if (plan.y.count <= 0 || plan.x.count <= 0) return;

  Phase y = plan.y;
  y.taps = num_rows;
  y.origin += row_begin * plan.y.tap_step;
  c.source_rows = rows.table();
  c.ahead = ahead;
  c.bias = nullptr;
  c.accumulate = true;
  c.y = axis_of(y, 0, y.count, begin_y, plan.input.height);
  c.x = in_block(axis_of(plan.x, 0, plan.x.count, plan.x.origin, plan.input.width), place,
                 plan.buffer.columns);
  c.out = partial + (y.first_output * plan.kernel_w + plan.x.first_output) * V;
  c.out_row = plan.kernel_w * V;
  c.out_column = V;
  correlate(c);
}

// What a chunk of rows of a weight gradient is about.
struct GradientRows {
  int64_t first, num_blocks;  // blocks of lanes of an image
  int64_t image, row;         // of grad_output
  bool begins;                // the chunk before it is of another image or of other blocks
};

// The chunk `at` of rows of grad_output, and the input rows that it reads: all of them if it
// `begins`, else those beyond the chunk before it.
template <int V, class S>
void look_ahead(const WeightGradientPlan& plan, const GradientRows& at, int64_t blocks,
                int64_t span, int64_t steps, Ahead& ahead) {
  const MapView &input = plan.input, &grad = plan.grad_output;
  const int64_t block = at.image * blocks + at.first, row = at.row;
  const Lanes in = lanes_of<V>(plan.lanes, block, input, plan.batch, plan.channels);
  const Lanes out = lanes_of<V>(plan.lanes, block, grad, plan.batch, plan.channels);
  const int64_t count = channels_of<V>(at.num_blocks, in, plan.channels - at.first * V);
  const int64_t step = plan.y.tap_step, end = row + plan.chunk;
  const int64_t first_row = at.begins ? row * step : (row - 1) * step + span;
  ahead.first.begin(planes_region<S>(input, in, count, plan.y.origin + first_row,
                                     plan.y.origin + (end - 1) * step + span),
                    steps);
  ahead.second.begin(planes_region<S>(grad, out, count, row, end), steps);
}

template <class T, int V, class S>
void weight_gradient_as(const WeightGradientPlan& plan, int64_t begin, int64_t end, void* scratch) {
  SourceRows<T, V> rows(plan.buffer, static_cast<T*>(scratch));
  T* widened = rows.end();
  const int64_t elements = (plan.kernel_h * plan.kernel_w + 1) * V;
  const bool cross_images = plan.lanes.cross_images;
  const int64_t blocks = cross_images ? plan.lanes.num_blocks : plan.lanes.blocks_per_image;
  const int64_t height = plan.grad_output.height, step = plan.y.tap_step;
  const int64_t span = plan.y.count > 0 ? (plan.y.count - 1) * plan.y.out_step + 1 : 0;
  // Of larger planes too much comes at a time: on 56² with one image, in caches, it took up to half
  // as long again and saved nothing from memory.
  const auto small_planes = [](const MapView& map) {
    return map.stride_w == 1 && map.height * map.width * int64_t(sizeof(S)) <= kPageBytes;
  };
  const bool worth_it = (plan.input.stride_c == 1 && plan.grad_output.stride_c == 1) ||
                        (small_planes(plan.input) && small_planes(plan.grad_output));
  const bool loads_ahead = worth_it && !cross_images && plan.x.count > 0 && plan.y.count > 0;
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / plan.num_groups, group = task % plan.num_groups;
    const int64_t last_block = (group + 1) * blocks / plan.num_groups;
    T* partial = static_cast<T*>(plan.partial) + part * blocks * elements;
    // A part is a range of the rows of all images.
    const int64_t all_rows = (cross_images ? 1 : plan.batch) * height;
    const int64_t first_row = part * all_rows / plan.num_parts;
    const int64_t last_row = (part + 1) * all_rows / plan.num_parts;
    const auto blocks_from = [&](int64_t first) {
      const int64_t left = last_block - first;
      return left < plan.buffer.blocks ? left : plan.buffer.blocks;
    };
    for (int64_t first = group * blocks / plan.num_groups; first < last_block;
         first += plan.buffer.blocks) {
      const int64_t num_blocks = blocks_from(first);
      memset(static_cast<void*>(partial + first * elements), 0,
             size_t(num_blocks * elements) * sizeof(T));
      for (int64_t at = first_row; at < last_row;) {
        const int64_t image = at / height, row_begin = at % height;
        const int64_t rest = last_row - at;
        const int64_t row_end = height - row_begin < rest ? height : row_begin + rest;
        at += row_end - row_begin;
        const int64_t block = cross_images ? first : image * blocks + first;
        const Lanes from = lanes_of<V>(plan.lanes, block, plan.input, plan.batch, plan.channels);
        const int64_t count = channels_of<V>(num_blocks, from, plan.channels - first * V);
        const int64_t begin_y = plan.y.origin + row_begin * step;
        rows.begin(plan.input, from, count, begin_y, plan.x.origin, plan.input.height);
        for (int64_t row = row_begin; row < row_end; row += plan.chunk) {
          const int64_t num_rows = row_end - row < plan.chunk ? row_end - row : plan.chunk;
          rows.template fill_until<S>((row + num_rows - 1 - row_begin) * step + span);
          if (loads_ahead) {
            const int64_t tiles = Tiling(plan.x.count).tiles(plan.y.count);
            const int64_t steps =
                num_blocks * tiles *
                steps_of_rows(num_rows, plan.x.taps, plan.x.out_step, plan.x.tap_step);
            GradientRows next = {first, num_blocks, image, row + num_rows, false};
            if (row + num_rows == row_end) {  // another image, or other blocks
              next.begins = true;
              if (at == last_row) {
                next.first = first + num_blocks;
                next.num_blocks = blocks_from(next.first);
              }
              const int64_t next_row = at < last_row ? at : first_row;
              next.image = next_row / height;
              next.row = next_row % height;
            }
            if (next.num_blocks > 0) look_ahead<V, S>(plan, next, blocks, span, steps, ahead);
          }
          for (int64_t place = 0; place < num_blocks; ++place)
            weight_gradient_block<T, V, S>(plan, block + place, row, num_rows, rows, begin_y, place,
                                           widened, partial + (first + place) * elements,
                                           loads_ahead ? &ahead : nullptr);
        }
      }
    }
  }
}

template <class T, int V>
void pack_weights(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  with_storage<T>(plan.storage, [&](auto element) {
    pack_weights_as<T, V, decltype(element)>(plan, begin, end);
  });
}

template <class T, int V>
void convolve(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    if (plan.dense)
      convolve_dense_as<T, V, decltype(element)>(plan, begin, end, scratch);
    else if (plan.in_place)
      convolve_in_place_as<T, V, decltype(element)>(plan, begin, end);
    else if (plan.row_tiles)
      convolve_row_tiles<SingleRows<T, V, decltype(element)>>(plan, begin, end);
    else
      convolve_as<T, V, decltype(element)>(plan, begin, end, scratch);
  });
}

template <class T, int V>
void weight_gradient(const WeightGradientPlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    if (plan.in_place)
      weight_gradient_in_place_as<T, V, decltype(element)>(plan, begin, end);
    else
      weight_gradient_as<T, V, decltype(element)>(plan, begin, end, scratch);
  });
}

#if defined(LKA_AVX512_BF16)
template <int V>
void pack_paired_weights(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  pack_weights_as<float, V, bfloat16_t, PairedTaps>(plan, begin, end);
}

template <int V>
void convolve_paired(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  if (plan.row_tiles)
    convolve_row_tiles<InterleavedRows>(plan, begin, end);
  else
    convolve_as<float, V, bfloat16_t, PairedTaps>(plan, begin, end, scratch);
}
#endif

}  // namespace
