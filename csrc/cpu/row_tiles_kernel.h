// Depthwise convolution of channels_last maps where they stand, for unit steps and 3, 5 or 7 taps
// in a row. Blocks of lanes unpack the source into a buffer first; here a vector of channels is
// used for all taps of a row as soon as it is loaded, and loaded again for the next row of outputs.
//
// A tile is kRowTileColumns neighbouring outputs for one or two vectors of channels, whose sums and
// weights fill the registers. Chunks of rows are taken one tile of channels after the other, so
// that their weights stay near, while the next chunk comes into the cache.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "pack.h"
#include "paired_rows.h"
#include "row_tile_sizes.h"

namespace {

using lka::cpu::kRowTileColumns;

// Source rows one by one.
template <class T, int V, class S>
struct SingleRows {
  using Element = S;
  using Number = T;
  using Taps = SingleTaps;
  static constexpr int kLanes = V, kRows = 1;
  // Vectors of channels in a tile.
  static constexpr int kVectors = LKA_VECTOR_BYTES == 64 ? 2 : 1;

  // `count` channels of kVectors vectors, all of them if kWhole. The vectors are `next` channels
  // apart, less than V where the last of an image overlaps the one before.
  template <bool kWhole, int kVectors>
  __attribute__((always_inline)) static void load_rows(const S* const (&row)[1], int count,
                                                       int64_t next,
                                                       Vec<T, V> (&values)[kVectors]) {
#pragma GCC unroll kUnroll
    for (int v = 0; v < kVectors; ++v)
      values[v] = kWhole ? load<T, V, S>(row[0] + v * next) : load_some<T, V, S>(row[0], count);
  }
  template <bool kWhole, int kVectors>
  __attribute__((always_inline)) static void store_sums(S* to, int count, int64_t next,
                                                        const Vec<T, V> (&sums)[kVectors]) {
#pragma GCC unroll kUnroll
    for (int v = 0; v < kVectors; ++v)
      if (kWhole)
        store<T, V, S>(to + v * next, sums[v]);
      else
        store_some<T, V, S>(to, sums[v], count);
  }
};

// Pairs of bfloat16 rows, as in paired_rows.h. Interleaving a vector of 32 channels of one row with
// that of the next makes two vectors of pairs. Their channels are 0–3, 8–11, 16–19, 24–27 and what
// lies between; weights are packed in this order, and results put back when they are stored. Every
// row of outputs pairs source rows from its own first tap on.
constexpr int kPairLanes = 16, kInterleaved = 2 * kPairLanes;

// The channel in a lane of packed weights.
inline int64_t interleaved_channel(int64_t pattern, int lane, int64_t channels) {
  const int64_t channel = pattern / 2 * kInterleaved + lane / 4 * 8 + pattern % 2 * 4 + lane % 4;
  return channel < channels ? channel : -1;
}

#if defined(LKA_AVX512_BF16)
struct InterleavedRows {
  using Element = bfloat16_t;
  using Number = float;
  using Taps = PairedTaps;
  static constexpr int kLanes = kPairLanes, kRows = 2, kVectors = 2;
  using Pair = Vec<float, kPairLanes>;

  template <bool kWhole>
  static __mmask32 mask(int count) {
    return kWhole ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
  }
  template <bool kWhole, int kVectors>
  __attribute__((always_inline)) static void load_rows(const bfloat16_t* const (&row)[2], int count,
                                                       int64_t, Pair (&values)[kVectors]) {
    const __m512i upper = _mm512_maskz_loadu_epi16(mask<kWhole>(count), row[0]);
    const __m512i lower = _mm512_maskz_loadu_epi16(mask<kWhole>(count), row[1]);
    values[0] = (Pair)_mm512_unpacklo_epi16(upper, lower);
    values[1] = (Pair)_mm512_unpackhi_epi16(upper, lower);
  }
  template <bool kWhole, int kVectors>
  __attribute__((always_inline)) static void store_sums(bfloat16_t* to, int count, int64_t,
                                                        const Pair (&sums)[kVectors]) {
    // Four channels are 64 bits: some of the first vector, some of the second, ….
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)sums[1], (__m512)sums[0]);
    const __m512i result = _mm512_permutexvar_epi64(in_order, (__m512i)both);
    if (kWhole)
      _mm512_storeu_si512(to, result);
    else
      _mm512_mask_storeu_epi16(to, mask<kWhole>(count), result);
  }
};
#endif

// kRowTileColumns neighbouring outputs of a row. kLeft, kRight: the tile begins and ends with the
// map, beyond which nothing is multiplied. kWhole: all channels of its vectors exist.
template <class Rows, int kVectors, bool kWhole, int kTaps, bool kLeft, bool kRight>
struct RowTile {
  using S = typename Rows::Element;
  using T = typename Rows::Number;
  static constexpr int V = Rows::kLanes, kRows = Rows::kRows, kPadding = kTaps / 2;
  static constexpr int kFirst = kLeft ? kPadding : 0;
  static constexpr int kEnd = kRowTileColumns + kTaps - 1 - (kRight ? kPadding : 0);

  const S* source;  // of kernel row 0 and the first column, that may not exist
  int64_t source_row, source_column;
  int64_t first_row, last_row;  // kernel rows [first, last) meet the source
  const T* weight;              // of the first vector, [row or pair of rows][column][V]
  int64_t weight_vector;        // elements from those of one vector to the next one's
  const T* bias;                // or null
  int count;                    // of channels
  int64_t next_vector;          // channels from one vector to the next
  S* out;
  int64_t out_column;
  Ahead& ahead;

  // Not inlined: beside its callers' loops the compiler keeps so many multiples of steps that it
  // spends more time on these than on products.
  __attribute__((noinline)) void convolve() const {
    Vec<T, V> sums[kRowTileColumns][kVectors];
#pragma GCC unroll kUnroll
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T, V> start = bias ? load_aligned<V>(bias + v * V) : Vec<T, V>{};
#pragma GCC unroll kUnroll
      for (int t = 0; t < kRowTileColumns; ++t) sums[t][v] = start;
    }
    static const S zeros[kVectors * V] = {};
    for (int64_t m = first_row / kRows; m * kRows < last_row; ++m) {
      ahead.step();
      Vec<T, V> taps[kVectors][kTaps];
#pragma GCC unroll kUnroll
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll kUnroll
        for (int n = 0; n < kTaps; ++n)
          taps[v][n] = load_aligned<V>(weight + v * weight_vector + (m * kTaps + n) * V);
      // A row that does not exist is a column of zeros, again and again.
      const S* row[kRows];
      int64_t column[kRows];
#pragma GCC unroll kUnroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = m * kRows + r;
        const bool exists = kRows == 1 || (at >= first_row && at < last_row);
        column[r] = exists ? source_column : 0;
        row[r] = (exists ? source + at * source_row : zeros) + kFirst * column[r];
      }
#pragma GCC unroll kUnroll
      for (int x = kFirst; x < kEnd; ++x) {
        Vec<T, V> values[kVectors];
        Rows::template load_rows<kWhole>(row, count, next_vector, values);
#pragma GCC unroll kUnroll
        for (int r = 0; r < kRows; ++r) {
          row[r] += column[r];
          keep_in_register(row[r]);
        }
#pragma GCC unroll kUnroll
        for (int v = 0; v < kVectors; ++v) {
          keep_in_register(values[v]);
#pragma GCC unroll kUnroll
          for (int n = 0; n < kTaps; ++n)
            if (x - n >= 0 && x - n < kRowTileColumns)
              sums[x - n][v] = Rows::Taps::multiply_add(sums[x - n][v], taps[v][n], values[v]);
        }
      }
    }
    S* to = out;
#pragma GCC unroll kUnroll
    for (int t = 0; t < kRowTileColumns; ++t, to += out_column) {
      keep_in_register(to);
      Rows::template store_sums<kWhole>(to, count, next_vector, sums[t]);
    }
  }
};

// Rows [row, end_row) of outputs of one image.
template <class Rows, int kTaps>
void convolve_rows(const ConvolvePlan& plan, const typename Rows::Element* source,
                   typename Rows::Element* target, int64_t row, int64_t end_row, Ahead& ahead) {
  using T = typename Rows::Number;
  constexpr int V = Rows::kLanes, kMost = Rows::kVectors * V, kPadding = kTaps / 2;
  const Phase& y = plan.unpaired_y;
  const int64_t width = plan.target.width, weight_vector = plan.packed_taps * V;
  const auto* weight = static_cast<const T*>(plan.packed_weight);
  const auto* bias = plan.bias ? static_cast<const T*>(plan.packed_bias) : nullptr;
  int64_t next_vector = V;
  // `tiles` of channels side by side, of `count` channels each.
  const auto rows_of = [&](auto vectors, auto whole, int64_t channel, int count, int64_t tiles) {
    constexpr int kVectors = decltype(vectors)::value;
    for (int64_t i = row; i < end_row; ++i) {
      const TapRange taps = live_taps(axis_of(y, 0, y.count, 0, plan.source.height), i, 1);
      const auto tile = [&](auto left, auto right, int64_t j) {
        RowTile<Rows, kVectors, decltype(whole)::value != 0, kTaps, decltype(left)::value != 0,
                decltype(right)::value != 0>
            t = {source + (i + y.origin) * plan.source.stride_h +
                     (j - kPadding) * plan.source.stride_w + channel,
                 plan.source.stride_h,
                 plan.source.stride_w,
                 taps.begin,
                 taps.end,
                 weight,
                 weight_vector,
                 bias,
                 count,
                 next_vector,
                 target + i * plan.target.stride_h + j * plan.target.stride_w + channel,
                 plan.target.stride_w,
                 ahead};
        for (int64_t left_over = tiles;;) {
          t.convolve();
          if (--left_over == 0) break;
          t.source += kVectors * V;
          t.weight += kVectors * weight_vector;
          if (bias) t.bias += kVectors * V;
          t.out += kVectors * V;
        }
      };
      const Constant<0> inside;
      const Constant<1> edge;
      if (width == kRowTileColumns) {
        tile(edge, edge, 0);
        continue;
      }
      // Tiles overlap rather than reach beyond the map: the last, and one before it whose taps
      // would.
      tile(edge, inside, 0);
      const int64_t last = width - kRowTileColumns;
      for (int64_t j = kRowTileColumns; j < last; j += kRowTileColumns)
        tile(inside, inside, j < last - kPadding ? j : last - kPadding);
      tile(inside, edge, last);
    }
    weight += tiles * kVectors * weight_vector;
    if (bias) bias += tiles * kVectors * V;
  };
  // Vectors of a line of the cache are taken together.
  constexpr int64_t kLine = 64 / sizeof(typename Rows::Element);
  constexpr int64_t kTogether = kMost < kLine ? kLine / kMost : 1;
  int64_t channel = 0;
  while (channel + kMost <= plan.channels) {
    const int64_t left = (plan.channels - channel) / kMost;
    const int64_t tiles = left < kTogether ? left : kTogether;
    rows_of(Constant<Rows::kVectors>{}, Constant<1>{}, channel, kMost, tiles);
    channel += tiles * kMost;
  }
  // Interleaved vectors come in twos; of others, the last ones one by one.
  constexpr int kRest = Rows::kRows == 1 ? 1 : Rows::kVectors;
  for (; channel < plan.channels; channel += kRest * V) {
    const int64_t left = plan.channels - channel;
    if constexpr (Rows::kRows == 1) {
      if (Rows::kVectors == 2 && left > V && plan.lanes.last_overlaps) {
        next_vector = left - V;
        rows_of(Constant<Rows::kVectors>{}, Constant<1>{}, channel, int(left), 1);
        return;
      }
      if (left >= V || plan.lanes.last_overlaps) {
        rows_of(Constant<1>{}, Constant<1>{}, left >= V ? channel : plan.channels - V, V, 1);
        continue;
      }
    }
    rows_of(Constant<kRest>{}, Constant<0>{}, channel, left < kRest * V ? int(left) : kRest * V, 1);
  }
}

// A task is one band of rows of one image.
template <class Rows>
void convolve_row_tiles(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  using S = typename Rows::Element;
  const MapView &source = plan.source, &target = plan.target;
  const Phase& y = plan.unpaired_y;
  const int64_t steps_of_row = ceil_div(target.width, kRowTileColumns) *
                               ceil_div(plan.channels, Rows::kVectors * Rows::kLanes) *
                               ceil_div(y.taps, Rows::kRows);
  const int64_t reach = y.origin + y.taps - 1;  // source rows below that of an output
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const auto* const from = static_cast<const S*>(source.data) + image * source.stride_b;
    auto* const to = static_cast<S*>(target.data) + image * target.stride_b;
    for (int64_t row = first, rows; row < last; row += rows) {
      rows = plan.chunk < last - row ? plan.chunk : last - row;
      const bool same_task = row + rows < last;
      if (same_task || task + 1 < end) {
        const int64_t next_image = same_task ? image : (task + 1) / plan.num_bands;
        const int64_t next = same_task ? row + rows : (task + 1) % plan.num_bands * plan.band;
        const int64_t end_row = next + plan.chunk, read = next + (same_task ? reach : y.origin);
        ahead.first.begin(channels_region<S>(source, next_image * source.stride_b, plan.channels,
                                             read, end_row + reach),
                          steps_of_row * rows);
        ahead.second.begin(
            channels_region<S>(target, next_image * target.stride_b, plan.channels, next, end_row),
            steps_of_row * rows, true);
      }
      switch (plan.phases_x[0].taps) {
        case 3: convolve_rows<Rows, 3>(plan, from, to, row, row + rows, ahead); break;
        case 5: convolve_rows<Rows, 5>(plan, from, to, row, row + rows, ahead); break;
        default: convolve_rows<Rows, 7>(plan, from, to, row, row + rows, ahead);
      }
    }
  }
}

}  // namespace
