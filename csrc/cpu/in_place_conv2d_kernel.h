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

// Outputs and blocks of channels that are summed at a time where outputs share next to nothing:
// with a tap of each block they fill the registers. In rows with fewer such outputs, the few.
constexpr int kChannelOutputs = 6, kFewChannelOutputs = 3;
constexpr int kChannelBlocks = LKA_VECTOR_BYTES == 64 ? 4 : 2;

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
  RowsAhead ahead;

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

  // some(Constant<count>, output, columns of taps) for all outputs of a phase of columns, kOutputs
  // side by side wherever all their taps exist.
  template <int kOutputs, class Some>
  __attribute__((always_inline)) void over_outputs(const Phase& x, const Some& some) const {
    const OutputRange whole = whole_outputs(x, plan.source.width);
    for (int64_t output = 0; output < x.count;)
      if (output >= whole.begin && output + kOutputs <= whole.end) {
        some(Constant<kOutputs>{}, output, TapRange{0, x.taps});
        output += kOutputs;
      } else {
        some(Constant<1>{}, output, taps_of(x, output, plan.source.width));
        ++output;
      }
  }

  // Whether outputs of a phase of columns share so little that many channels at a time are better
  // than many outputs.
  bool by_channels(const Phase& x) const {
    if (plan.channels < kChannelBlocks * V || plan.channels % V != 0) return false;
    if (x.out_step > 1) return x.taps <= x.out_step + 1 || x.out_step > 2;
    return x.tap_step == 1 && (x.taps == 1 || (x.taps == 2 && x.count < kChannelOutputs));
  }

  // Outputs of one phase of columns, whatever its steps.
  void outputs(int64_t phase) const {
    const Phase& x = plan.phases_x[phase];
    if (by_channels(x)) {
      const OutputRange whole = whole_outputs(x, plan.source.width);
      if (whole.end - whole.begin < kChannelOutputs)
        return outputs_by_channels<kFewChannelOutputs>(phase);
      return outputs_by_channels<kChannelOutputs>(phase);
    }
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
    over_outputs<4>(x, some);  // enough for sums not to wait for themselves
  }

  // The same of many channels at a time: steps leave next to nothing that outputs share, and what
  // is read lies side by side.
  template <int kOutputs>
  void outputs_by_channels(int64_t phase) const {
    const Phase& x = plan.phases_x[phase];
    InPlaceBlocks<T, S> sums;
    sums.source_row = source_row;
    sums.source_column = x.tap_step * plan.source.stride_w;
    sums.source_output = x.out_step * plan.source.stride_w;
    sums.weight_row = x.taps * V;
    sums.weight_block = plan.packed_taps * V;
    // Row m of the taps loads new row m: these very rows where taps are as far apart as rows that
    // are read. The first phase loads for all. The target is not loaded ahead.
    sums.ahead = ahead.source;
    sums.ahead_rows = phase > 0 ? 0 : ahead.rows;
    sums.ahead_columns = x.out_step / plan.columns_apart;
    sums.out_column = x.output_stride * plan.target.stride_w;
    const T* const first_weight = weight_of(phase);
    const auto some = [&](auto many, int64_t output, TapRange columns) {
      sums.columns = columns.end > columns.begin ? columns.end - columns.begin : 0;
      sums.rows = sums.columns > 0 ? rows : 0;
      const S* const from = source + (x.origin + output * x.out_step + columns.begin * x.tap_step) *
                                         plan.source.stride_w;
      S* const to = out + x.first_output * plan.target.stride_w + output * sums.out_column;
      const auto blocks = [&](auto together, int64_t block) __attribute__((always_inline)) {
        sums.source = from + block * V;
        sums.weight = first_weight + columns.begin * V + block * sums.weight_block;
        sums.bias = plan.bias ? bias() + block * V : nullptr;
        sums.out = to + block * V;
        sums.template sum<V, decltype(many)::value, decltype(together)::value>();
      };
      const int64_t count = plan.channels / V;
      int64_t block = 0;
      for (; block + kChannelBlocks <= count; block += kChannelBlocks)
        blocks(Constant<kChannelBlocks>{}, block);
      for (; block < count; ++block) blocks(Constant<1>{}, block);
    };
    over_outputs<kOutputs>(x, some);
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
};

// Tiles of Row::kPhases phases of columns from `phase` on; the last of several overlaps the one
// before, unless one output is left, as of even kernels (but not of two phases, nor of runs). Of
// dilated taps, every `apart`-th output from `first` on, which meet every so many columns. What
// does not change from row to row is worked out once where there is one phase with unit steps: with
// few taps it takes as long as the products.
template <class T, int V, class S, class Row>
class RowTiles {
 public:
  RowTiles(const ConvolvePlan& plan, int64_t phase, int64_t first, int64_t apart)
      : plan_(plan), phase_(phase), first_(first), apart_(apart) {
    const Phase& x = plan.phases_x[phase];  // the first phase has the most outputs
    taps_ = x.taps;
    columns_ = Row::columns(x.taps);
    rows_per_run_ = rows_of_tile_run(x.taps, sizeof(S) < sizeof(T));
    out_apart_ = x.out_step == 1 ? apart : 1;  // else none lie between a tile's
    out_column_ = x.output_stride * out_apart_ * plan.target.stride_w;
    target_ = (x.first_output + first * x.output_stride) * plan.target.stride_w;
    count_ = outputs_of(0);
    last_whole_ = outputs_of(Row::kPhases - 1) - Row::kOutputs;
    last_ = count_ > Row::kOutputs ? count_ - Row::kOutputs : 0;
    origin_ = x.origin + first;
    step_ = Row::kStep * apart;
    first_inside_ = origin_ < 0 ? ceil_div(-origin_, step_) : 0;
    const int64_t room = plan.source.width - 1 - origin_ - (columns_ - 1) * apart;
    const int64_t fit = room < 0 ? -1 : quotient(room, step_);
    last_inside_ = fit < last_whole_ ? fit : last_whole_;
    // A tile loads ahead as much as it has, but in the order of memory: where outputs are apart,
    // the tiles of each part of them take their part of the row. Of several phases the first takes
    // all. Of few taps only the source: to load the target ahead takes longer than it saves.
    source_times_ = phase > 0 ? 0 : quotient(quotient(apart, out_apart_), plan.columns_apart);
    target_times_ = phase > 0 || Row::kFewTaps ? 0 : x.output_stride / Row::kPhases;
    source_part_ = source_times_ * kFrom * plan.columns_apart * plan.source.stride_w;
    target_part_ = target_times_ * kTo * plan.target.stride_w;
    const int64_t before = first * ceil_div(ceil_div(x.count, out_apart_), Row::kOutputs);
    const int64_t first_column_read = next_read(0, x.origin, plan.columns_apart);
    source_ahead_ = first_column_read * plan.source.stride_w + before * source_part_;
    target_ahead_ = before * target_part_;
  }

  // Not inlined: it has two callers, and its unrolled tiles are some kilobytes.
  __attribute__((noinline)) void run(const InPlaceRow<T, V, S>& row) const {
    InPlaceTile<T, S, Row> tile;
    tile.rows = row.rows;
    tile.rows_per_run = rows_per_run_;
    tile.source_row = row.source_row;
    tile.source_column = apart_ * plan_.source.stride_w;
    tile.out_column = out_column_;
    tile.out_phase = plan_.target.stride_w;
    tile.row_taps = taps_;
    const T* const weights[2] = {row.weight_of(phase_), row.weight_of(phase_ + Row::kPhases - 1)};
    S* const target = row.out + target_;
    const int64_t target_times = row.ahead.target == 0 ? 0 : target_times_;
    const S* source_ahead = row.source + source_ahead_;
    const S* target_ahead = row.out + target_ahead_;
    // All blocks of `many` tiles from `output` on.
    const auto some = [&](int64_t output, int64_t many,
                          auto inside) __attribute__((always_inline)) {
      constexpr bool kInside = decltype(inside)::value != 0;
      const bool lacks_first = Row::kFewTaps && tile.first_column == 1 &&
                               tile.end_column >= columns_ && output <= last_whole_;
      const S* from = row.source + (origin_ + output * step_) * plan_.source.stride_w;
      S* to = target + output * out_column_;
      for (; many > 0; --many) {
        tile.source = from;
        tile.out = to;
        tile.bias = row.bias();
        tile.weight[0] = weights[0];
        tile.weight[1] = weights[1];
        row.over_blocks(tile, [&](int64_t channel, int count) __attribute__((always_inline)) {
          row.ahead.template load<V, kFrom, kTo>(source_ahead, source_times_, target_ahead,
                                                 target_times, channel);
          if (kInside && count == V)
            tile.template sum<V, Exists::all>(V);
          else if (lacks_first && count == V)
            tile.template sum<V, Row::kFewTaps ? Exists::all_but_first_column : Exists::some>(V);
          else
            tile.template sum<V, Exists::some>(count);
        });
        source_ahead += source_part_;
        target_ahead += target_part_;
        from += Row::kOutputs * step_ * plan_.source.stride_w;
        to += Row::kOutputs * out_column_;
      }
    };
    // What is left after whole tiles, by itself.
    const auto single = [&](int64_t column) __attribute__((always_inline)) {
      const int64_t width = plan_.source.width;
      const int64_t begin = column < 0 ? ceil_div(-column, apart_) : 0;
      const int64_t end = column < width ? ceil_div(width - column, apart_) : 0;
      InPlaceSum<T, S> sum;
      sum.columns = (end < taps_ ? end : taps_) - begin;
      sum.rows = sum.columns > 0 ? row.rows : 0;
      sum.source_row = row.source_row;
      sum.source_column = tile.source_column;
      sum.source = row.source + (column + begin * apart_) * plan_.source.stride_w;
      sum.weight = weights[0] + begin * V;
      sum.weight_row = taps_ * V;
      sum.bias = row.bias();
      sum.out = target + (count_ - 1) * out_column_;
      row.over_blocks(sum, [&](int64_t channel, int many) __attribute__((always_inline)) {
        row.ahead.template load<V, Row::kStep, 1>(source_ahead, source_times_, target_ahead,
                                                  target_times, channel);
        if (many == V)
          sum.template sum<V, true>(V);
        else
          sum.template sum<V, false>(many);
      });
    };
    const bool last_by_itself =
        Row::kPhases == 1 && !Row::kRuns && one_is_left(count_, Row::kOutputs);
    for (int64_t next = 0; next < count_;) {
      if (last_by_itself && next == count_ - 1) return single(origin_ + next * step_);
      const int64_t output = next < last_ ? next : last_;
      const bool inside = output >= first_inside_ && output <= last_inside_;
      const int64_t column = origin_ + output * step_;
      tile.first_column = column < 0 ? ceil_div(-column, apart_) : 0;
      tile.end_column = ceil_div(plan_.source.width - column, apart_);
      for (int p = 0; p < Row::kPhases; ++p) tile.outputs[p] = outputs_of(p) - output;
      const int64_t many = inside ? (last_inside_ - output) / Row::kOutputs + 1 : 1;
      with_flag(inside,
                [&](auto flag) __attribute__((always_inline)) { some(output, many, flag); });
      next = output + many * Row::kOutputs;
    }
  }

 private:
  // Pixels of the source and of the target that a tile has.
  static constexpr int kFrom = Row::kOutputs * Row::kStep, kTo = Row::kOutputs * Row::kPhases;

  int64_t outputs_of(int p) const {
    return ceil_div(plan_.phases_x[phase_ + p].count - first_, out_apart_);
  }

  const ConvolvePlan& plan_;
  const int64_t phase_, first_, apart_;
  int64_t taps_, columns_, rows_per_run_;
  int64_t out_apart_, out_column_, target_;
  int64_t count_, last_whole_,
      last_;               // outputs; the last from which a tile has all; where the last begins
  int64_t origin_, step_;  // source columns, of the first output and from one to the next
  int64_t first_inside_, last_inside_;  // outputs whose tiles have all outputs and columns
  int64_t source_times_, target_times_, source_part_, target_part_;
  int64_t source_ahead_, target_ahead_;
};

template <class Row>
struct Tag {
  using Type = Row;
};

// Calls use(Tag<Row>{}) with the tiles for one phase of columns, of which kernel rows have taps_y;
// false if there are none. Its outputs or taps must have unit steps, or both the same.
template <class T, class S, class Use>
bool with_unit_tiles(const ConvolvePlan& plan, const Phase& x, int64_t taps_y, int lanes,
                     const Use& use) {
  if (x.taps == 0 || (x.out_step != 1 && x.out_step != x.tap_step && x.taps != 1)) return false;
  const int64_t count = x.out_step == 1 ? ceil_div(x.count, x.tap_step) : x.count;
  if (taps_y > rows_of_tile_run(x.taps, sizeof(S) < sizeof(T)))
    use(Tag<LongRow<7, true>>{});
  else if (x.taps == 1)
    use(Tag<RowShape<1, 1>>{});
  else if (x.taps == 2 && count >= 2 * kWideTile && wide_tiles_fit(count))
    use(Tag<RowShape<1, 2, 0, 0, kWideTile>>{});  // what a tile takes beside so few taps tells
  else if (x.taps == 2)
    use(Tag<RowShape<1, 2>>{});
  else if (x.taps == 3 && ceil_div(count, 5) * 6 < ceil_div(count, 7) * 8)
    use(Tag<RowShape<1, 3, 0, 0, 5>>{});  // dilated, 14 or 28 columns leave too few for 7
  else if (x.taps == 3)
    use(Tag<RowShape<1, 3>>{});
  else if (x.taps == 4)
    use(Tag<RowShape<1, 4>>{});
  else if (x.taps == 5)
    use(Tag<RowShape<1, 5>>{});
  else if (x.taps == 7)
    use(Tag<RowShape<1, 7>>{});
  // Of several blocks wide tiles load too much ahead at once: it takes up to a fifth of the time.
  else if (plan.channels <= lanes && wide_tiles_fit(count))
    use(Tag<LongRow<kWideTile>>{});
  else if (LKA_VECTOR_BYTES == 64 && x.taps == 9)
    use(Tag<RowShape<1, 9>>{});
  else if (LKA_VECTOR_BYTES == 64 && x.taps == 11)
    use(Tag<RowShape<1, 11>>{});
  else
    use(Tag<LongRow<7>>{});
  return true;
}

// A row, whatever its phases.
template <class T, int V, class S>
void convolve_row(const InPlaceRow<T, V, S>& row) {
  const ConvolvePlan& plan = row.plan;
  // All phases together, if they have this shape.
  const auto together = [&](auto tag) {
    using Row = typename decltype(tag)::Type;
    const Phase* const x = plan.phases_x;
    if (plan.num_phases_x != Row::kPhases) return false;
    for (int p = 0; p < Row::kPhases; ++p) {
      if (x[p].taps != Row::kTaps[p] || x[p].out_step != Row::kStep || x[p].tap_step != 1 ||
          x[p].origin - x[0].origin != Row::kFirst[p])
        return false;
    }
    RowTiles<T, V, S, Row>(plan, 0, 0, 1).run(row);
    return true;
  };
  // 3, 5 and 7 taps with stride 2 and the usual padding, forward and backward.
  if (together(Tag<RowShape<2, 3>>{}) || together(Tag<RowShape<2, 5>>{}) ||
      together(Tag<RowShape<1, 1, 2>>{}) || together(Tag<RowShape<1, 3, 2, 1>>{}) ||
      together(Tag<RowShape<2, 7>>{}) || together(Tag<RowShape<1, 3, 4>>{}))
    return;
  for (int64_t phase = 0; phase < plan.num_phases_x; ++phase) {
    const Phase& x = plan.phases_x[phase];
    const bool tiled =
        !(x.out_step == 1 && row.by_channels(x)) &&
        with_unit_tiles<T, S>(plan, x, row.taps_y, V, [&](auto tag) {
          const int64_t apart =
              x.taps == 1 ? x.out_step : x.tap_step;  // of one, the step means nothing
          const int64_t ways = x.out_step == 1 ? apart : 1;
          for (int64_t first = 0; first < ways && first < x.count; ++first)
            RowTiles<T, V, S, typename decltype(tag)::Type>(plan, phase, first, apart).run(row);
        });
    if (!tiled) row.outputs(phase);
  }
}

// Row `row` of the target, of the band that a task has, whose rows end before `last`. Not inlined:
// every shape of tiles calls it.
template <class T, int V, class S>
__attribute__((noinline)) InPlaceRow<T, V, S> row_of(const ConvolvePlan& plan, bool load_ahead,
                                                     int64_t task, bool last_task, int64_t row,
                                                     int64_t last) {
  const MapView &source = plan.source, &target = plan.target;
  const int64_t image = quotient(task, plan.num_bands);
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
  if (load_ahead && (same_task || !last_task)) {
    const int64_t next = same_task ? row + 1 : remainder(task + 1, plan.num_bands) * plan.band;
    const int64_t images = same_task ? 0 : quotient(task + 1, plan.num_bands) - image;
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
  return {
      plan,
      static_cast<const S*>(source.data) + image * source.stride_b + first_row * source.stride_h,
      taps.end > taps.begin ? taps.end - taps.begin : 0,
      y.tap_step * source.stride_h,
      weight,
      y.taps,
      taps.begin,
      static_cast<S*>(target.data) + image * target.stride_b + row * target.stride_h,
      ahead};
}

// A task is one band of rows of the target of one image.
template <class T, int V, class S>
void convolve_in_place_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const MapView &source = plan.source, &target = plan.target;
  const Phase &first_y = plan.phases_y[0], &first_x = plan.phases_x[0];
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
                        first_y.out_step == 1 && plan.columns_apart == 1 && first_x.tap_step == 1;
  const auto for_rows = [&](const auto& convolve) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = remainder(task, plan.num_bands) * plan.band;
      const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
      for (int64_t row = first; row < last; ++row)
        convolve(row_of<T, V, S>(plan, !in_order, task, task + 1 == end, row, last));
    }
  };
  using OutputRow = InPlaceRow<T, V, S>;
  if (single) return for_rows([](const OutputRow& row) { row.single_taps(); });
  const bool one_phase = plan.num_phases_y == 1 && plan.num_phases_x == 1;
  const bool unit_steps = first_x.out_step == 1 && first_x.tap_step == 1;
  if (one_phase && unit_steps &&
      with_unit_tiles<T, S>(plan, first_x, first_y.taps, V, [&](auto tag) {
        const RowTiles<T, V, S, typename decltype(tag)::Type> tiles(plan, 0, 0, 1);
        for_rows([&](const OutputRow& row) { tiles.run(row); });
      }))
    return;
  for_rows([](const OutputRow& row) { convolve_row(row); });
}

}  // namespace
