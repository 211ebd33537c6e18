// Depthwise convolution of channels_last bfloat16 maps where they stand, two rows in a lane as in
// paired_rows.h: for unit steps and 3, 5 or 7 taps in a row.
//
// Interleaving a vector of 32 channels of one row with that of the next makes two vectors of pairs,
// so that there is nothing to unpack beforehand. Their channels are 0–3, 8–11, 16–19, 24–27 and
// what lies between; weights are packed in this order, and results put back when they are stored.
// Every row of outputs pairs source rows from its own first tap on. That costs no more than pairs
// that serve two rows of outputs: the registers hold sums of both vectors of one row instead.
#pragma once

#include "correlate.h"
#include "depthwise_plan.h"
#include "pack.h"
#include "paired_rows.h"

namespace {

constexpr int kPairLanes = 16, kInterleaved = 2 * kPairLanes;

// The channel in a lane of packed weights.
inline int64_t interleaved_channel(int64_t pattern, int lane, int64_t channels) {
  const int64_t channel = pattern / 2 * kInterleaved + lane / 4 * 8 + pattern % 2 * 4 + lane % 4;
  return channel < channels ? channel : -1;
}

#if defined(LKA_AVX512_BF16)
// kPairedColumns neighbouring outputs of a row for the channels of an interleaved vector. kLeft,
// kRight: the tile begins and ends with the map, beyond which nothing is multiplied.
template <int kTaps, bool kLeft, bool kRight>
struct PairedInPlaceTile {
  static constexpr int kColumns = lka::cpu::kPairedColumns, kPadding = kTaps / 2;
  static constexpr int kFirst = kLeft ? kPadding : 0;
  static constexpr int kEnd = kColumns + kTaps - 1 - (kRight ? kPadding : 0);
  using Pair = Vec<float, kPairLanes>;

  const bfloat16_t* source;  // of kernel row 0 and the first column, that may not exist
  int64_t source_row, source_column;
  int64_t first_row, last_row;  // kernel rows [first, last) meet the source
  const float* weight[2];       // of both vectors, [pair][column][lane]
  const float* bias[2];         // or null
  __mmask32 channels;
  bfloat16_t* out;
  int64_t out_column;
  Ahead& ahead;

  // Not inlined: beside its callers' loops the compiler keeps so many multiples of steps that it
  // spends more time on these than on products.
  __attribute__((noinline)) void convolve() const {
    Pair sums[2][kColumns];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Pair start = bias[v] ? load_aligned<kPairLanes>(bias[v]) : Pair{};
#pragma GCC unroll 8
      for (int t = 0; t < kColumns; ++t) sums[v][t] = start;
    }
    static const bfloat16_t zeros[kInterleaved] = {};
    for (int64_t row = first_row & ~int64_t(1); row < last_row; row += 2) {
      ahead.step();
      Pair taps[2][kTaps];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
#pragma GCC unroll 8
        for (int n = 0; n < kTaps; ++n)
          taps[v][n] = load_aligned<kPairLanes>(weight[v] + (row / 2 * kTaps + n) * kPairLanes);
      // A row that does not exist is a column of zeros, again and again.
      const bool has_upper = row >= first_row, has_lower = row + 1 < last_row;
      const int64_t upper_column = has_upper ? source_column : 0;
      const int64_t lower_column = has_lower ? source_column : 0;
      const bfloat16_t* upper = has_upper ? source + row * source_row : zeros;
      const bfloat16_t* lower = has_lower ? source + (row + 1) * source_row : zeros;
      upper += kFirst * upper_column;
      lower += kFirst * lower_column;
#pragma GCC unroll 16
      for (int x = kFirst; x < kEnd; ++x, upper += upper_column, lower += lower_column) {
        keep_in_register(upper);
        keep_in_register(lower);
        const __m512i first = _mm512_maskz_loadu_epi16(channels, upper);
        const __m512i second = _mm512_maskz_loadu_epi16(channels, lower);
        Pair value[2] = {(Pair)_mm512_unpacklo_epi16(first, second),
                         (Pair)_mm512_unpackhi_epi16(first, second)};
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          keep_in_register(value[v]);
#pragma GCC unroll 8
          for (int n = 0; n < kTaps; ++n)
            if (x - n >= 0 && x - n < kColumns)
              sums[v][x - n] = PairedTaps::multiply_add(sums[v][x - n], taps[v][n], value[v]);
        }
      }
    }
    // Four channels are 64 bits: some of the first vector, some of the second, ….
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    bfloat16_t* to = out;
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t, to += out_column) {
      keep_in_register(to);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)sums[1][t], (__m512)sums[0][t]);
      const __m512i result = _mm512_permutexvar_epi64(in_order, (__m512i)both);
      if (channels == ~__mmask32(0))
        _mm512_storeu_si512(to, result);
      else
        _mm512_mask_storeu_epi16(to, channels, result);
    }
  }
};

// Rows [row, end_row) of outputs of one image: one interleaved vector of channels after the other,
// so that its weights stay near.
template <int kTaps>
void convolve_paired_rows(const ConvolvePlan& plan, const bfloat16_t* source, bfloat16_t* target,
                          int64_t row, int64_t end_row, Ahead& ahead) {
  constexpr int64_t kColumns = lka::cpu::kPairedColumns;
  const Phase& y = plan.unpaired_y;
  const int64_t pattern_elements = plan.packed_taps * kPairLanes;
  const int64_t width = plan.target.width;
  const auto* const weights = static_cast<const float*>(plan.packed_weight);
  const auto* const biases = static_cast<const float*>(plan.packed_bias);
  for (int64_t channel = 0; channel < plan.channels; channel += kInterleaved) {
    const float* const weight = weights + channel / kPairLanes * pattern_elements;
    const float* const bias = plan.bias ? biases + channel : nullptr;
    const int64_t rest = plan.channels - channel;
    const __mmask32 channels = rest < kInterleaved ? (__mmask32(1) << rest) - 1 : ~__mmask32(0);
    for (int64_t i = row; i < end_row; ++i) {
      const TapRange rows = live_taps(axis_of(y, 0, y.count, 0, plan.source.height), i, 1);
      const bfloat16_t* const from = source + (i + y.origin) * plan.source.stride_h + channel;
      bfloat16_t* const to = target + i * plan.target.stride_h + channel;
      const auto tile = [&](auto left, auto right, int64_t j) {
        PairedInPlaceTile<kTaps, decltype(left)::value != 0, decltype(right)::value != 0>{
            from + (j - kTaps / 2) * plan.source.stride_w,
            plan.source.stride_h,
            plan.source.stride_w,
            rows.begin,
            rows.end,
            {weight, weight + pattern_elements},
            {bias, bias ? bias + kPairLanes : nullptr},
            channels,
            to + j * plan.target.stride_w,
            plan.target.stride_w,
            ahead}
            .convolve();
      };
      const Constant<0> inside;
      const Constant<1> edge;
      if (width == kColumns) {
        tile(edge, edge, 0);
        continue;
      }
      tile(edge, inside, 0);
      for (int64_t j = kColumns; j + kColumns < width; j += kColumns) tile(inside, inside, j);
      tile(inside, edge, width - kColumns);
    }
  }
}

// A task is one band of rows of one image.
inline void convolve_paired_in_place(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const MapView &source = plan.source, &target = plan.target;
  const Phase& y = plan.unpaired_y;
  const int64_t steps_of_row = ceil_div(target.width, lka::cpu::kPairedColumns) *
                               ceil_div(plan.channels, kInterleaved) * ((y.taps + 1) / 2);
  const int64_t reach = y.origin + y.taps - 1;  // source rows below that of an output
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.num_bands, first = task % plan.num_bands * plan.band;
    const int64_t last = first + plan.band < target.height ? first + plan.band : target.height;
    const auto* const from = static_cast<const bfloat16_t*>(source.data) + image * source.stride_b;
    auto* const to = static_cast<bfloat16_t*>(target.data) + image * target.stride_b;
    for (int64_t row = first, rows; row < last; row += rows) {
      rows = plan.chunk < last - row ? plan.chunk : last - row;
      // Meanwhile the next rows come into the cache.
      const bool same_task = row + rows < last;
      if (same_task || task + 1 < end) {
        const int64_t next_image = same_task ? image : (task + 1) / plan.num_bands;
        const int64_t next = same_task ? row + rows : (task + 1) % plan.num_bands * plan.band;
        const int64_t end_row = next + plan.chunk, read = next + (same_task ? reach : y.origin);
        ahead.first.begin(channels_region<bfloat16_t>(source, next_image * source.stride_b,
                                                      plan.channels, read, end_row + reach),
                          steps_of_row * rows);
        ahead.second.begin(channels_region<bfloat16_t>(target, next_image * target.stride_b,
                                                       plan.channels, next, end_row),
                           steps_of_row * rows, true);
      }
      switch (plan.phases_x[0].taps) {
        case 3: convolve_paired_rows<3>(plan, from, to, row, row + rows, ahead); break;
        case 5: convolve_paired_rows<5>(plan, from, to, row, row + rows, ahead); break;
        default: convolve_paired_rows<7>(plan, from, to, row, row + rows, ahead);
      }
    }
  }
}
#endif

}  // namespace
