// Gradients of the weights of one to three taps in a row, from channels_last maps where they stand.
#pragma once

#include "depthwise_plan.h"
#include "in_place_sums.h"
#include "pack.h"
#include "prefetch.h"
#include "simd.h"

namespace {

using lka::MapView;
using lka::cpu::kGradRows;
using lka::cpu::WeightGradientPlan;

// Kernel rows whose gradients are summed together, by the taps of a row.
constexpr int tap_rows_together(int64_t taps) { return taps == 1 ? 7 : int(taps); }

// Blocks of channels whose sums fill the registers, of rows of one, two and three taps.
constexpr int kBlocksOfOneTap = LKA_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int kBlocksOfTwoTaps = LKA_VECTOR_BYTES == 64 ? 4 : 1;
constexpr int kBlocksOfThreeTaps = LKA_VECTOR_BYTES == 64 ? 2 : 1;
// The same of single rows of three taps, where outputs share nothing of the input and these are all
// blocks: it is then read in the order of memory.
constexpr int kBlocksOfOneRow = LKA_VECTOR_BYTES == 64 ? 4 : 2;

// Columns of grad_output between two steps of loading ahead, whose cost stands beside few products;
// but where each meets more of the input, so many lines at once would stall the processor.
constexpr int columns_per_step(int64_t columns_apart, int64_t taps, size_t element) {
  return columns_apart == 1 ? 4 : element == 2 || taps < 3 ? 2 : 1;
}

// Rows [row, row + rows) of grad_output of one image against what kTapRows kernel rows of kTaps
// taps from first_tap_row on meet, for one block of channels: added to the gradients of those taps,
// and where `bias` is wanted to that of the bias. Where kApart is 1 or 2, neighbouring columns of
// grad_output meet input columns that are so far apart, neighbouring taps neighbouring ones: a
// column shares kTaps - kApart of its own with the next. Where none is shared there may be several
// blocks side by side, all of whose channels exist: pixels are read in longer runs.
template <class T, int V, class S, int kApart, int kTaps, int kBlocks = 1,
          int kTapRows = tap_rows_together(kTaps)>
struct InPlaceProducts {
  static constexpr int kShared = kApart ? kTaps - kApart : 0;
  static_assert(kShared >= 0, "columns are read one after the other");
  static_assert(kBlocks == 1 || kShared == 0, "others keep columns for the next");
  static constexpr int kColumnsPerStep = columns_per_step(kApart, kTaps, sizeof(S));
  const WeightGradientPlan& plan;
  const S *grad, *input;  // at (0, 0)
  int channels;           // in the block; all of it unless kApart is 0 and kBlocks 1
  int repeated;           // of them the first are in the block before, too, and not added

  Vec<T, V> element(const S* at) const {
    return kApart || kBlocks > 1 ? load<T, V, S>(at) : load_some<T, V, S>(at, channels);
  }

  using Sums = Vec<T, V>[kTapRows][kTaps];
  struct BlockSums {
    Sums taps = {};
    Vec<T, V> total = {};  // of grad_output
  };

  // Any steps: every tap reads for itself. `meets`: the rows that exist; `live`: how many rows of
  // taps there are from the first one on.
  __attribute__((always_inline)) void add_row(const S* grad_row,
                                              const S* const (&input_row)[kTapRows],
                                              const bool (&meets)[kTapRows], bool all, int64_t live,
                                              BlockSums (&sums)[kBlocks], Ahead& ahead) const {
    const Phase& x = plan.x;
    const MapView& map = plan.input;
    const int64_t count = plan.grad_output.width, stride = map.stride_w;
    // Columns of grad_output of which every tap meets a column of the input.
    const Phase as_outputs = {0, 1, count, kTaps, x.origin, x.tap_step, x.out_step, 0, 1};
    const OutputRange whole = whole_outputs(as_outputs, map.width);
    // Of several blocks, the elements of the next row of grad_output and what it meets beyond this
    // one are loaded ahead one by one, beside those at hand: more lines at a time would wait for
    // each other. With single rows of taps the next row of the input is.
    const int64_t rows_ahead = kTapRows == 1 ? 1 : plan.y.tap_step;
    const auto columns = [&](auto steps, auto live_rows) __attribute__((always_inline)) {
      constexpr int kSteps = decltype(steps)::value;  // of taps and rows, 0: nothing is loaded
      constexpr int kLiveRows = decltype(live_rows)::value;  // of kTapRows those that there are
      for (int64_t c = 0; c < count; ++c) {
        Vec<T, V> g[kBlocks];
#pragma GCC unroll kUnroll
        for (int b = 0; b < kBlocks; ++b) {
          const S* const at = grad_row + c * plan.grad_output.stride_w + b * V;
          if (kSteps && b % kVectorsPerLine<V, S> == 0)
            __builtin_prefetch(at + plan.grad_output.stride_h);
          g[b] = element(at);
          if (kBlocks > 1) keep_in_register(g[b]);
          sums[b].total += g[b];
        }
        if (kBlocks == 1 && c % kColumnsPerStep == 0) ahead.step_runs();
        const bool inside = all && c >= whole.begin && c < whole.end;
        const auto add_column = [&](int n, int64_t column,
                                    auto known) __attribute__((always_inline)) {
#pragma GCC unroll kUnroll
          for (int m = 0; m < kTapRows; ++m)
            if (decltype(known)::value != 0 || meets[m])
#pragma GCC unroll kUnroll
              for (int b = 0; b < kBlocks; ++b) {
                const S* const at = input_row[m] + column * stride + b * V;
                if (n < kSteps && m >= kLiveRows - kSteps && b % kVectorsPerLine<V, S> == 0)
                  __builtin_prefetch(at + rows_ahead * map.stride_h);
                sums[b].taps[m][n] += g[b] * element(at);
              }
        };
#pragma GCC unroll kUnroll
        for (int n = 0; n < kTaps; ++n) {
          const int64_t column = x.origin + c * x.tap_step + n * x.out_step;
          if (inside)
            add_column(n, column, Constant<1>{});
          else if (column >= 0 && column < map.width)
            add_column(n, column, Constant<0>{});
        }
      }
    };
    const Phase& y = plan.y;
    const Constant<0> none;
    const Constant<1> one;
    const Constant<kTaps> all_taps;
    const Constant<kTapRows> all_rows;
    const bool neighbours = kBlocks > 1 && y.out_step == 1 && x.out_step == 1;
    if (neighbours && y.tap_step >= kTaps && x.tap_step >= kTaps)
      columns(all_taps, all_rows);
    else if (!neighbours || kTaps != 2 || y.tap_step != 1 || x.tap_step != 1)
      columns(none, all_rows);
    else if (live >= kTapRows)
      columns(one, all_rows);
    else
      columns(one, one);
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

  // kGradRows rows of grad_output from grad_row on against the first kLive of kTapRows taps one
  // below the other, or as many as there are.
  template <int kLive>
  __attribute__((always_inline)) void add_grad_rows(const S* grad_row, int64_t first_input_row,
                                                    int64_t live_taps, BlockSums (&sums)[kBlocks],
                                                    Ahead& ahead) const {
    constexpr int kInputRows = kLive + kGradRows - 1;
    const MapView& map = plan.input;
    const S* input_row[kInputRows];
    bool meets[kInputRows], all = true;
    for (int i = 0; i < kInputRows; ++i) {
      const int64_t at = first_input_row + i;
      meets[i] = i < kGradRows - 1 + live_taps && at >= 0 && at < map.height;
      all = all && meets[i];
      input_row[i] = input + at * map.stride_h + plan.x.origin * map.stride_w;
    }
    const int64_t grad_step = plan.grad_output.stride_h;
    const int64_t before = -plan.x.origin,
                  past = before + map.width;  // columns that meet the input
    const auto columns = [&](auto all_meet) __attribute__((always_inline)) {
      for (int64_t c = 0; c < plan.grad_output.width; ++c, grad_row += plan.grad_output.stride_w) {
        Vec<T, V> g[kGradRows][kBlocks];
#pragma GCC unroll kUnroll
        for (int j = 0; j < kGradRows; ++j)
#pragma GCC unroll kUnroll
          for (int b = 0; b < kBlocks; ++b) {
            g[j][b] = element(grad_row + j * grad_step + b * V);
            keep_in_register(g[j][b]);
            sums[b].total += g[j][b];
          }
#pragma GCC unroll kUnroll
        for (int b = 0; b < kBlocks; ++b) ahead.step_runs();
        if (c < before || c >= past) continue;
#pragma GCC unroll kUnroll
        for (int i = 0; i < kInputRows; ++i) {
          if (decltype(all_meet)::value == 0 && !meets[i]) continue;
#pragma GCC unroll kUnroll
          for (int b = 0; b < kBlocks; ++b) {
            Vec<T, V> value = element(input_row[i] + c * map.stride_w + b * V);
            keep_in_register(value);
#pragma GCC unroll kUnroll
            for (int j = 0; j < kGradRows; ++j)
              if (i - j >= 0 && i - j < kLive) sums[b].taps[i - j][0] += g[j][b] * value;
          }
        }
      }
    };
    with_flag(all, columns);
  }

  void add(int64_t row, int64_t rows, int64_t first_tap_row, T* gradient, T* bias,
           Ahead& ahead) const {
    const Phase& y = plan.y;
    const MapView& map = plan.input;
    BlockSums of_blocks[kBlocks] = {};
    int64_t r = row;
    if constexpr (kTaps == 1 && kApart == 1)
      for (; y.tap_step == 1 && y.out_step == 1 && r + kGradRows <= row + rows; r += kGradRows) {
        const auto add_live = [&](auto live) __attribute__((always_inline)) {
          add_grad_rows<decltype(live)::value>(grad + r * plan.grad_output.stride_h,
                                               y.origin + r + first_tap_row,
                                               y.count - first_tap_row, of_blocks, ahead);
        };
        if (y.count - first_tap_row <= 3)
          add_live(Constant<3>{});
        else if (y.count - first_tap_row <= 5)
          add_live(Constant<5>{});
        else
          add_live(Constant<kTapRows>{});
      }
    for (; r < row + rows; ++r) {
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
        add_row(grad_row, input_row, meets, all, y.count - first_tap_row, of_blocks, ahead);
      else
#pragma GCC unroll kUnroll
        for (int b = 0; b < kBlocks; ++b) {
          add_row_of_shared(grad_row + b * V, input_row, meets, of_blocks[b].taps,
                            of_blocks[b].total, ahead);
          for (const S*& block_row : input_row) block_row += V;
        }
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
    const int64_t next_block = (plan.kernel_h * plan.kernel_w + 1) * V;
#pragma GCC unroll kUnroll
    for (int b = 0; b < kBlocks; ++b) {
      const BlockSums& sums = of_blocks[b];
#pragma GCC unroll kUnroll
      for (int m = 0; m < kTapRows; ++m)
        if (first_tap_row + m < y.count)
#pragma GCC unroll kUnroll
          for (int n = 0; n < kTaps; ++n)
            add_to(gradient + b * next_block + (m * plan.kernel_w + n) * V, sums.taps[m][n]);
      if (bias) add_to(bias + b * next_block, sums.total);
    }
  }
};

// A task is one group of blocks of channels over one part of the rows of all images, as for
// weight_gradient_as.
template <class T, int V, class S>
void weight_gradient_in_place_as(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  const MapView &input = plan.input, &grad = plan.grad_output;
  const int64_t taps = plan.kernel_h * plan.kernel_w, elements = (taps + 1) * V;
  const int64_t blocks = plan.lanes.blocks_per_image, height = grad.height;
  const int64_t apart = plan.x.out_step == 1 ? plan.x.tap_step : 0;
  // Narrow maps: several rows before sums leave the registers, the rows of an image in equal parts.
  constexpr int64_t kTogether = 28;
  const int64_t most = grad.width < kTogether ? kTogether / grad.width : 1;
  int64_t together = ceil_div(height, ceil_div(height, most));
  if (plan.x.count == 1) together = ceil_div(together, kGradRows) * kGradRows;
  const int64_t units = ceil_div(height, plan.part_rows);  // of an image, the last may be lower
  const auto first_row_of = [&](int64_t part) {
    const int64_t unit = part * plan.batch * units / plan.num_parts;
    return unit / units * height + unit % units * plan.part_rows;
  };
  const auto block_of = [&](int64_t group) { return group * blocks / plan.num_groups; };
  // From `row` on, as many as are taken together: of one image.
  const auto rows_from = [&](int64_t row, int64_t last_row) {
    const int64_t rows = together < last_row - row ? together : last_row - row;
    return rows < height - row % height ? rows : height - row % height;
  };
  const auto meets = [&](int64_t i) { return plan.y.origin + i * plan.y.tap_step; };
  const int64_t span = (plan.y.count - 1) * plan.y.out_step + 1;
  const bool in_order = plan.channels == kBlocksOfOneRow * V && plan.x.out_step == 1 &&
                        plan.x.tap_step >= plan.x.count && plan.y.tap_step >= span;
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
      for (int64_t block = first_block, many; block < last_block; block += many) {
        const int64_t left = plan.channels - block * V;
        const int64_t repeated = left < V && plan.lanes.last_overlaps ? V - left : 0;
        const int64_t channel = block * V - repeated;
        T* const gradient = partial + block * elements;
        T* const first_tap =
            gradient + (plan.y.first_output * plan.kernel_w + plan.x.first_output) * V;
        const auto add_rows = [&](auto columns_apart, auto row_of_taps, auto blocks_together,
                                  auto rows_of_taps) {
          constexpr int kTogetherBlocks = decltype(blocks_together)::value;
          constexpr int kRowsOfTaps = decltype(rows_of_taps)::value;
          const InPlaceProducts<T, V, S, decltype(columns_apart)::value,
                                decltype(row_of_taps)::value, kTogetherBlocks, kRowsOfTaps>
              products = {plan, static_cast<const S*>(grad.data) + image * grad.stride_b + channel,
                          static_cast<const S*>(input.data) + image * input.stride_b + channel,
                          left + repeated < V ? int(left) : V, int(repeated)};
          for (int64_t m = 0; m < plan.y.count; m += kRowsOfTaps)
            products.add(i, rows, m, first_tap + m * plan.kernel_w * V,
                         m == 0 ? gradient + taps * V : nullptr, ahead);
          many = kTogetherBlocks;
        };
        const auto add = [&](auto columns_apart, auto row_of_taps, auto blocks_together) {
          add_rows(columns_apart, row_of_taps, blocks_together,
                   Constant<tap_rows_together(decltype(row_of_taps)::value)>{});
        };
        const bool whole = left + repeated >= V;
        const auto whole_blocks = [&](auto count) {
          constexpr int64_t kCount = decltype(count)::value;
          return kCount > 1 && block + kCount <= last_block && left >= kCount * V;
        };
        const Constant<0> any;
        const Constant<1> one;
        const Constant<2> two;
        const Constant<3> three;
        const Constant<kBlocksOfOneTap> blocks_of_one;
        const Constant<kBlocksOfTwoTaps> blocks_of_two;
        const Constant<kBlocksOfThreeTaps> blocks_of_three;
        const Constant<kBlocksOfOneRow> blocks_of_a_row;
        if (plan.x.count == 3 && apart == 2 && whole)
          add(two, three, one);
        else if (plan.x.count == 3 && apart == 1 && whole)
          add(one, three, one);
        else if (plan.x.count == 3 && in_order && whole_blocks(blocks_of_a_row))
          add_rows(any, three, blocks_of_a_row, one);
        else if (plan.x.count == 3 && whole_blocks(blocks_of_three))
          add(any, three, blocks_of_three);
        else if (plan.x.count == 3)
          add(any, three, one);
        else if (plan.x.count == 2 && whole_blocks(blocks_of_two))
          add(any, two, blocks_of_two);
        else if (plan.x.count == 2 && apart == 1 && whole)
          add(one, two, one);
        else if (plan.x.count == 2)
          add(any, two, one);
        else if (apart == 1 && whole_blocks(blocks_of_one))
          add(one, one, blocks_of_one);
        else if (apart == 1 && whole)
          add(one, one, one);
        else
          add(any, one, one);
      }
    }
  }
}

}  // namespace
