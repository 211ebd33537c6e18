// Sums over the taps of channels_last maps where they stand, for one block of channels: of
// neighbouring outputs with any steps, and of tiles of a row whose shape is known when it is
// compiled.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "paired_rows.h"
#include "prefetch.h"
#include "simd.h"

namespace {

using lka::cpu::Phase;

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

// The same for kBlocks blocks of channels side by side. A tap of all outputs after the other: so
// each is read once for all of them. What it reads in the rows that come after these is loaded
// ahead with it: more lines at a time would wait for each other.
template <class T, class S>
struct InPlaceBlocks {
  const S* source;  // of the first tap of the first output
  int64_t rows, columns, source_row, source_column, source_output;
  int64_t ahead;                      // from an element to the one that is loaded ahead with it
  int64_t ahead_rows, ahead_columns;  // of the first taps: others would load the same again
  const T* weight;                    // of the first tap, [block][row][column][V]
  int64_t weight_row, weight_block;
  const T* bias;  // or null
  S* out;
  int64_t out_column;

  template <int V, int kOutputs, int kBlocks>
  void sum() const {
    Vec<T, V> sums[kOutputs][kBlocks];
#pragma GCC unroll kUnroll
    for (int t = 0; t < kOutputs; ++t)
#pragma GCC unroll kUnroll
      for (int b = 0; b < kBlocks; ++b)
        sums[t][b] = bias ? load_aligned<V>(bias + b * V) : Vec<T, V>{};
    for (int64_t m = 0; m < rows; ++m) {
      const S* from = source + m * source_row;
      const T* w = weight + m * weight_row;
      for (int64_t n = 0; n < columns; ++n, from += source_column, w += V) {
        Vec<T, V> taps[kBlocks];
#pragma GCC unroll kUnroll
        for (int b = 0; b < kBlocks; ++b) {
          taps[b] = load_aligned<V>(w + b * weight_block);
          keep_in_register(taps[b]);
        }
        if (m < ahead_rows && n < ahead_columns)
#pragma GCC unroll kUnroll
          for (int t = 0; t < kOutputs; ++t)
#pragma GCC unroll kUnroll
            for (int b = 0; b < kBlocks; b += kVectorsPerLine<V, S>)
              __builtin_prefetch(from + ahead + t * source_output + b * V);
#pragma GCC unroll kUnroll
        for (int t = 0; t < kOutputs; ++t)
#pragma GCC unroll kUnroll
          for (int b = 0; b < kBlocks; ++b)
            sums[t][b] += taps[b] * load<T, V, S>(from + t * source_output + b * V);
      }
    }
#pragma GCC unroll kUnroll
    for (int t = 0; t < kOutputs; ++t)
#pragma GCC unroll kUnroll
      for (int b = 0; b < kBlocks; ++b) store<T, V, S>(out + t * out_column + b * V, sums[t][b]);
  }
};

// The same of one output. Rows of taps are summed four at a time, each on its own, as one sum after
// the other would wait for itself where there are few blocks of channels.
template <class T, class S>
struct InPlaceSum {
  const S* source;  // of the first tap
  int64_t rows, columns, source_row, source_column;
  const T* weight;  // of the first tap, [row][column][V]
  int64_t weight_row;
  const T* bias;  // or null
  S* out;

  template <int V>
  void next_block(int64_t weight_block) {
    source += V;
    out += V;
    weight += weight_block;
    if (bias) bias += V;
  }

  // kWhole: all channels exist.
  template <int V, bool kWhole>
  void sum(int channels) const {
    constexpr int kRows = 4;
    Vec<T, V> sums[kRows] = {bias ? load_aligned<V>(bias) : Vec<T, V>{}};
    const auto add_rows = [&](auto many, int64_t m) __attribute__((always_inline)) {
      constexpr int kMany = decltype(many)::value;
      const S* from = source + m * source_row;
      const T* w = weight + m * weight_row;
      for (int64_t n = 0; n < columns; ++n, from += source_column, w += V)
#pragma GCC unroll kUnroll
        for (int r = 0; r < kMany; ++r)
          sums[r] += load_aligned<V>(w + r * weight_row) *
                     (kWhole ? load<T, V, S>(from + r * source_row)
                             : load_some<T, V, S>(from + r * source_row, channels));
    };
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) add_rows(Constant<kRows>{}, m);
    for (; m < rows; ++m) add_rows(Constant<1>{}, m);
    store_some<T, V, S>(out, (sums[0] + sums[1]) + (sums[2] + sums[3]), kWhole ? V : channels);
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
  static constexpr bool kLong = false, kRuns = false;
  // So few taps that asking for every column takes as long as the sums: that the first tile of a
  // row lacks a column is known when it is compiled.
  static constexpr bool kFewTaps = kPhases == 1 && kStep == 1 && kTaps_ == 2;
  static constexpr int64_t columns(int64_t) { return kColumns; }
};

// Any number of neighbouring taps in a row, as many at a time as registers hold beside kOutputs_
// outputs. With kRuns_ so many rows of taps that sums are cut into runs, of which a shape of few
// rows must know nothing: 1×7 and 2×2 took up to a fifth longer.
template <int kOutputs_, bool kRuns_ = false>
struct LongRow : RowShape<1, 7, 0, 0, kOutputs_> {
  static constexpr bool kLong = true, kRuns = kRuns_;
  static constexpr int64_t columns(int64_t taps) { return kOutputs_ - 1 + taps; }
};

// Which columns, channels and outputs of a tile exist: all, all but the first column, or what the
// tile says.
enum class Exists { all, all_but_first_column, some };

// Sums of one block of channels for a row of such a shape. A source column is read once for all
// outputs that it meets.
template <class T, class S, class Row>
struct InPlaceTile {
  const S* source;  // of kernel row 0 and the first column
  int64_t rows, source_row, source_column;
  int64_t rows_per_run;
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
  template <class Shape, int V, Exists kExists>
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
      if (kExists == Exists::all_but_first_column && s == 0) continue;
      if (kExists == Exists::some && (s < first || s >= end)) continue;
      Vec<T, V> value =
          kExists == Exists::some ? load_some<T, V, S>(from, channels) : load<T, V, S>(from);
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
  template <int V, Exists kExists>
  __attribute__((always_inline)) void add_long(const S* from, const T* tap, int channels,
                                               Sums<V>& sums) const {
    int64_t first = first_column, end = end_column, left = row_taps;
    const auto some = [&](auto many) __attribute__((always_inline)) {
      add<RowShape<1, decltype(many)::value, 0, 0, Row::kOutputs>, V, kExists>(
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

  // Calls each(phase, output) for all sums of the tile.
  template <class Each>
  __attribute__((always_inline)) static void over_sums(const Each& each) {
#pragma GCC unroll kUnroll
    for (int p = 0; p < Row::kPhases; ++p)
#pragma GCC unroll kUnroll
      for (int t = 0; t < Row::kOutputs; ++t) each(p, t);
  }

  // Adds what kernel row m meets.
  template <int V, Exists kExists>
  __attribute__((always_inline)) void add_row(int64_t m, int channels, Sums<V>& sums) const {
    const S* from = source + m * source_row;
    if constexpr (Row::kLong) {
      add_long<V, kExists>(from, weight[0] + m * row_taps * V, channels, sums);
    } else {
      const T* const first_tap[2] = {weight[0] + m * Row::kTaps[0] * V,
                                     weight[1] + m * Row::kTaps[1] * V};
      add<Row, V, kExists>(from, first_tap, first_column, end_column, channels, sums);
    }
  }

#if defined(LKA_AVX512_BF16)
  // Adds what both of two kernel rows meet, as pairs (paired_rows.h): half the multiply-adds.
  template <Exists kExists>
  __attribute__((always_inline)) void add_two_rows(int channels, Sums<16>& sums) const {
    constexpr int V = 16;
    Vec<T, V> taps[Row::kTaps[0]];
#pragma GCC unroll kUnroll
    for (int n = 0; n < Row::kTaps[0]; ++n)
      taps[n] = pair_of<V>(load_aligned<V>(weight[0] + n * V),
                           load_aligned<V>(weight[0] + (Row::kTaps[0] + n) * V));
    const S* from = source;
#pragma GCC unroll kUnrollColumns
    for (int s = 0; s < Row::kColumns; ++s, from += source_column) {
      if (kExists == Exists::all_but_first_column && s == 0) continue;
      if (kExists == Exists::some && (s < first_column || s >= end_column)) continue;
      Vec<T, V> value = kExists == Exists::some ? load_pair<V>(from, from + source_row, channels)
                                                : load_pair(from, from + source_row);
      keep_in_register(value);
#pragma GCC unroll kUnroll
      for (int t = 0; t < Row::kOutputs; ++t)
        if (s >= t && s - t < Row::kTaps[0])
          sums[0][t] = PairedTaps::multiply_add(sums[0][t], taps[s - t], value);
    }
  }
#endif

  // Adds what all kernel rows meet, without runs.
  template <int V, Exists kExists>
  __attribute__((always_inline)) void add_rows(int channels, Sums<V>& sums) const {
#if defined(LKA_AVX512_BF16)
    if constexpr (Row::kFewTaps && sizeof(S) < sizeof(T) && V == 16)
      if (rows == 2) return add_two_rows<kExists>(channels, sums);
#endif
    for (int64_t m = 0; m < rows; ++m) add_row<V, kExists>(m, channels, sums);
  }

  template <int V, Exists kExists>
  void sum(int channels) const {
    const Vec<T, V> start = bias ? load_aligned<V>(bias) : Vec<T, V>{};
    Sums<V> sums;
    over_sums([&](int p, int t) __attribute__((always_inline)) { sums[p][t] = start; });
    if constexpr (Row::kRuns) {
      Sums<V> runs;  // of those before the one at hand
      for (int64_t m = 0, end = rows_per_run; m < rows; end += rows_per_run) {
        for (; m < rows && m < end; ++m) add_row<V, kExists>(m, channels, sums);
        const bool first = end == rows_per_run, last = m == rows;
        over_sums([&](int p, int t) __attribute__((always_inline)) {
          const Vec<T, V> total = first ? sums[p][t] : runs[p][t] + sums[p][t];
          runs[p][t] = total;
          sums[p][t] = last ? total : Vec<T, V>{};
        });
      }
    } else {
      add_rows<V, kExists>(channels, sums);
    }
    over_sums([&](int p, int t) __attribute__((always_inline)) {
      constexpr bool kWhole = kExists != Exists::some;
      if (kWhole || t < outputs[p])
        store_some<T, V, S>(out + t * out_column + p * out_phase, sums[p][t],
                            kWhole ? V : channels);
    });
  }
};

}  // namespace
