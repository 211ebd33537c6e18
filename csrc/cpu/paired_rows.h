// Pairs of bfloat16 rows, for the instruction that adds two products of bfloat16 at a time
// (vdpbf16ps): a lane of the source holds the elements of two neighbouring rows, a tap the weights
// of two kernel rows. It halves the multiply-adds and the buffer.
//
// With the pairs of rows (0, 1), (2, 3), … an even output row meets the pairs of kernel rows (0,
// 1), (2, 3), …, (K - 1, none), an odd one (none, 0), (1, 2), …: two phases, as of a stride of two.
// With a stride of two all output rows are as the even ones. Where a weight is "none", zero, it
// still multiplies an element of the source: an infinity or NaN there reaches one row of outputs
// more than its window does. Where maps can be read where they stand, row_tiles_kernel.h does
// without a buffer, and pairs such a weight with zeros. Two kernel rows of two taps are paired in
// place too (in_place_sums.h).
#pragma once

#include "depthwise_plan.h"
#include "pack.h"

namespace {

// A pair of weights as bfloat16, in a lane each.
template <int V>
Vec<float, V> pair_of(Vec<float, V> upper, Vec<float, V> lower) {
  return (Vec<float, V>)((Vec<uint32_t, V>)upper >> 16 | (Vec<uint32_t, V>)lower);
}

#if defined(LKA_AVX512_BF16)
// Sixteen elements of an upper and a lower row.
inline Vec<float, 16> load_pair(const bfloat16_t* upper, const bfloat16_t* lower) {
  const __m512i order =
      (__m512i)Vec<uint16_t, 32>{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i rows = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(upper))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(lower)), 1);
  return (Vec<float, 16>)_mm512_permutexvar_epi16(order, rows);
}

struct PairedTaps {
  static constexpr bool kPaired = true;
  template <class T>
  using Output = bfloat16_t;
  static Vec<float, 16> multiply_add(Vec<float, 16> sum, Vec<float, 16> tap, Vec<float, 16> value) {
    return (Vec<float, 16>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)tap, (__m512bh)value);
  }
  static Vec<float, 8> multiply_add(Vec<float, 8> sum, Vec<float, 8> tap, Vec<float, 8> value) {
    return (Vec<float, 8>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)tap, (__m256bh)value);
  }
};
#endif

// The first `count` elements of an upper and a lower row; either pointer may be null, and stands
// for zeros, as do the elements after `count`.
template <int V>
Vec<float, V> load_pair(const bfloat16_t* upper, const bfloat16_t* lower, int count) {
  Vec<uint32_t, V> pair{};
  if (upper) pair = zero_extend<V>(load_bits<V>(upper, count));
  if (lower) pair |= zero_extend<V>(load_bits<V>(lower, count)) << 16;
  return (Vec<float, V>)pair;
}

// One pair of rows of `channels` lanes, as blocks of V lanes `buffer_block` elements apart. Without
// a pointer to a row it is zero.
template <int V>
void pack_pair(const bfloat16_t* upper, const bfloat16_t* lower, const Lanes& lanes,
               int64_t channels, int64_t columns, float* buffer, int64_t buffer_block) {
  const auto at = [](const bfloat16_t* row, int64_t offset) {
    return row == nullptr ? nullptr : row + offset;
  };
  if (lanes.adjacent) {
    const bfloat16_t* const a = at(upper, lanes.offset[0]);
    const bfloat16_t* const b = at(lower, lanes.offset[0]);
    const int64_t full = channels / V;
    const int rest = int(channels % V);
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t from = x * lanes.stride_w;
      float* to = buffer + x * V;
      for (int64_t block = 0; block < full; ++block)
        store_aligned<V>(to + block * buffer_block,
                         load_pair<V>(at(a, from + block * V), at(b, from + block * V), V));
      if (rest)
        store_aligned<V>(to + full * buffer_block,
                         load_pair<V>(at(a, from + full * V), at(b, from + full * V), rest));
    }
    return;
  }
  if (lanes.stride_w == 1) {  // transposed in registers, as in pack_rows
    for (int64_t x = 0; x < columns; x += V) {
      const int64_t p = last_full(x, columns, V);
      const int positions = columns - p < V ? int(columns - p) : V;
      Vec<float, V> square[V];
      for (int l = 0; l < V; ++l)
        square[l] = l < lanes.count ? load_pair<V>(at(upper, lanes.offset[l] + p),
                                                   at(lower, lanes.offset[l] + p), positions)
                                    : Vec<float, V>{};
      transpose<float, V>(square);
      for (int q = 0; q < positions; ++q) store_aligned<V>(buffer + (p + q) * V, square[q]);
    }
    return;
  }
  for (int64_t x = 0; x < columns; ++x)
    for (int l = 0; l < V; ++l) {
      const int64_t from = l < lanes.count ? lanes.offset[l] + x * lanes.stride_w : 0;
      const uint32_t bits[2] = {upper && l < lanes.count ? upper[from].bits : 0u,
                                lower && l < lanes.count ? lower[from].bits : 0u};
      const uint32_t pair = bits[0] | bits[1] << 16;
      memcpy(buffer + x * V + l, &pair, 4);
    }
}

// Pairs of taps of all phases in front of the single ones, [tap y][tap x][V], that stand at
// `single`.
template <int V>
void pair_taps(const lka::cpu::ConvolvePlan& plan, const float* single, float* to) {
  const int64_t row = plan.phases_x[0].taps * V, rows = plan.unpaired_y.taps;
  for (int64_t phase = 0; phase < plan.num_phases_y; ++phase)
    for (int64_t m = 0; m < plan.phases_y[phase].taps; ++m, to += row) {
      const int64_t upper = 2 * m - phase, lower = upper + 1;
      for (int64_t at = 0; at < row; at += V) {
        const Vec<float, V> none = {};
        store_aligned<V>(
            to + at, pair_of<V>(upper >= 0 ? load_aligned<V>(single + upper * row + at) : none,
                                lower < rows ? load_aligned<V>(single + lower * row + at) : none));
      }
    }
}

}  // namespace
