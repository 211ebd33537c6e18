// Depthwise convolution that reads channels_last maps where they stand, for kernels with few taps
// or one row of them: with any steps, and what row_tiles_kernel.h leaves of unit steps and
// dilation; and the weight gradients of one to three taps in a row. Most other kernels unpack the
// source first, which pays where each element meets many taps; with stride 2 an element meets a
// quarter as many.
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

// Where the rows lie that come after the one at hand, in elements from what is read and written
// now: of the target the next, of the source `rows` that only the next needs. What stands in these
// places is loaded while pixels are computed, into the second cache, the target as if to be read:
// asked for as what will be written it would come into the first. Elements meet few taps here, and
// a Prefetcher, which keeps count, would take as long as these.
struct RowsAhead {
  int64_t channels, source_pixel, target_pixel;
  int64_t target, source, rows, source_row;

  // For the block of channels that begins with `channel`, its share of what from_times · kFrom
  // pixels of the source and to_times · kTo of the target, all side by side, have in these places.
  template <int V, int kFrom, int kTo, class S>
  __attribute__((always_inline)) void load(const S* from, int64_t from_times, const S* to,
                                           int64_t to_times, int64_t channel) const {
    to += target;
    for (int64_t n = 0; n < to_times; ++n, to += kTo * target_pixel)
      share<V, kTo>(to, target_pixel, channel);
    from += source;
    for (int64_t row = 0; row < rows; ++row, from += source_row) {
      const S* at = from;
      for (int64_t n = 0; n < from_times; ++n, at += kFrom * source_pixel)
        share<V, kFrom>(at, source_pixel, channel);
    }
  }

 private:
  template <int V, int kPixels, class S>
  __attribute__((always_inline)) void share(const S* at, int64_t pixel, int64_t channel) const {
    if (pixel == channels) {  // in the order of memory, which the processor follows by itself
      constexpr int kLines = (kPixels * V * sizeof(S) + 63) / 64;
      const char* const line = reinterpret_cast<const char*>(at + kPixels * channel);
#pragma GCC unroll kUnroll
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
    } else {
#pragma GCC unroll kUnroll
      for (int i = 0; i < kPixels; ++i) __builtin_prefetch(at + channel + i * pixel, 0, 2);
    }
  }
};

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

  template <int V>
  void next_block(int64_t weight_block) {
    source += V;
    out += V;
    weight += weight_block;
    if (bias) bias += V;
  }

  // kWhole: all channels exist.
  template <int V, int kOutputs, bool kWhole>
  void sum(int channels) const {
    const Vec<T, V> start = bias ? load_aligned<V>(bias) : Vec<T, V>{};
    Vec<T, V> sums[kOutputs];
#pragma GCC unroll kUnroll
    for (int t = 0; t < kOutputs; ++t) sums[t] = start;
    for (int64_t m = 0; m < rows; ++m) {
      const S* from = source + m * source_row;
      const T* w = weight + m * weight_row;
      for (int64_t n = 0; n < columns; ++n, from += source_column, w += V) {
        Vec<T, V> tap = load_aligned<V>(w);
        keep_in_register(tap);
#pragma GCC unroll kUnroll
        for (int t = 0; t < kOutputs; ++t)
          sums[t] += tap * (kWhole ? load<T, V, S>(from + t * source_output)
                                   : load_some<T, V, S>(from + t * source_output, channels));
      }
    }
#pragma GCC unroll kUnroll
    for (int t = 0; t < kOutputs; ++t)
      store_some<T, V, S>(out + t * out_column, sums[t], kWhole ? V : channels);
  }
};

// What networks have, known when it is compiled: one phase of outputs, or two that interleave, with
// kTaps and kMoreTaps taps in a row. Output j of a phase begins at source column j·kStep, of the
// second kLater further right. kMost outputs of a phase, as registers allow.
template <int kStep_, int kTaps_, int kMoreTaps_ = 0, int kLater_ = 0, int kMost_ = 7>
struct RowShape {
  static constexpr int kStep = kStep_, kPhases = kMoreTaps_ > 0 ? 2 : 1;
  static constexpr int kTaps[] = {kTaps_, kMoreTaps_};
  static constexpr int kFirst[] = {0, kLater_};
  static constexpr int kMostTaps = kTaps_ > kMoreTaps_ ? kTaps_ : kMoreTaps_;
  // Outputs of a phase side by side: sums and taps fill the registers. Maps of networks are
  // multiples of 7.
  static constexpr int kOutputs = LKA_VECTOR_BYTES == 64 || kPhases == 1 ? kMost_ : 4;
  static constexpr int end(int phase) { return kFirst[phase] + kTaps[phase]; }
  static constexpr int kColumns =
      (kOutputs - 1) * kStep + (kPhases > 1 && end(1) > end(0) ? end(1) : end(0));
  static constexpr bool kLong = false;
  static constexpr int64_t columns(int64_t) { return kColumns; }
};

// Any number of neighbouring taps in a row, as many at a time as registers hold.
struct LongRow : RowShape<1, 7, 0, 0, LKA_VECTOR_BYTES == 64 ? 14 : 7> {
  static constexpr bool kLong = true;
  static constexpr int64_t columns(int64_t taps) { return kOutputs - 1 + taps; }
};

// Sums of one block of channels for a row of such a shape. A source column is read once for all
// outputs that it meets.
template <class T, class S, class Row>
struct InPlaceTile {
  const S* source;  // of kernel row 0 and the first column
  int64_t rows, source_row, source_column;
  int64_t first_column, end_column;  // of the row's columns those that the source has
  int64_t outputs[2];                // of phases, those that the target has
  const T* weight[2];                // of phases
  int64_t row_taps;                  // of a long row
  const T* bias;
  S* out;
  int64_t out_column, out_phase;

  template <int V>
  void next_block(int64_t weight_block) {
    source += V;
    out += V;
    weight[0] += weight_block;
    weight[1] += weight_block;
    if (bias) bias += V;
  }

  template <int V>
  using Sums = Vec<T, V>[Row::kPhases][Row::kOutputs];

  // Adds what a row of taps of this shape meets, whose columns begin at `from`.
  template <class Shape, int V, bool kWhole>
  __attribute__((always_inline)) void add(const S* from, const T* const (&first_tap)[2],
                                          int64_t first, int64_t end, int channels,
                                          Sums<V>& sums) const {
    Vec<T, V> taps[Shape::kPhases][Shape::kMostTaps];
#pragma GCC unroll kUnroll
    for (int p = 0; p < Shape::kPhases; ++p)
#pragma GCC unroll kUnroll
      for (int n = 0; n < Shape::kTaps[p]; ++n) taps[p][n] = load_aligned<V>(first_tap[p] + n * V);
#pragma GCC unroll kUnrollColumns
    for (int s = 0; s < Shape::kColumns; ++s, from += source_column) {
      if (!kWhole && (s < first || s >= end)) continue;
      Vec<T, V> value = kWhole ? load<T, V, S>(from) : load_some<T, V, S>(from, channels);
      keep_in_register(value);
#pragma GCC unroll kUnroll
      for (int p = 0; p < Shape::kPhases; ++p)
#pragma GCC unroll kUnroll
        for (int t = 0; t < Shape::kOutputs; ++t) {
          const int n = s - Shape::kFirst[p] - t * Shape::kStep;
          if (n >= 0 && n < Shape::kTaps[p]) sums[p][t] += taps[p][n] * value;
        }
    }
  }

  // The same for a long row.
  template <int V, bool kWhole>
  __attribute__((always_inline)) void add_long(const S* from, const T* tap, int channels,
                                               Sums<V>& sums) const {
    int64_t first = first_column, end = end_column, left = row_taps;
    const auto some = [&](auto many) __attribute__((always_inline)) {
      add<RowShape<1, decltype(many)::value, 0, 0, Row::kOutputs>, V, kWhole>(
          from, {tap, tap}, first, end, channels, sums);
    };
    constexpr int kTogether = Row::kMostTaps;
    for (; left >= kTogether; left -= kTogether) {
      some(Constant<kTogether>{});
      from += kTogether * source_column;
      tap += kTogether * V;
      first -= kTogether;
      end -= kTogether;
    }
    switch (left) {
      case 1: some(Constant<1>{}); break;
      case 2: some(Constant<2>{}); break;
      case 3: some(Constant<3>{}); break;
      case 4: some(Constant<4>{}); break;
      case 5: some(Constant<5>{}); break;
      case 6: some(Constant<6>{}); break;
    }
  }

  // kWhole: all columns, channels and outputs exist.
  template <int V, bool kWhole>
  void sum(int channels) const {
    const Vec<T, V> start = bias ? load_aligned<V>(bias) : Vec<T, V>{};
    Sums<V> sums;
#pragma GCC unroll kUnroll
    for (int p = 0; p < Row::kPhases; ++p)
#pragma GCC unroll kUnroll
      for (int t = 0; t < Row::kOutputs; ++t) sums[p][t] = start;
    for (int64_t m = 0; m < rows; ++m) {
      const S* from = source + m * source_row;
      if constexpr (Row::kLong) {
        add_long<V, kWhole>(from, weight[0] + m * row_taps * V, channels, sums);
      } else {
        const T* const first_tap[2] = {weight[0] + m * Row::kTaps[0] * V,
                                       weight[1] + m * Row::kTaps[1] * V};
        add<Row, V, kWhole>(from, first_tap, first_column, end_column, channels, sums);
      }
    }
#pragma GCC unroll kUnroll
    for (int p = 0; p < Row::kPhases; ++p)
#pragma GCC unroll kUnroll
      for (int t = 0; t < Row::kOutputs; ++t)
        if (kWhole || t < outputs[p])
          store_some<T, V, S>(out + t * out_column + p * out_phase, sums[p][t],
                              kWhole ? V : channels);
  }
};

// Phases of columns that are taken together where outputs meet one tap at most.
constexpr int64_t kMostSinglePhases = 8;

// A row of outputs of one phase of rows.
template <class T, int V, class S>
struct InPlaceRow {
  const ConvolvePlan& plan;
  const S* source;  // where kernel row 0 that meets the source begins
  int64_t rows, source_row;
  const T* weight;            // of all phases of columns, each [taps_y][taps][V]
  int64_t taps_y, first_tap;  // first_tap: the kernel row that source and rows begin with
  S* out;
  const RowsAhead& ahead;

  // How far the block with `left` channels from its first one on reaches back into the one before.
  int64_t overlap(int64_t left) const {
    return plan.lanes.last_overlaps && left < V ? V - left : 0;
  }
  const T* bias() const { return plan.bias ? static_cast<const T*>(plan.packed_bias) : nullptr; }
  const T* weight_of(int64_t phase) const {
    const T* w = weight;
    for (int64_t p = 0; p < phase; ++p) w += taps_y * plan.phases_x[p].taps * V;
    return w + first_tap * plan.phases_x[phase].taps * V;
  }

  // Outputs of one phase of columns, whatever its steps.
  void outputs(int64_t phase) const {
    const Phase& x = plan.phases_x[phase];
    InPlaceSums<T, S> sums;
    sums.source_row = source_row;
    sums.source_column = x.tap_step * plan.source.stride_w;
    sums.source_output = x.out_step * plan.source.stride_w;
    sums.weight_row = x.taps * V;
    sums.out_column = x.output_stride * plan.target.stride_w;
    const int64_t weight_block = plan.packed_taps * V;
    const T* const first_weight = weight_of(phase);
    // The first phase loads ahead for all: their pixels lie between its own.
    const int64_t source_times = phase > 0 ? 0 : x.out_step;
    const int64_t target_times = phase > 0 ? 0 : x.output_stride;
    const auto some = [&](auto many, int64_t output, TapRange columns) {
      sums.columns = columns.end > columns.begin ? columns.end - columns.begin : 0;
      sums.rows = sums.columns > 0 ? rows : 0;
      sums.source = source + (x.origin + output * x.out_step + columns.begin * x.tap_step) *
                                 plan.source.stride_w;
      sums.weight = first_weight + columns.begin * V;
      sums.bias = bias();
      sums.out = out + x.first_output * plan.target.stride_w + output * sums.out_column;
      const S* const from = sums.source;
      S* const to = sums.out;
      constexpr int kMany = decltype(many)::value;
      // All blocks of some pixels, one after the other, in the order of memory.
      for (int64_t left = plan.channels; left > 0; left -= V) {
        ahead.template load<V, kMany, kMany>(from, source_times, to, target_times,
                                             plan.channels - left);
        const int64_t back = overlap(left);
        sums.source -= back;
        sums.out -= back;
        if (left + back >= V)
          sums.template sum<V, kMany, true>(V);
        else
          sums.template sum<V, kMany, false>(int(left));
        sums.template next_block<V>(weight_block);
      }
    };
    const OutputRange whole = whole_outputs(x, plan.source.width);
    constexpr int kOutputs = 4;  // side by side: enough for sums not to wait for themselves
    for (int64_t output = 0; output < x.count;)
      if (output >= whole.begin && output + kOutputs <= whole.end) {
        some(Constant<kOutputs>{}, output, {0, x.taps});
        output += kOutputs;
      } else {
        some(Constant<1>{}, output, taps_of(x, output, plan.source.width));
        ++output;
      }
  }

  // Tiles of Row::kPhases phases of columns from `phase` on; the last of several overlaps the one
  // before. Of dilated taps, every `apart`-th output from `first` on, which meet every so many
  // columns.
  template <class Row>
  void tiles(int64_t phase, int64_t first, int64_t apart) const {
    const Phase& x = plan.phases_x[phase];                  // the first phase has the most outputs
    const int64_t out_apart = x.out_step == 1 ? apart : 1;  // else steps of outputs are the taps'
    const int64_t width = plan.source.width, columns = Row::columns(x.taps);
    InPlaceTile<T, S, Row> tile;
    tile.rows = rows;
    tile.source_row = source_row;
    tile.source_column = apart * plan.source.stride_w;
    tile.out_column = x.output_stride * out_apart * plan.target.stride_w;
    tile.out_phase = plan.target.stride_w;
    tile.row_taps = x.taps;
    const int64_t weight_block = plan.packed_taps * V;
    const T* const weights[2] = {weight_of(phase), weight_of(phase + Row::kPhases - 1)};
    S* const target = out + (x.first_output + first * x.output_stride) * plan.target.stride_w;
    const auto outputs_of = [&](int p) {
      return ceil_div(plan.phases_x[phase + p].count - first, out_apart);
    };
    const int64_t count = outputs_of(0), fewest = outputs_of(Row::kPhases - 1);
    const int64_t last = count > Row::kOutputs ? count - Row::kOutputs : 0;
    // A tile loads ahead as much as it has, but in the order of memory: where outputs are apart,
    // the tiles of each part of them take their part of the row. Of several phases the first takes
    // all.
    constexpr int kFrom = Row::kOutputs * Row::kStep, kTo = Row::kOutputs * Row::kPhases;
    const int64_t source_times = phase > 0 ? 0 : apart / out_apart;
    const int64_t target_times = phase > 0 ? 0 : x.output_stride / Row::kPhases;
    const int64_t before = first * ceil_div(ceil_div(x.count, out_apart), Row::kOutputs);
    const int64_t source_part = source_times * kFrom * plan.source.stride_w;
    const int64_t target_part = target_times * kTo * plan.target.stride_w;
    const S* source_ahead = source + before * source_part;
    const S* target_ahead = out + before * target_part;
    // Tiles from begin to end, both included, have all their outputs and columns.
    const int64_t origin = x.origin + first, step = Row::kStep * apart;
    const int64_t begin = origin < 0 ? ceil_div(-origin, step) : 0;
    const int64_t room = width - 1 - origin - (columns - 1) * apart;
    const int64_t fit = room < 0 ? -1 : room / step, most = fewest - Row::kOutputs;
    const int64_t end = fit < most ? fit : most;
    // All blocks of `many` tiles from `output` on.
    const auto some = [&](int64_t output, int64_t many,
                          auto inside) __attribute__((always_inline)) {
      constexpr bool kInside = decltype(inside)::value != 0;
      const S* from = source + (origin + output * step) * plan.source.stride_w;
      S* to = target + output * tile.out_column;
      for (; many > 0; --many) {
        tile.source = from;
        tile.out = to;
        tile.bias = bias();
        tile.weight[0] = weights[0];
        tile.weight[1] = weights[1];
        for (int64_t left = plan.channels; left > 0; left -= V) {
          ahead.template load<V, kFrom, kTo>(source_ahead, source_times, target_ahead, target_times,
                                             plan.channels - left);
          const int64_t back = overlap(left);
          tile.source -= back;
          tile.out -= back;
          if (kInside && left + back >= V)
            tile.template sum<V, true>(V);
          else
            tile.template sum<V, false>(left + back < V ? int(left) : V);
          tile.template next_block<V>(weight_block);
        }
        source_ahead += source_part;
        target_ahead += target_part;
        from += Row::kOutputs * step * plan.source.stride_w;
        to += Row::kOutputs * tile.out_column;
      }
    };
    for (int64_t next = 0; next < count;) {
      const int64_t output = next < last ? next : last;
      const bool inside = output >= begin && output <= end;
      const int64_t column = origin + output * step;
      tile.first_column = column < 0 ? ceil_div(-column, apart) : 0;
      tile.end_column = ceil_div(width - column, apart);
      for (int p = 0; p < Row::kPhases; ++p) tile.outputs[p] = outputs_of(p) - output;
      if (inside) {
        const int64_t many = (end - output) / Row::kOutputs + 1;
        some(output, many, Constant<1>{});
        next = output + many * Row::kOutputs;
      } else {
        some(output, 1, Constant<0>{});
        next += Row::kOutputs;
      }
    }
  }

  // All phases together, if they have this shape.
  template <class Row>
  bool tiled() const {
    const Phase* const x = plan.phases_x;
    if (plan.num_phases_x != Row::kPhases) return false;
    for (int p = 0; p < Row::kPhases; ++p) {
      if (x[p].taps != Row::kTaps[p] || x[p].out_step != Row::kStep || x[p].tap_step != 1 ||
          x[p].origin - x[0].origin != Row::kFirst[p])
        return false;
    }
    tiles<Row>(0, 0, 1);
    return true;
  }

  // One phase whose outputs or taps have unit steps, or both the same.
  template <class Row>
  void unit_tiles(int64_t phase) const {
    const Phase& x = plan.phases_x[phase];
    const int64_t apart = x.taps == 1 ? x.out_step : x.tap_step;  // of one, the step means nothing
    const int64_t ways = x.out_step == 1 ? apart : 1;
    for (int64_t first = 0; first < ways && first < x.count; ++first)
      tiles<Row>(phase, first, apart);
  }
  bool unit_tiled(int64_t phase) const {
    const Phase& x = plan.phases_x[phase];
    if (x.out_step != 1 && x.out_step != x.tap_step && x.taps != 1) return false;
    const int64_t count = x.out_step == 1 ? ceil_div(x.count, x.tap_step) : x.count;
    switch (x.taps) {
      case 1: unit_tiles<RowShape<1, 1>>(phase); return true;
      case 2:  // so few that what a tile takes beside them tells
        if (count >= 2 * LongRow::kOutputs)
          unit_tiles<RowShape<1, 2, 0, 0, LongRow::kOutputs>>(phase);
        else
          unit_tiles<RowShape<1, 2>>(phase);
        return true;
      case 3:  // dilated, maps of 14 or 28 columns leave too few for tiles of 7
        if (ceil_div(count, 5) * 6 < ceil_div(count, 7) * 8)
          unit_tiles<RowShape<1, 3, 0, 0, 5>>(phase);
        else
          unit_tiles<RowShape<1, 3>>(phase);
        return true;
      case 4: unit_tiles<RowShape<1, 4>>(phase); return true;
      case 5: unit_tiles<RowShape<1, 5>>(phase); return true;
      case 7: unit_tiles<RowShape<1, 7>>(phase); return true;
      default:
        if (x.taps < 7) return false;
        unit_tiles<LongRow>(phase);
        return true;
    }
  }

  // Of outputs that meet one tap at most, those of one phase of columns: outputs [begin, begin +
  // count) of it meet the source, `offset` elements from where the first phase's would without
  // padding.
  struct SingleTap {
    const T* weight;
    int64_t begin, offset;
    uint64_t count;
  };

  // Pixel by pixel, the order of memory.
  void single_taps() const {
    SingleTap taps[kMostSinglePhases];
    const int64_t step = plan.phases_x[0].out_step, phases = plan.num_phases_x;
    for (int64_t p = 0; p < phases; ++p) {
      const Phase& x = plan.phases_x[p];
      const OutputRange meets = whole_outputs(x, plan.source.width);
      const int64_t count = rows > 0 && x.taps > 0 ? meets.end - meets.begin : 0;
      taps[p] = {weight_of(p), meets.begin, x.origin * plan.source.stride_w, uint64_t(count)};
    }
    const bool one_block = plan.channels == V, strided = step > 1;
    const auto pixels = [&](int64_t j, int64_t end, int64_t some_phases) {
      const S* from = source + j * step * plan.source.stride_w;
      S* to = out + j * phases * plan.target.stride_w;
      const auto some = [&](auto block, auto bias_of, auto steps) {
        single_taps_of<decltype(block)::value != 0, decltype(bias_of)::value != 0,
                       decltype(steps)::value != 0>(taps, some_phases, j, end, from, to);
      };
      const auto blocks = [&](auto bias_of, auto steps) {
        if (one_block)
          some(Constant<1>{}, bias_of, steps);
        else
          some(Constant<0>{}, bias_of, steps);
      };
      const auto steps = [&](auto bias_of) {
        if (strided)
          blocks(bias_of, Constant<1>{});
        else
          blocks(bias_of, Constant<0>{});
      };
      if (plan.bias)
        steps(Constant<1>{});
      else
        steps(Constant<0>{});
    };
    const int64_t groups = plan.target.width / phases;
    pixels(0, groups, phases);
    pixels(groups, groups + 1, plan.target.width % phases);
  }

  // Outputs [j, end) of `phases` phases side by side. What does not change from pixel to pixel is
  // known when it is compiled: a vector takes no more than a product beside it.
  template <bool kOneBlock, bool kBias, bool kStrided>
  void single_taps_of(const SingleTap* taps, int64_t phases, int64_t j, int64_t end, const S* from,
                      S* to) const {
    const int64_t whole = plan.channels / V * V, rest = plan.channels - whole;
    const int64_t back = overlap(rest), weight_block = plan.packed_taps * V;
    const int64_t from_step = plan.phases_x[0].out_step * plan.source.stride_w;
    const int64_t to_step = plan.target.stride_w;
    const T* const first_bias = bias();
    const auto pixel = [&](auto meets, const S* at, const T* w) __attribute__((always_inline)) {
      constexpr bool kMeets = decltype(meets)::value != 0;
      const T* b = first_bias;
      const auto some = [&](int64_t channel, int count) __attribute__((always_inline)) {
        Vec<T, V> sum = kBias ? load_aligned<V>(b) : Vec<T, V>{};
        if (kMeets) sum += load_aligned<V>(w) * load_some<T, V, S>(at + channel, count);
        // Memory in its order comes by itself, not so every so many pixels.
        if (kStrided) ahead.template load<V, 1, 1>(at, 1, to, 0, channel);
        store_some<T, V, S>(to + channel, sum, count);
        if (kMeets) w += weight_block;
        if (kBias) b += V;
      };
      if (kOneBlock) return some(0, V);
      for (int64_t c = 0; c < whole; c += V) some(c, V);
      if (rest > 0) some(whole - back, back > 0 ? V : int(rest));
    };
    for (; j < end; ++j, from += from_step)
      for (const SingleTap *tap = taps, *last = taps + phases; tap < last; ++tap, to += to_step) {
        const S* const at = from + tap->offset;
        if (uint64_t(j - tap->begin) < tap->count)
          pixel(Constant<1>{}, at, tap->weight);
        else
          pixel(Constant<0>{}, at, tap->weight);
      }
  }

  void convolve() const {
    // 3, 5 and 7 taps with stride 2 and the usual padding, forward and backward.
    if (tiled<RowShape<2, 3>>() || tiled<RowShape<2, 5>>() || tiled<RowShape<1, 1, 2>>() ||
        tiled<RowShape<1, 3, 2, 1>>() || tiled<RowShape<2, 7>>() || tiled<RowShape<1, 3, 4>>())
      return;
    for (int64_t p = 0; p < plan.num_phases_x; ++p)
      if (!unit_tiled(p)) outputs(p);
  }
};

// A task is one band of rows of the target of one image.
template <class T, int V, class S>
void convolve_in_place_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const MapView &source = plan.source, &target = plan.target;
  const auto one_at_most = [](const Phase* phases, int64_t count) {
    for (int64_t p = 0; p < count; ++p)
      if (phases[p].taps > 1) return false;
    return true;
  };
  const bool single = plan.num_phases_x <= kMostSinglePhases &&
                      one_at_most(plan.phases_y, plan.num_phases_y) &&
                      one_at_most(plan.phases_x, plan.num_phases_x);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const S* from = static_cast<const S*>(source.data) + image * source.stride_b;
    S* to = static_cast<S*>(target.data) + image * target.stride_b;
    for (int64_t row = first; row < last; ++row) {
      const int64_t phase = row % plan.phases_y[0].output_stride;
      const Phase& y = plan.phases_y[phase];
      const int64_t j = row / y.output_stride;
      const TapRange taps = taps_of(y, j, source.height);
      const int64_t first_read = y.origin + j * y.out_step + taps.begin * y.tap_step;
      // Meanwhile the next row, and what it reads beyond this one, come into the cache.
      RowsAhead ahead = {};
      ahead.channels = plan.channels;
      ahead.source_pixel = source.stride_w;
      ahead.target_pixel = target.stride_w;
      const bool same_task = row + 1 < last;
      if (same_task || task + 1 < end) {
        const int64_t next = same_task ? row + 1 : (task + 1) % plan.num_bands * plan.band;
        const int64_t images = same_task ? 0 : (task + 1) / plan.num_bands - image;
        const int64_t next_read = plan.origin_y + next / y.output_stride * y.out_step;
        const int64_t read = plan.origin_y + j * y.out_step + plan.span_y;
        const int64_t next_end = next_read + plan.span_y;
        int64_t from_row = same_task && read > next_read ? read : next_read;
        if (from_row < 0) from_row = 0;
        const int64_t end_row = next_end < source.height ? next_end : source.height;
        ahead.target = images * target.stride_b + (next - row) * target.stride_h;
        ahead.source = images * source.stride_b + (from_row - first_read) * source.stride_h;
        ahead.rows = end_row - from_row;
        ahead.source_row = source.stride_h;
      }
      const T* weight = static_cast<const T*>(plan.packed_weight);
      for (int64_t py = 0; py < phase; ++py)
        for (int64_t px = 0; px < plan.num_phases_x; ++px)
          weight += plan.phases_y[py].taps * plan.phases_x[px].taps * V;
      const InPlaceRow<T, V, S> in_place = {plan,
                                            from + first_read * source.stride_h,
                                            taps.end > taps.begin ? taps.end - taps.begin : 0,
                                            y.tap_step * source.stride_h,
                                            weight,
                                            y.taps,
                                            taps.begin,
                                            to + row * target.stride_h,
                                            ahead};
      if (single)
        in_place.single_taps();
      else
        in_place.convolve();
    }
  }
}

// Kernel rows whose gradients are summed together, by the taps of a row.
constexpr int tap_rows_together(int64_t taps) { return taps == 1 ? 7 : int(taps); }

// Columns of grad_output between two steps of loading ahead, whose cost stands beside few products;
// but where each meets more of the input, so many lines at once would stall the processor.
constexpr int columns_per_step(int64_t columns_apart, int64_t taps, size_t element) {
  return columns_apart == 1 ? 4 : element == 2 || taps < 3 ? 2 : 1;
}

// Rows [row, row + rows) of grad_output of one image against what kTapRows kernel rows of kTaps
// taps from first_tap_row on meet, for one block of channels: added to the gradients of those taps,
// and where `bias` is wanted to that of the bias. Where kApart is 1 or 2, neighbouring columns of
// grad_output meet input columns that are so far apart, neighbouring taps neighbouring ones: a
// column shares kTaps - kApart of its own with the next.
template <class T, int V, class S, int kApart, int kTaps>
struct InPlaceProducts {
  static constexpr int kTapRows = tap_rows_together(kTaps);
  static constexpr int kShared = kApart ? kTaps - kApart : 0;
  static_assert(kShared >= 0, "columns are read one after the other");
  static constexpr int kColumnsPerStep = columns_per_step(kApart, kTaps, sizeof(S));
  const WeightGradientPlan& plan;
  const S *grad, *input;  // at (0, 0)
  int channels;           // in the block; all of it unless kApart is 0
  int repeated;           // of them the first are in the block before, too, and not added

  Vec<T, V> element(const S* at) const {
    return kApart ? load<T, V, S>(at) : load_some<T, V, S>(at, channels);
  }

  using Sums = Vec<T, V>[kTapRows][kTaps];

  // Any steps: every tap reads for itself. `meets`: the rows that exist.
  __attribute__((always_inline)) void add_row(const S* grad_row,
                                              const S* const (&input_row)[kTapRows],
                                              const bool (&meets)[kTapRows], bool all, Sums& sums,
                                              Vec<T, V>& total, Ahead& ahead) const {
    const Phase& x = plan.x;
    const MapView& map = plan.input;
    const int64_t count = plan.grad_output.width, stride = map.stride_w;
    // Columns of grad_output of which every tap meets a column of the input.
    const Phase as_outputs = {0, 1, count, kTaps, x.origin, x.tap_step, x.out_step, 0, 1};
    const OutputRange whole = whole_outputs(as_outputs, map.width);
    for (int64_t c = 0; c < count; ++c) {
      const Vec<T, V> g = element(grad_row + c * plan.grad_output.stride_w);
      if (c % kColumnsPerStep == 0) ahead.step_runs();
      total += g;
      const bool inside = all && c >= whole.begin && c < whole.end;
#pragma GCC unroll kUnroll
      for (int n = 0; n < kTaps; ++n) {
        const int64_t column = x.origin + c * x.tap_step + n * x.out_step;
        if (inside) {
#pragma GCC unroll kUnroll
          for (int m = 0; m < kTapRows; ++m)
            sums[m][n] += g * element(input_row[m] + column * stride);
        } else if (column >= 0 && column < map.width) {
#pragma GCC unroll kUnroll
          for (int m = 0; m < kTapRows; ++m)
            if (meets[m]) sums[m][n] += g * element(input_row[m] + column * stride);
        }
      }
    }
  }

  // Of what a column of grad_output meets, the first kShared columns are kept from the one before.
  // What does not exist is zero.
  __attribute__((always_inline)) void add_row_of_shared(const S* grad_row,
                                                        const S* const (&input_row)[kTapRows],
                                                        const bool (&meets)[kTapRows], Sums& sums,
                                                        Vec<T, V>& total, Ahead& ahead) const {
    static const S zeros[V] = {};
    const MapView& map = plan.input;
    const int64_t count = plan.grad_output.width, origin = plan.x.origin;
    const auto read = [&](int m, int64_t column) __attribute__((always_inline)) {
      const bool exists = meets[m] && column >= 0 && column < map.width;
      return element(exists ? input_row[m] + column * map.stride_w : zeros);
    };
    Vec<T, V> shared[kTapRows][kShared > 0 ? kShared : 1];
#pragma GCC unroll kUnroll
    for (int m = 0; m < kTapRows; ++m)
#pragma GCC unroll kUnroll
      for (int n = 0; n < kShared; ++n) shared[m][n] = read(m, origin + n);
    // One column; `read_tap` gives what tap n of row m meets, if it is not shared.
    const auto add_column = [&](const S* at, auto read_tap) __attribute__((always_inline)) {
      Vec<T, V> g = element(at);
      keep_in_register(g);
      total += g;
#pragma GCC unroll kUnroll
      for (int m = 0; m < kTapRows; ++m) {
        if (kTaps == 1 && !meets[m]) continue;  // of many rows, few may exist
        Vec<T, V> value[kTaps];
#pragma GCC unroll kUnroll
        for (int n = 0; n < kTaps; ++n) {
          value[n] = n < kShared ? shared[m][n] : read_tap(m, n);
          sums[m][n] += g * value[n];
        }
#pragma GCC unroll kUnroll
        for (int n = 0; n < kShared; ++n) shared[m][n] = value[n + kApart];
      }
    };
    const auto add_with_care = [&](int64_t c, int64_t end) __attribute__((always_inline)) {
      for (; c < end; ++c)
        add_column(grad_row + c * plan.grad_output.stride_w,
                   [&](int m, int n)
                       __attribute__((always_inline)) { return read(m, origin + c * kApart + n); });
    };
    // Columns of which all that is not shared lies within the row.
    int64_t begin = origin + kShared < 0 ? ceil_div(-origin - kShared, kApart) : 0;
    int64_t end = map.width >= origin + kTaps ? (map.width - origin - kTaps) / kApart + 1 : 0;
    if (begin > count) begin = count;
    if (end > count) end = count;
    if (end < begin) end = begin;
    add_with_care(0, begin);
    const S *at = grad_row + begin * plan.grad_output.stride_w, *next[kTapRows];
    int64_t step[kTapRows];  // a row that does not exist is a vector of zeros again and again
    for (int m = 0; m < kTapRows; ++m) {
      step[m] = meets[m] ? map.stride_w : 0;
      next[m] =
          meets[m] ? input_row[m] + (origin + begin * kApart + kShared) * map.stride_w : zeros;
    }
    const auto add_next = [&]() __attribute__((always_inline)) {
      add_column(at, [&](int m, int) __attribute__((always_inline)) {
        const Vec<T, V> value = element(next[m]);
        next[m] += step[m];
        keep_in_register(next[m]);
        return value;
      });
      at += plan.grad_output.stride_w;
      keep_in_register(at);
    };
    int64_t c = begin;
    for (; c + kColumnsPerStep <= end; c += kColumnsPerStep) {
      ahead.step_runs();
#pragma GCC unroll kUnroll
      for (int i = 0; i < kColumnsPerStep; ++i) add_next();
    }
    if (c < end) ahead.step_runs();
    for (; c < end; ++c) add_next();
    add_with_care(end, count);
  }

  void add(int64_t row, int64_t rows, int64_t first_tap_row, T* gradient, T* bias,
           Ahead& ahead) const {
    const Phase& y = plan.y;
    const MapView& map = plan.input;
    Sums sums;
    Vec<T, V> total = {};
#pragma GCC unroll kUnroll
    for (int m = 0; m < kTapRows; ++m)
#pragma GCC unroll kUnroll
      for (int n = 0; n < kTaps; ++n) sums[m][n] = Vec<T, V>{};
    for (int64_t r = row; r < row + rows; ++r) {
      const S* const grad_row = grad + r * plan.grad_output.stride_h;
      const S* input_row[kTapRows];
      bool meets[kTapRows];
      bool all = true;
      for (int m = 0; m < kTapRows; ++m) {
        const int64_t at = y.origin + r * y.tap_step + (first_tap_row + m) * y.out_step;
        meets[m] = first_tap_row + m < y.count && at >= 0 && at < map.height;
        input_row[m] = input + at * map.stride_h;
        all = all && meets[m];
      }
      if constexpr (kApart == 0)
        add_row(grad_row, input_row, meets, all, sums, total, ahead);
      else
        add_row_of_shared(grad_row, input_row, meets, sums, total, ahead);
    }
    const auto add_to = [&](T* to, const Vec<T, V>& sum) {
      Vec<T, V> added = sum;
      if (repeated) {
        T lanes[2 * V] = {};
        store<T, V>(lanes, sum);
        added = load<T, V>(lanes + repeated);
      }
      store_aligned<V>(to, load_aligned<V>(to) + added);
    };
#pragma GCC unroll kUnroll
    for (int m = 0; m < kTapRows; ++m)
      if (first_tap_row + m < y.count)
#pragma GCC unroll kUnroll
        for (int n = 0; n < kTaps; ++n) add_to(gradient + (m * plan.kernel_w + n) * V, sums[m][n]);
    if (bias) add_to(bias, total);
  }
};

// A task is one group of blocks of channels over one part of the rows of all images, as for the
// other kernel.
template <class T, int V, class S>
void weight_gradient_in_place_as(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  const MapView &input = plan.input, &grad = plan.grad_output;
  const int64_t taps = plan.kernel_h * plan.kernel_w, elements = (taps + 1) * V;
  const int64_t blocks = plan.lanes.blocks_per_image, height = grad.height;
  const int64_t apart = plan.x.out_step == 1 ? plan.x.tap_step : 0;
  // Narrow maps: several rows before sums leave the registers, the rows of an image in equal parts.
  constexpr int64_t kTogether = 28;
  const int64_t most = grad.width < kTogether ? kTogether / grad.width : 1;
  const int64_t together = ceil_div(height, ceil_div(height, most));
  const auto first_row_of = [&](int64_t part) {
    return part * plan.batch * height / plan.num_parts;
  };
  const auto block_of = [&](int64_t group) { return group * blocks / plan.num_groups; };
  // From `row` on, as many as are taken together: of one image.
  const auto rows_from = [&](int64_t row, int64_t last_row) {
    const int64_t rows = together < last_row - row ? together : last_row - row;
    return rows < height - row % height ? rows : height - row % height;
  };
  const auto meets = [&](int64_t i) { return plan.y.origin + i * plan.y.tap_step; };
  const int64_t span = (plan.y.count - 1) * plan.y.out_step + 1;
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / plan.num_groups, group = task % plan.num_groups;
    const int64_t first_block = block_of(group), last_block = block_of(group + 1);
    T* partial = static_cast<T*>(plan.partial) + part * blocks * elements;
    memset(static_cast<void*>(partial + first_block * elements), 0,
           size_t((last_block - first_block) * elements) * sizeof(T));
    const int64_t last_row = first_row_of(part + 1);
    for (int64_t row = first_row_of(part), rows; row < last_row; row += rows) {
      const int64_t image = row / height, i = row % height;
      rows = rows_from(row, last_row);
      const int64_t columns =
          ceil_div(grad.width, columns_per_step(apart, plan.x.count, sizeof(S)));
      const int64_t steps = (last_block - first_block) * rows * columns *
                            ceil_div(plan.y.count, tap_rows_together(plan.x.count));
      // Meanwhile the next rows, of this task or the one after it, and what they meet beyond these
      // come into the cache.
      const bool same_task = row + rows < last_row;
      if (same_task || task + 1 < end) {
        const int64_t next_task = same_task ? task : task + 1;
        const int64_t next_part = next_task / plan.num_groups;
        const int64_t next_group = next_task % plan.num_groups;
        const int64_t next = same_task ? row + rows : first_row_of(next_part);
        const int64_t next_image = next / height, next_i = next % height;
        const int64_t next_rows = rows_from(next, first_row_of(next_part + 1));
        const int64_t channel = block_of(next_group) * V, rest = plan.channels - channel;
        const int64_t count = block_of(next_group + 1) * V - channel;
        const int64_t channels = rest < count ? rest : count;
        const bool goes_on = same_task && next_image == image;
        ahead.first.begin(channels_region<S>(input, next_image * input.stride_b + channel, channels,
                                             goes_on ? meets(i + rows - 1) + span : meets(next_i),
                                             meets(next_i + next_rows - 1) + span),
                          steps);
        ahead.second.begin(channels_region<S>(grad, next_image * grad.stride_b + channel, channels,
                                              next_i, next_i + next_rows),
                           steps);
      }
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t left = plan.channels - block * V;
        const int64_t repeated = left < V && plan.lanes.last_overlaps ? V - left : 0;
        const int64_t channel = block * V - repeated;
        T* const gradient = partial + block * elements;
        T* const first_tap =
            gradient + (plan.y.first_output * plan.kernel_w + plan.x.first_output) * V;
        const auto add = [&](auto columns_apart, auto row_of_taps) {
          const InPlaceProducts<T, V, S, decltype(columns_apart)::value,
                                decltype(row_of_taps)::value>
              products = {plan, static_cast<const S*>(grad.data) + image * grad.stride_b + channel,
                          static_cast<const S*>(input.data) + image * input.stride_b + channel,
                          left + repeated < V ? int(left) : V, int(repeated)};
          for (int64_t m = 0; m < plan.y.count; m += products.kTapRows)
            products.add(i, rows, m, first_tap + m * plan.kernel_w * V,
                         m == 0 ? gradient + taps * V : nullptr, ahead);
        };
        const bool whole = left + repeated >= V;
        const Constant<0> any;
        const Constant<1> one;
        const Constant<2> two;
        const Constant<3> three;
        if (plan.x.count == 3 && apart == 2 && whole)
          add(two, three);
        else if (plan.x.count == 3 && apart == 1 && whole)
          add(one, three);
        else if (plan.x.count == 3)
          add(any, three);
        else if (plan.x.count == 2 && apart == 1 && whole)
          add(one, two);
        else if (plan.x.count == 2)
          add(any, two);
        else if (apart == 1 && whole)
          add(one, one);
        else
          add(any, one);
      }
    }
  }
}

}  // namespace
