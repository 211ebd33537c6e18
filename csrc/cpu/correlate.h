// The microkernel behind forward, backward-input and backward-weight.
//
// Lanes hold V planes (channels, or channel-image pairs). On zero-padded source rows
// [columns][V] it computes, lane by lane,
//
//   out[i][j] = sum over m, n of weight[m][n] * source[y.first + i·y.out_step + m·y.tap_step]
//                                                     [x.first + j·x.out_step + n·x.tap_step]
//
// Forward: out is the map, taps the kernel, out_step the stride and tap_step the dilation.
// Backward-weight is the same sum with the roles exchanged: out is the kernel, taps are the
// positions of grad_output, out_step is the dilation and tap_step the stride. Backward-input is
// forward on grad_output with a flipped kernel, one such sum per phase of the stride.
//
// A tile of kRows × kColumns outputs stays in registers over all taps; so do the weights of a few
// taps, which each vector of the source meets as soon as it is loaded.
#pragma once

#include "depthwise_plan.h"
#include "prefetch.h"
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

// Outputs from first_out on of a phase, in a buffer that begins at source element buffer_begin.
inline Axis axis_of(const lka::cpu::Phase& phase, int64_t first_out, int64_t count,
                    int64_t buffer_begin, int64_t live_size) {
  return Axis{count,
              phase.taps,
              phase.out_step,
              phase.tap_step,
              phase.origin + first_out * phase.out_step - buffer_begin,
              -buffer_begin,
              live_size - buffer_begin};
}

// Steps are mostly 1, and a division would cost as much as ten multiply-adds.
inline int64_t ceil_div(int64_t a, int64_t b) {
  if (b == 1) return a;
  return a >= 0 ? (a + b - 1) / b : -(-a / b);
}
inline int64_t quotient(int64_t a, int64_t b) { return b == 1 ? a : a / b; }
inline int64_t remainder(int64_t a, int64_t b) { return b == 1 ? 0 : a % b; }

// Range of taps that meet a live source element for any of `count` outputs from `out` on.
struct TapRange {
  int64_t begin, end;
};

__attribute__((always_inline)) inline TapRange live_taps(const Axis& axis, int64_t out,
                                                         int64_t count) {
  const int64_t lowest = axis.first + out * axis.out_step;
  const int64_t highest = lowest + (count - 1) * axis.out_step;
  const int64_t begin = ceil_div(axis.live_begin - highest, axis.tap_step);
  const int64_t end = ceil_div(axis.live_end - lowest, axis.tap_step);
  const int64_t clamped = begin < 0 ? 0 : begin;
  return {clamped, end > axis.taps ? axis.taps : end};
}

// How a tap meets an element of the source. A tap is one weight, or two of neighbouring kernel rows
// that meet the elements of two source rows (paired_rows.h).
struct SingleTaps {
  static constexpr bool kPaired = false;
  template <class T>
  using Output = T;
  template <class V>
  static V multiply_add(V sum, V tap, V value) {
    return sum + tap * value;
  }
};

template <class T, int V, class Taps = SingleTaps>
struct Correlation {
  using Output = typename Taps::template Output<T>;
  const T* const* source_rows;  // column 0 of each row; V lanes stand side by side
  const T* weight;              // tap (0, 0); V lanes stand side by side
  int64_t weight_row;           // elements from one row of taps to the next
  int64_t weight_column;        // elements from one tap to the next
  Axis y, x;
  const T* bias;           // V values added to every output, or null
  bool accumulate;         // add to what `out` holds, without, bias starts the sum
  Output* out;             // element of output (0, 0); V lanes stand side by side
  int64_t out_row;         // elements from one output row to the next
  int64_t out_column;      // elements from one output column to the next
  Ahead* ahead = nullptr;  // advances by steps_of_rows for the rows of taps of a tile
};

// A copy of a correlation, as a store of a vector might change what lies behind a reference; made
// number by number. The compiler would copy whole vectors: read across what the caller has only
// just stored one by one, they wait until these stores and all before have left for the cache.
template <class N>
__attribute__((always_inline)) inline N scalar(N n) {
  asm("" : "+r"(n));
  return n;
}

__attribute__((always_inline)) inline Axis copy_of(const Axis& a) {
  return {scalar(a.out_count), scalar(a.taps),       scalar(a.out_step), scalar(a.tap_step),
          scalar(a.first),     scalar(a.live_begin), scalar(a.live_end)};
}

template <class T, int V, class Taps>
__attribute__((always_inline)) inline Correlation<T, V, Taps> copy_of(
    const Correlation<T, V, Taps>& c) {
  return {scalar(c.source_rows), scalar(c.weight),  scalar(c.weight_row), scalar(c.weight_column),
          copy_of(c.y),          copy_of(c.x),      scalar(c.bias),       c.accumulate,
          scalar(c.out),         scalar(c.out_row), scalar(c.out_column), scalar(c.ahead)};
}

// A sum can have thousands of terms, one for every tap or every position of a map. Runs of about
// this many terms are summed from zero before they join the total, which keeps the rounding error
// of a large sum that of a small one.
constexpr int32_t kTermsPerRun = 64;
// Rows of so many taps in a run. A narrow output rounds more than any order of the sum, and may not
// be rounded twice.
template <class T, class Output>
inline int64_t rows_of_run(int64_t taps) {
  if (sizeof(Output) < sizeof(T)) return INT64_MAX / 2;
  return kTermsPerRun / int32_t(taps > 0 ? taps : 1) + 1;
}

// AVX-512 has 32 vector registers, the others 16: accumulators, the weights of a run of taps, and
// one or two for the source must fit.
#if defined(__SANITIZE_ADDRESS__)  // whose checks in every unrolled line take minutes to compile
constexpr int kMaxAccumulators = 6, kMaxTaps = 3;
#elif LKA_VECTOR_BYTES == 64
constexpr int kMaxAccumulators = 14, kMaxTaps = 7;
#else
constexpr int kMaxAccumulators = 10, kMaxTaps = 3;
#endif
constexpr int kMaxTileRows = 4;
constexpr int kMaxColumnRows = 7;  // of one column, whose sums would else wait for themselves

// kTaps neighbouring taps of one kernel row. With unit steps output t and tap n meet at source
// column t + n: each vector of the source is loaded once and meets every tap that uses it. The
// first and the last kZeros columns hold zeros and are left out.
template <class T, int V, class Taps, int kRows, int kColumns, int kTaps, int kZeros = 0>
__attribute__((always_inline)) inline void add_taps(Vec<T, V> (&sum)[kRows][kColumns], const T* w,
                                                    int64_t weight_column,
                                                    const T* const (&s)[kRows]) {
  Vec<T, V> tap[kTaps];
#pragma GCC unroll 8
  for (int n = 0; n < kTaps; ++n) tap[n] = load<T, V>(w + n * weight_column);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 32
    for (int x = kZeros; x < kColumns + kTaps - 1 - kZeros; ++x) {
      Vec<T, V> value = load_aligned<V>(s[r] + x * V);
      keep_in_register(value);
#pragma GCC unroll 8
      for (int n = 0; n < kTaps; ++n)
        if (x - n >= 0 && x - n < kColumns)
          sum[r][x - n] = Taps::multiply_add(sum[r][x - n], tap[n], value);
    }
  }
}

// Steps of Correlation::ahead in `rows` rows of taps: one a row and one a run of kMaxTaps, or one
// every second row where rows are so short that stepping would tell.
constexpr int64_t kShortRow = 3;

inline int64_t steps_of_rows(int64_t rows, int64_t taps, int64_t out_step, int64_t tap_step) {
  if (taps <= kShortRow) return (rows + 1) / 2;
  return rows * (1 + (out_step == 1 && tap_step == 1 ? taps / kMaxTaps : 0));
}

// The small maps of the usual networks are 7 or 14 columns wide, their kernels 3, 5 or 7, their
// padding half of that: where one tile spans such a map, it need not multiply the padding. That is
// 17 % of the multiply-adds of 5 taps on 7 columns, 24 % of those of 7 taps.
template <int kRows, int kColumns, int kTaps>
constexpr bool kSpansMap = (kColumns == 7 || kColumns == 14) &&
                           kRows * kColumns + kTaps + 1 <= (LKA_VECTOR_BYTES == 64 ? 32 : 16);

inline bool spans_map(const Axis& x, int64_t columns) {
  const int64_t padding = x.taps / 2;
  return x.out_count == columns && x.live_begin == x.first + padding &&
         x.live_end == x.live_begin + columns;
}

// A rectangle of outputs that tiles of kRows × kColumns cover exactly. With kSpanTaps a tile spans
// the map and that is the number of taps, otherwise it is 0.
template <class T, int V, class Taps, int kRows, int kColumns, bool kUnitStep, int kSpanTaps = 0>
void correlate_tiles(const Correlation<T, V, Taps>& correlation, int64_t i_begin, int64_t i_end,
                     int64_t j_begin, int64_t j_end) {
  const Correlation<T, V, Taps> c = copy_of(correlation);
  using Output = typename Correlation<T, V, Taps>::Output;
  const int64_t tap_step_x = c.x.tap_step * V, out_step_x = c.x.out_step * V;
  const int64_t rows_per_run = rows_of_run<T, Output>(c.x.taps);
  // Runs end at the same rows of taps for all tiles, and where there are several the bias is added
  // to the sum of the first: no output depends on how a map is cut into tiles, nor on how it is
  // cut among threads.
  const bool one_run = c.y.taps <= rows_per_run;
  const bool short_rows = c.x.taps <= kShortRow;
  const Vec<T, V> bias = c.bias ? load_aligned<V>(c.bias) : Vec<T, V>{};
  const Vec<T, V> start = one_run ? bias : Vec<T, V>{};
  for (int64_t j = j_begin; j < j_end; j += kColumns) {
    const TapRange columns = live_taps(c.x, j, kColumns);
    const int64_t num_columns = columns.end - columns.begin;
    const T* weight = c.weight + columns.begin * c.weight_column;
    const int64_t offset = (c.x.first + columns.begin * c.x.tap_step) * V + j * out_step_x;
    const T* const* source = c.source_rows + c.y.first + i_begin * c.y.out_step;
    Output* out = c.out + i_begin * c.out_row + j * c.out_column;
    for (int64_t i = i_begin; i < i_end;
         i += kRows, source += kRows * c.y.out_step, out += kRows * c.out_row) {
      const TapRange rows = live_taps(c.y, i, kRows);
      for (int64_t run = rows.begin;;) {
        const int64_t last = (run / rows_per_run + 1) * rows_per_run;
        const int64_t run_end = last < rows.end ? last : rows.end;
        const bool first = run == rows.begin;
        Vec<T, V> sum[kRows][kColumns];
        for (int r = 0; r < kRows; ++r)
          for (int t = 0; t < kColumns; ++t) sum[r][t] = start;
        for (int64_t m = run; m < run_end; ++m) {
          if (c.ahead && !(short_rows && (m & 1))) c.ahead->step();
          const T* w = weight + m * c.weight_row;
          const T* s[kRows];
          for (int r = 0; r < kRows; ++r)
            s[r] = source[m * c.y.tap_step + r * c.y.out_step] + offset;
          if constexpr (kSpanTaps > 0) {
            add_taps<T, V, Taps, kRows, kColumns, kSpanTaps, kSpanTaps / 2>(sum, w, c.weight_column,
                                                                            s);
            continue;
          }
          int64_t left = num_columns;
          const auto take = [&](int64_t taps) __attribute__((always_inline)) {
            left -= taps;
            w += taps * c.weight_column;
            for (int r = 0; r < kRows; ++r) s[r] += taps * tap_step_x;
          };
          if constexpr (kUnitStep) {
            for (; left >= kMaxTaps; take(kMaxTaps)) {
              if (c.ahead) c.ahead->step();
              add_taps<T, V, Taps, kRows, kColumns, kMaxTaps>(sum, w, c.weight_column, s);
            }
            if constexpr (kMaxTaps > 5)
              for (; left >= 5; take(5))
                add_taps<T, V, Taps, kRows, kColumns, 5>(sum, w, c.weight_column, s);
            if constexpr (kMaxTaps > 3)
              for (; left >= 3; take(3))
                add_taps<T, V, Taps, kRows, kColumns, 3>(sum, w, c.weight_column, s);
          }
          const auto add_single_taps = [&](int64_t column) __attribute__((always_inline)) {
            for (; left > 0; take(1)) {
              const Vec<T, V> tap = load<T, V>(w);
              for (int r = 0; r < kRows; ++r)
                for (int t = 0; t < kColumns; ++t)
                  sum[r][t] =
                      Taps::multiply_add(sum[r][t], tap, load_aligned<V>(s[r] + t * column));
            }
          };
          // A step that the compiler knows stands in the instructions. Of another one, the
          // addresses of a tile's columns take more registers than there are.
          if (kUnitStep || c.x.out_step == 1)
            add_single_taps(V);
          else
            add_single_taps(out_step_x);
        }
        const bool add = c.accumulate || !first;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Output* to = out + r * c.out_row;
#pragma GCC unroll 32
          for (int t = 0; t < kColumns; ++t, to += c.out_column) {
            keep_in_register(to);
            if (first && !one_run) sum[r][t] += bias;
            if (add) sum[r][t] += load<T, V>(to);
            store<T, V>(to, sum[r][t]);
          }
        }
        run = run_end;
        if (run >= rows.end) break;
      }
    }
  }
}

// The one place where run-time tile sizes become compile-time ones.
template <class T, int V, class Taps, int kRows, int kColumns = 1>
void correlate_width(const Correlation<T, V, Taps>& c, int64_t i_begin, int64_t i_end,
                     int64_t j_begin, int64_t j_end, int64_t columns) {
  if constexpr (kRows * kColumns <= kMaxAccumulators && (kRows <= kMaxTileRows || kColumns == 1)) {
    if (columns != kColumns)
      return correlate_width<T, V, Taps, kRows, kColumns + 1>(c, i_begin, i_end, j_begin, j_end,
                                                              columns);
    if (c.x.out_step == 1 && c.x.tap_step == 1) {
      if constexpr (kSpansMap<kRows, kColumns, 3>)
        if (c.x.taps <= 7 && spans_map(c.x, kColumns)) {
          if (c.x.taps == 3)
            return correlate_tiles<T, V, Taps, kRows, kColumns, true, 3>(c, i_begin, i_end, j_begin,
                                                                         j_end);
          if constexpr (kSpansMap<kRows, kColumns, 5>)
            if (c.x.taps == 5)
              return correlate_tiles<T, V, Taps, kRows, kColumns, true, 5>(c, i_begin, i_end,
                                                                           j_begin, j_end);
          if constexpr (kSpansMap<kRows, kColumns, 7>)
            if (c.x.taps == 7)
              return correlate_tiles<T, V, Taps, kRows, kColumns, true, 7>(c, i_begin, i_end,
                                                                           j_begin, j_end);
        }
      correlate_tiles<T, V, Taps, kRows, kColumns, true>(c, i_begin, i_end, j_begin, j_end);
    } else
      correlate_tiles<T, V, Taps, kRows, kColumns, false>(c, i_begin, i_end, j_begin, j_end);
  }
}

// How outputs are cut into tiles: of two widths that differ by one, so that 32 columns become
// 11 + 11 + 10, not 14 + 14 + 4.
struct Tiling {
  int64_t num_wide, narrow;  // tiles of narrow + 1 columns, then of narrow
  int64_t tiles_across, rows;

  explicit Tiling(int64_t width) : num_wide(0), narrow(width), tiles_across(1), rows(1) {
    if (width > kMaxAccumulators) {  // divisions would tell where maps are small
      tiles_across = (width + kMaxAccumulators - 1) / kMaxAccumulators;
      narrow = width / tiles_across;
      num_wide = width % tiles_across;
    }
    const int64_t widest = num_wide ? narrow + 1 : narrow;
    const int64_t most = widest == 1 ? kMaxColumnRows : kMaxTileRows;
    while (rows < most && (rows + 1) * widest <= kMaxAccumulators) ++rows;
  }
  int64_t tiles(int64_t height) const { return tiles_across * ((height + rows - 1) / rows); }
};

template <class T, int V, class Taps>
void correlate(const Correlation<T, V, Taps>& c) {
  const int64_t width = c.x.out_count, height = c.y.out_count;
  if (width <= 0 || height <= 0) return;
  const Tiling tiling(width);
  const int64_t wide = tiling.narrow + 1, wide_end = tiling.num_wide * wide;
  const auto rows = [&](int64_t begin, int64_t end, int64_t tile_rows) {
    const auto columns = [&](int64_t first, int64_t last, int64_t tile_columns) {
      if (first >= last) return;
      switch (tile_rows) {
        case 1: return correlate_width<T, V, Taps, 1>(c, begin, end, first, last, tile_columns);
        case 2: return correlate_width<T, V, Taps, 2>(c, begin, end, first, last, tile_columns);
        case 3: return correlate_width<T, V, Taps, 3>(c, begin, end, first, last, tile_columns);
        case 4: return correlate_width<T, V, Taps, 4>(c, begin, end, first, last, tile_columns);
        case 5: return correlate_width<T, V, Taps, 5>(c, begin, end, first, last, tile_columns);
        case 6: return correlate_width<T, V, Taps, 6>(c, begin, end, first, last, tile_columns);
        default: return correlate_width<T, V, Taps, 7>(c, begin, end, first, last, tile_columns);
      }
    };
    if (begin >= end) return;
    columns(0, wide_end, wide);
    columns(wide_end, width, tiling.narrow);
  };
  int64_t rest = height;  // as above, no division for a few rows
  if (rest >= 4 * tiling.rows) rest %= tiling.rows;
  while (rest >= tiling.rows) rest -= tiling.rows;
  const int64_t whole = height - rest;
  rows(0, whole, tiling.rows);
  rows(whole, height, height - whole);
}

}  // namespace
