// The microkernel behind forward, backward-input and backward-weight.
//
// Lanes hold V planes (channels, or channel-image pairs). On a zero-padded source buffer
// [rows][columns][V] it computes, lane by lane,
//
//   out[i][j] = sum over m, n of weight[m][n] * source[y.first + i·y.out_step + m·y.tap_step]
//                                                     [x.first + j·x.out_step + n·x.tap_step]
//
// Forward: out is the map, taps the kernel, out_step the stride and tap_step the dilation.
// Backward-weight is the same sum with the roles exchanged: out is the kernel, taps are the
// positions of grad_output, out_step is the dilation and tap_step the stride. Backward-input is
// forward on grad_output with a flipped kernel, one such sum per phase of the stride.
//
// A tile of kRows × kColumns outputs (at most 14 accumulators: with the weight they fill the 16
// registers of AVX2) stays in registers over all taps: one weight load serves the whole tile, and
// every multiply-add takes its other operand straight from memory.
#pragma once

#include "simd.h"

namespace {

struct Axis {
  int64_t out_count;   // outputs
  int64_t taps;        // taps
  int64_t out_step;    // source steps from one output to the next
  int64_t tap_step;    // source steps from one tap to the next
  int64_t first;       // source index of tap 0 of output 0
  int64_t live_begin;  // source indices in [live_begin, live_end) may be non-zero
  int64_t live_end;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Range of taps that meet a live source element for any of `count` outputs from `out` on.
struct TapRange {
  int64_t begin, end;
};

inline TapRange live_taps(const Axis& axis, int64_t out, int64_t count) {
  const int64_t lowest = axis.first + out * axis.out_step;
  const int64_t highest = lowest + (count - 1) * axis.out_step;
  const int64_t begin = ceil_div(axis.live_begin - highest, axis.tap_step);
  const int64_t end = ceil_div(axis.live_end - lowest, axis.tap_step);
  const int64_t clamped = begin < 0 ? 0 : begin;
  return {clamped, end > axis.taps ? axis.taps : end};
}

template <class T, int V>
struct Correlation {
  const T* source;
  int64_t source_columns;
  const T* weight;        // tap (0, 0); V lanes stand side by side
  int64_t weight_row;     // elements from one row of taps to the next
  int64_t weight_column;  // elements from one tap to the next
  Axis y, x;
  const T* bias;       // V values added to every output, or null
  bool accumulate;     // add to what `out` holds, without, bias starts the sum
  T* out;              // element of output (0, 0); V lanes stand side by side
  int64_t out_row;     // elements from one output row to the next
  int64_t out_column;  // elements from one output column to the next
};

// A sum can have thousands of terms, one for every tap or every position of a map. Runs of about
// this many terms are summed from zero before they join the total, which keeps the rounding error
// of a large sum that of a small one.
constexpr int64_t kTermsPerRun = 64;

template <class T, int V, int kRows, int kColumns, bool kUnitStep>
void correlate_tile(const Correlation<T, V>& c, int64_t i, int64_t j) {
  T* out = c.out + i * c.out_row + j * c.out_column;
  const Vec<T, V> start = c.bias ? load_aligned<V>(c.bias) : Vec<T, V>{};
  const TapRange rows = live_taps(c.y, i, kRows);
  const TapRange columns = live_taps(c.x, j, kColumns);
  const int64_t out_step_x = kUnitStep ? V : c.x.out_step * V;
  const int64_t out_step_y = c.y.out_step * c.source_columns * V;
  const int64_t tap_step_x = c.x.tap_step * V;
  const int64_t rows_per_run = kTermsPerRun / (c.x.taps > 0 ? c.x.taps : 1) + 1;
  for (int64_t run = rows.begin;;) {
    const int64_t run_end = run + rows_per_run < rows.end ? run + rows_per_run : rows.end;
    const bool first = run == rows.begin;
    Vec<T, V> sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kColumns; ++t) sum[r][t] = first ? start : Vec<T, V>{};
    for (int64_t m = run; m < run_end; ++m) {
      const T* w = c.weight + m * c.weight_row + columns.begin * c.weight_column;
      const T* s =
          c.source + ((c.y.first + i * c.y.out_step + m * c.y.tap_step) * c.source_columns +
                      c.x.first + j * c.x.out_step + columns.begin * c.x.tap_step) *
                         V;
      for (int64_t n = columns.begin; n < columns.end; ++n) {
        const Vec<T, V> tap = load<T, V>(w);
        for (int r = 0; r < kRows; ++r)
          for (int t = 0; t < kColumns; ++t)
            sum[r][t] += tap * load_aligned<V>(s + r * out_step_y + t * out_step_x);
        w += c.weight_column;
        s += tap_step_x;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kColumns; ++t) {
        T* to = out + r * c.out_row + t * c.out_column;
        store<T, V>(to, c.accumulate || !first ? sum[r][t] + load<T, V>(to) : sum[r][t]);
      }
    run = run_end;
    if (run >= rows.end) break;
  }
}

constexpr int kMaxAccumulators = 14;
constexpr int kMaxTileRows = 4;

// The one place where run-time tile sizes become compile-time ones.
template <class T, int V, int kRows, int kColumns = 1>
void correlate_row_tile(const Correlation<T, V>& c, int64_t i, int64_t j, int columns) {
  if constexpr (kRows * kColumns <= kMaxAccumulators) {
    if (columns != kColumns) return correlate_row_tile<T, V, kRows, kColumns + 1>(c, i, j, columns);
    if (c.x.out_step == 1)
      correlate_tile<T, V, kRows, kColumns, true>(c, i, j);
    else
      correlate_tile<T, V, kRows, kColumns, false>(c, i, j);
  }
}

template <class T, int V>
void correlate(const Correlation<T, V>& c) {
  const int64_t width = c.x.out_count;
  if (width <= 0) return;
  // Tiles of almost equal width: 32 columns become 11 + 11 + 10 rather than 14 + 14 + 4.
  const int64_t num_tiles = (width + kMaxAccumulators - 1) / kMaxAccumulators;
  const int64_t widest = (width + num_tiles - 1) / num_tiles;
  const int64_t fit = kMaxAccumulators / widest;
  const int64_t tile_rows = fit < kMaxTileRows ? fit : kMaxTileRows;
  for (int64_t i = 0; i < c.y.out_count;) {
    const int64_t left = c.y.out_count - i;
    const int64_t rows = left < tile_rows ? left : tile_rows;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t j = tile * width / num_tiles;
      const int columns = int((tile + 1) * width / num_tiles - j);
      switch (rows) {
        case 1: correlate_row_tile<T, V, 1>(c, i, j, columns); break;
        case 2: correlate_row_tile<T, V, 2>(c, i, j, columns); break;
        case 3: correlate_row_tile<T, V, 3>(c, i, j, columns); break;
        default: correlate_row_tile<T, V, 4>(c, i, j, columns);
      }
    }
    i += rows;
  }
}

}  // namespace
