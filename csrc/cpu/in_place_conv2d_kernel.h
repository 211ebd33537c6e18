// Depthwise convolution that reads channels_last maps where they stand: with strides and few taps,
// and with unit steps or dilation whatever row_tiles_kernel.h leaves, if tiles of outputs fit the
// rows well. Most other kernels unpack the source first; with stride 2 an element meets a quarter
// as many taps, for which that does not pay.
#pragma once

#include "depthwise_plan.h"
#include "in_place_sums.h"
#include "prefetch.h"
#include "row_tile_sizes.h"
#include "simd.h"

namespace {

using lka::cpu::ConvolvePlan;
using lka::cpu::one_is_left;
using lka::cpu::rows_of_tile_run;
using lka::cpu::wide_tiles_fit;

// Outputs of the widest tiles of a row.
constexpr int kWideTile =
    LKA_VECTOR_BYTES == 64 ? lka::cpu::kWideTileColumns : lka::cpu::kRowTileColumns;
// Phases of columns that are taken together where outputs meet one tap at most.
constexpr int64_t kMostSinglePhases = 8;

// The least position from `at` on that is read, if every `apart`-th is, `origin` among them.
inline int64_t next_read(int64_t at, int64_t origin, int64_t apart) {
  return apart == 1 ? at : at + ((origin - at) % apart + apart) % apart;
}

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

  // sum(channel, count) for all blocks of some pixels, one after the other, in the order of memory:
  // `sums` is then at the block, of which `count` channels exist; `channel` is where it begins if
  // it does not overlap the one before, for loading ahead.
  template <class Sums, class Sum>
  __attribute__((always_inline)) void over_blocks(Sums& sums, const Sum& sum) const {
    for (int64_t left = plan.channels; left > 0; left -= V) {
      const int64_t back = overlap(left);
      sums.source -= back;
      sums.out -= back;
      sum(plan.channels - left, left + back < V ? int(left) : V);
      sums.template next_block<V>(plan.packed_taps * V);
    }
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
    const T* const first_weight = weight_of(phase);
    // The first phase loads ahead for all: their pixels lie between its own.
    const int64_t source_times = phase > 0 ? 0 : x.out_step / plan.columns_apart;
    const int64_t target_times = phase > 0 || ahead.target == 0 ? 0 : x.output_stride;
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
      over_blocks(sums, [&](int64_t channel, int count) __attribute__((always_inline)) {
        ahead.template load<V, kMany, kMany>(from, source_times, to, target_times, channel);
        if (count == V)
          sums.template sum<V, kMany, true>(V);
        else
          sums.template sum<V, kMany, false>(count);
      });
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
  // before, unless one output is left, as of even kernels (but not of two phases, nor of runs). Of
  // dilated taps, every `apart`-th output from `first` on, which meet every so many columns.
  template <class Row>
  void tiles(int64_t phase, int64_t first, int64_t apart) const {
    const Phase& x = plan.phases_x[phase];                  // the first phase has the most outputs
    const int64_t out_apart = x.out_step == 1 ? apart : 1;  // else none lie between a tile's
    const int64_t width = plan.source.width, columns = Row::columns(x.taps);
    InPlaceTile<T, S, Row> tile;
    tile.rows = rows;
    tile.rows_per_run = rows_of_tile_run(x.taps, sizeof(S) < sizeof(T));
    tile.source_row = source_row;
    tile.source_column = apart * plan.source.stride_w;
    tile.out_column = x.output_stride * out_apart * plan.target.stride_w;
    tile.out_phase = plan.target.stride_w;
    tile.row_taps = x.taps;
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
    const int64_t source_times =
        phase > 0 ? 0 : quotient(quotient(apart, out_apart), plan.columns_apart);
    const int64_t target_times =
        phase > 0 || ahead.target == 0 ? 0 : x.output_stride / Row::kPhases;
    const int64_t before = first * ceil_div(ceil_div(x.count, out_apart), Row::kOutputs);
    const int64_t source_part = source_times * kFrom * ahead.source_pixel;
    const int64_t target_part = target_times * kTo * plan.target.stride_w;
    const int64_t first_column_read = next_read(0, x.origin, plan.columns_apart);
    const S* source_ahead =
        source + first_column_read * plan.source.stride_w + before * source_part;
    const S* target_ahead = out + before * target_part;
    // Tiles from first_inside to last_inside have all their outputs and columns.
    const int64_t origin = x.origin + first, step = Row::kStep * apart;
    const int64_t first_inside = origin < 0 ? ceil_div(-origin, step) : 0;
    const int64_t room = width - 1 - origin - (columns - 1) * apart;
    const int64_t fit = room < 0 ? -1 : quotient(room, step), most = fewest - Row::kOutputs;
    const int64_t last_inside = fit < most ? fit : most;
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
        over_blocks(tile, [&](int64_t channel, int count) __attribute__((always_inline)) {
          ahead.template load<V, kFrom, kTo>(source_ahead, source_times, target_ahead, target_times,
                                             channel);
          if (kInside && count == V)
            tile.template sum<V, true>(V);
          else
            tile.template sum<V, false>(count);
        });
        source_ahead += source_part;
        target_ahead += target_part;
        from += Row::kOutputs * step * plan.source.stride_w;
        to += Row::kOutputs * tile.out_column;
      }
    };
    // What is left after whole tiles, by itself.
    const auto single = [&](int64_t column) __attribute__((always_inline)) {
      const int64_t begin = column < 0 ? ceil_div(-column, apart) : 0;
      const int64_t end = column < width ? ceil_div(width - column, apart) : 0;
      InPlaceSum<T, S> sum;
      sum.columns = (end < x.taps ? end : x.taps) - begin;
      sum.rows = sum.columns > 0 ? rows : 0;
      sum.source_row = source_row;
      sum.source_column = tile.source_column;
      sum.source = source + (column + begin * apart) * plan.source.stride_w;
      sum.weight = weights[0] + begin * V;
      sum.weight_row = x.taps * V;
      sum.bias = bias();
      sum.out = target + (count - 1) * tile.out_column;
      over_blocks(sum, [&](int64_t channel, int many) __attribute__((always_inline)) {
        ahead.template load<V, Row::kStep, 1>(source_ahead, source_times, target_ahead,
                                              target_times, channel);
        if (many == V)
          sum.template sum<V, true>(V);
        else
          sum.template sum<V, false>(many);
      });
    };
    const bool last_by_itself =
        Row::kPhases == 1 && !Row::kRuns && one_is_left(count, Row::kOutputs);
    for (int64_t next = 0; next < count;) {
      if (last_by_itself && next == count - 1) return single(origin + next * step);
      const int64_t output = next < last ? next : last;
      const bool inside = output >= first_inside && output <= last_inside;
      const int64_t column = origin + output * step;
      tile.first_column = column < 0 ? ceil_div(-column, apart) : 0;
      tile.end_column = ceil_div(width - column, apart);
      for (int p = 0; p < Row::kPhases; ++p) tile.outputs[p] = outputs_of(p) - output;
      const int64_t many = inside ? (last_inside - output) / Row::kOutputs + 1 : 1;
      with_flag(inside,
                [&](auto flag) __attribute__((always_inline)) { some(output, many, flag); });
      next = output + many * Row::kOutputs;
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
    if (x.taps > 0 && taps_y > rows_of_tile_run(x.taps, sizeof(S) < sizeof(T))) {
      unit_tiles<LongRow<7, true>>(phase);
      return true;
    }
    switch (x.taps) {
      case 1: unit_tiles<RowShape<1, 1>>(phase); return true;
      case 2:  // so few that what a tile takes beside them tells
        if (count >= 2 * kWideTile && wide_tiles_fit(count))
          unit_tiles<RowShape<1, 2, 0, 0, kWideTile>>(phase);
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
      case 0: return false;
      default:
        // Of several blocks wide tiles load too much ahead at once: it takes up to a fifth of the
        // time.
        if (plan.channels <= V && wide_tiles_fit(count))
          unit_tiles<LongRow<kWideTile>>(phase);
        else if (LKA_VECTOR_BYTES == 64 && x.taps == 9)
          unit_tiles<RowShape<1, 9>>(phase);
        else if (LKA_VECTOR_BYTES == 64 && x.taps == 11)
          unit_tiles<RowShape<1, 11>>(phase);
        else
          unit_tiles<LongRow<7>>(phase);
        return true;
    }
  }

  // Of outputs that meet one tap at most, those of one phase of columns: outputs [begin, begin +
  // count) of it meet the source, output j `offset` elements from column j · out_step.
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
    const auto pixels = [&](int64_t j, int64_t end, int64_t some_phases) {
      const S* from = source + j * step * plan.source.stride_w;
      S* to = out + j * phases * plan.target.stride_w;
      with_flag(plan.channels == V, [&](auto one_block) {
        with_flag(plan.bias != nullptr, [&](auto biased) {
          with_flag(step > 1, [&](auto strided) {
            single_taps_of<decltype(one_block)::value, decltype(biased)::value,
                           decltype(strided)::value>(taps, some_phases, j, end, from, to);
          });
        });
      });
    };
    const int64_t groups = plan.target.width / phases;
    pixels(0, groups, phases);
    pixels(groups, groups + 1, plan.target.width % phases);  // of the last group what there is
  }

  // Outputs [j, end) of `phases` phases side by side. What does not change from pixel to pixel is
  // known when it is compiled: a vector has one product, beside which each test would tell.
  template <int kOneBlock, int kBias, int kStrided>
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
        // The processor loads memory in its order by itself, but not pixels with gaps between.
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
  // Memory is read and written in its order: the processor then follows by itself, and loading
  // ahead would take a fifth of the time.
  const auto dense = [&](const MapView& map) {
    return map.stride_w == plan.channels && map.stride_h == map.width * map.stride_w;
  };
  const bool in_order = plan.channels <= V && dense(source) && dense(target) && plan.span_y == 1 &&
                        plan.phases_y[0].out_step == 1 && plan.columns_apart == 1 &&
                        plan.phases_x[0].tap_step == 1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const S* from = static_cast<const S*>(source.data) + image * source.stride_b;
    S* to = static_cast<S*>(target.data) + image * target.stride_b;
    for (int64_t row = first; row < last; ++row) {
      const int64_t phase = remainder(row, plan.phases_y[0].output_stride);
      const Phase& y = plan.phases_y[phase];
      const int64_t j = quotient(row, y.output_stride);
      const TapRange taps = taps_of(y, j, source.height);
      const int64_t first_row = y.origin + j * y.out_step + taps.begin * y.tap_step;
      // Meanwhile the next row, and what it reads beyond this one, come into the cache.
      RowsAhead ahead = {};
      ahead.channels = plan.channels;
      ahead.source_pixel = plan.columns_apart * source.stride_w;
      ahead.target_pixel = target.stride_w;
      const bool same_task = row + 1 < last;
      if (!in_order && (same_task || task + 1 < end)) {
        const int64_t next = same_task ? row + 1 : (task + 1) % plan.num_bands * plan.band;
        const int64_t images = same_task ? 0 : (task + 1) / plan.num_bands - image;
        const int64_t next_begin = plan.origin_y + quotient(next, y.output_stride) * y.out_step;
        const int64_t next_end = next_begin + plan.span_y;
        const int64_t read = plan.origin_y + j * y.out_step + plan.span_y;
        int64_t from_row = same_task && read > next_begin ? read : next_begin;
        if (from_row < 0) from_row = 0;
        from_row = next_read(from_row, plan.origin_y, plan.rows_apart);
        const int64_t end_row = next_end < source.height ? next_end : source.height;
        ahead.target = images * target.stride_b + (next - row) * target.stride_h;
        ahead.source = images * source.stride_b + (from_row - first_row) * source.stride_h;
        ahead.rows = ceil_div(end_row - from_row, plan.rows_apart);
        ahead.source_row = plan.rows_apart * source.stride_h;
      }
      const T* weight = static_cast<const T*>(plan.packed_weight);
      for (int64_t py = 0; py < phase; ++py)
        for (int64_t px = 0; px < plan.num_phases_x; ++px)
          weight += plan.phases_y[py].taps * plan.phases_x[px].taps * V;
      const InPlaceRow<T, V, S> in_place = {plan,
                                            from + first_row * source.stride_h,
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

}  // namespace
