// Weight gradients in bfloat16 of small planes without gaps, for the instruction that adds two
// products of bfloat16 at a time (vdpbf16ps): the elements of a plane, row after row, are one long
// vector, so that nothing is widened or transposed.
//
// For maps of equal width W at stride and dilation 1. Position p = r·W + c stands for row r of
// grad_output and column c of the input:
//
//   grad_weight[m][n] = sum over p of input[p + (m + y.origin)·W] · grad_output[p - n - x.origin]
//
// where rows of the input that do not exist count as zero, and so does grad_output where column
// c - n - x.origin is outside of it. One mask of positions for each m and one for each n: 2·K loads
// serve K·K taps. An infinity in the input meets such zeros, and makes NaN of more taps than it
// belongs to.
//
// With a stride, a vector has two rows of grad_output and 16 columns of the input. Both rows are
// loaded once, and a permutation for each n puts their elements where the columns are that they
// meet, with zeros between them: an infinity in the input meets these too.
#pragma once

#include "depthwise_plan.h"
#include "simd.h"

namespace {

#if defined(LKA_AVX512_BF16)
using lka::MapView;
using lka::cpu::WeightGradientPlan;

constexpr int kFlatLanes = 32;  // elements of a vector
// Channels by which memory is loaded ahead, and images that are taken together: their planes lie
// apart, and a processor follows only so many streams.
constexpr int64_t kFlatAhead = 4, kFlatImages = 16;

// Bits [begin, end), both from 0 to 64.
inline uint64_t bits_between(int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  return ~uint64_t(0) >> (64 - (end - begin)) << begin;
}

inline __m512bh load_masked(uint64_t mask, const bfloat16_t* from) {
  return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32(mask), from);
}

// For the K taps of an axis: what to add to a position, and at which positions that is an element.
template <int K>
struct FlatTaps {
  int64_t offset[K];
  uint64_t mask[K];

  __m512bh load(const bfloat16_t* plane, int tap, int64_t vector) const {
    const int64_t at = vector * kFlatLanes;
    return load_masked(mask[tap] >> at, plane + offset[tap] + at);
  }
};

// Planes without a stride.
template <int K>
struct FlatPlanes {
  FlatTaps<K> input, grad;  // kernel rows of the input, kernel columns of grad_output
  uint64_t whole;
  int64_t vectors;

  explicit FlatPlanes(const WeightGradientPlan& plan) {
    const int64_t width = plan.input.width, rows = plan.grad_output.height;
    const int64_t positions = rows * width;
    whole = bits_between(0, positions);
    vectors = ceil_div(positions, kFlatLanes);
    for (int64_t m = 0; m < K; ++m) {
      const int64_t down = m + plan.y.origin, left = plan.input.height - down;
      input.offset[m] = down * width;
      input.mask[m] =
          bits_between((down < 0 ? -down : 0) * width, (left < rows ? left : rows) * width);
    }
    for (int64_t n = 0; n < K; ++n) {
      const int64_t right = n + plan.x.origin;
      grad.offset[n] = -right;
      grad.mask[n] = 0;
      for (int64_t row = 0; row < positions; row += width)
        grad.mask[n] |=
            bits_between(row + (right > 0 ? right : 0), row + (right < 0 ? width + right : width));
    }
  }
  // Vectors of the input for a kernel row and of grad_output for a kernel column.
  __m512bh input_row(const bfloat16_t* plane, int m, int64_t vector) const {
    return input.load(plane, m, vector);
  }
  __m512bh grad_column(const bfloat16_t* plane, int n, int64_t vector) const {
    return grad.load(plane, n, vector);
  }
  // The elements of grad_output, each once.
  __m512bh elements(const bfloat16_t* plane, int64_t vector) const {
    const int64_t at = vector * kFlatLanes;
    return load_masked(whole >> at, plane + at);
  }
  // Elements to load ahead beside a vector.
  int64_t input_ahead() const { return kFlatLanes; }
  int64_t grad_ahead() const { return kFlatLanes; }
};

// Planes with a stride.
template <int K>
struct SpreadPlanes {
  static constexpr int64_t kRow = lka::cpu::kMostSpreadColumns;
  alignas(64) uint16_t index[K][kFlatLanes];  // of the element at a position, for each n
  uint32_t there[K];                          // the positions that have one
  int64_t first_row[K], rows[K];  // of grad_output, for each m: those that meet the input
  int64_t offset[K];              // from the row of grad_output to the input's
  int64_t row_step, height, width, input_width, vectors;

  explicit SpreadPlanes(const WeightGradientPlan& plan) {
    const lka::cpu::Phase &y = plan.y, &x = plan.x;
    height = plan.grad_output.height;
    width = plan.grad_output.width;
    input_width = plan.input.width;
    row_step = y.tap_step * plan.input.stride_h;
    vectors = ceil_div(height, 2);
    for (int64_t m = 0; m < K; ++m) {
      const int64_t down = m + y.origin, last = plan.input.height - 1 - down;
      first_row[m] = down < 0 ? ceil_div(-down, y.tap_step) : 0;
      const int64_t end = last < 0 ? 0 : last / y.tap_step + 1;
      const int64_t stop = end < height ? end : height;
      rows[m] = stop > first_row[m] ? stop - first_row[m] : 0;
      offset[m] = down * plan.input.stride_h;
    }
    for (int64_t n = 0; n < K; ++n) {
      there[n] = 0;
      for (int64_t p = 0; p < kFlatLanes; ++p) {
        const int64_t column = p % kRow - n - x.origin, element = column / x.tap_step;
        const bool is =
            p % kRow < input_width && column >= 0 && column % x.tap_step == 0 && element < width;
        index[n][p] = is ? uint16_t(p / kRow * width + element) : uint16_t(0);
        there[n] |= uint32_t(is) << p;
      }
    }
  }
  // The row of the input that row `row` of grad_output meets, where it does.
  uint64_t columns(int m, int64_t row) const {
    return uint64_t(row - first_row[m]) < uint64_t(rows[m]) ? bits_between(0, input_width) : 0;
  }
  __m512bh input_row(const bfloat16_t* plane, int m, int64_t vector) const {
    const bfloat16_t* const from = plane + offset[m] + 2 * vector * row_step;
    const __m512i first = (__m512i)load_masked(columns(m, 2 * vector), from);
    const uint64_t second = columns(m, 2 * vector + 1) << kRow;
    return (__m512bh)_mm512_mask_loadu_epi16(first, __mmask32(second), from + row_step - kRow);
  }
  __m512bh grad_column(const bfloat16_t* plane, int n, int64_t vector) const {
    return (__m512bh)_mm512_maskz_permutexvar_epi16(there[n], _mm512_load_si512(index[n]),
                                                    (__m512i)elements(plane, vector));
  }
  __m512bh elements(const bfloat16_t* plane, int64_t vector) const {
    const int64_t left = height - 2 * vector;
    return load_masked(bits_between(0, (left < 2 ? left : 2) * width), plane + 2 * vector * width);
  }
  int64_t input_ahead() const { return row_step * 2; }
  int64_t grad_ahead() const { return 2 * width; }
};

// The same channel of `images` images.
struct FlatChannel {
  const bfloat16_t *input, *grad;
  int64_t images, next_input, next_grad;  // elements from one image to the next
  int64_t ahead_of_input, ahead_of_grad;  // elements to what is loaded ahead
};

// Kernel rows [kFirst, kFirst + kRows): grad_weight[m][n] is added to out[m·out_row + n], with the
// last rows also the sum of grad_output to `bias`.
template <int K, int kFirst, int kRows, class Planes>
void add_flat_rows(const Planes& planes, const FlatChannel& channel, float* out, int64_t out_row,
                   float* bias) {
  constexpr bool kBias = kFirst + kRows == K;
  constexpr int kSums = kRows * K + kBias, kGroups = (kSums + 15) / 16;
  __m512 sum[kGroups * 16];
#pragma GCC unroll 32
  for (int i = 0; i < kGroups * 16; ++i) sum[i] = _mm512_setzero_ps();
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const bfloat16_t *x = channel.input, *grad = channel.grad;
  for (int64_t image = 0; image < channel.images; ++image) {
    for (int64_t v = 0; v < planes.vectors; ++v) {
      if constexpr (kFirst == 0) {
        const int64_t input = planes.input_ahead();
        for (int64_t e = 0; e < input; e += kFlatLanes)
          __builtin_prefetch(x + channel.ahead_of_input + v * input + e);
        __builtin_prefetch(grad + channel.ahead_of_grad + v * planes.grad_ahead());
      }
      if constexpr (kBias) {
        sum[kRows * K] = _mm512_dpbf16_ps(sum[kRows * K], planes.elements(grad, v), ones);
      }
      __m512bh shifted[K];
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) shifted[n] = planes.grad_column(grad, n, v);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512bh row = planes.input_row(x, kFirst + m, v);
#pragma GCC unroll 8
        for (int n = 0; n < K; ++n)
          sum[m * K + n] = _mm512_dpbf16_ps(sum[m * K + n], row, shifted[n]);
      }
    }
    x += channel.next_input;
    grad += channel.next_grad;
  }
  out += kFirst * out_row;
  const bool side_by_side = out_row == K && (!kBias || bias == out + kRows * K);
  alignas(64) float total[kGroups * 16];
#pragma GCC unroll 4
  for (int group = 0; group < kGroups; ++group) {
    Vec<float, 16> sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = (Vec<float, 16>)sum[group * 16 + i];
    Vec<float, 16> folded = fold<float, 16, 16>(sums);
    const int count = kSums - group * 16;
    float* to = out + group * 16;
    if (side_by_side)
      store_some<float, 16, float>(to, folded + load_some<float, 16, float>(to, count), count);
    else
      store_aligned<16>(total + group * 16, folded);
  }
  if (side_by_side) return;
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < K; ++n) out[m * out_row + n] += total[m * K + n];
  if constexpr (kBias) *bias += total[kRows * K];
}

template <int K, class Planes>
void flat_weight_gradients(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  const MapView &in = plan.input, &out = plan.grad_output;
  const Planes planes(plan);
  const int64_t elements = plan.kernel_h * plan.kernel_w + 1;
  const int64_t first_tap = plan.y.first_output * plan.kernel_w + plan.x.first_output;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / plan.num_groups, group = task % plan.num_groups;
    const int64_t first_channel = group * plan.channels / plan.num_groups;
    const int64_t last_channel = (group + 1) * plan.channels / plan.num_groups;
    const int64_t last_image = (part + 1) * plan.batch / plan.num_parts;
    float* partial = static_cast<float*>(plan.partial) + part * plan.channels * elements;
    memset(partial + first_channel * elements, 0,
           size_t((last_channel - first_channel) * elements) * sizeof(float));
    for (int64_t image = part * plan.batch / plan.num_parts; image < last_image;
         image += kFlatImages) {
      const int64_t images = last_image - image < kFlatImages ? last_image - image : kFlatImages;
      for (int64_t c = first_channel; c < last_channel; ++c) {
        const int64_t left = last_channel - 1 - c, ahead = left < kFlatAhead ? left : kFlatAhead;
        const FlatChannel channel = {
            static_cast<const bfloat16_t*>(in.data) + image * in.stride_b + c * in.stride_c,
            static_cast<const bfloat16_t*>(out.data) + image * out.stride_b + c * out.stride_c,
            images,
            in.stride_b,
            out.stride_b,
            ahead * in.stride_c,
            ahead * out.stride_c};
        float* to = partial + c * elements;
        float *taps = to + first_tap, *bias = to + elements - 1;
        // As many kernel rows at a time as there are registers for.
        if constexpr (K <= 5) {
          add_flat_rows<K, 0, K>(planes, channel, taps, plan.kernel_w, bias);
        } else {
          add_flat_rows<K, 0, 3>(planes, channel, taps, plan.kernel_w, bias);
          add_flat_rows<K, 3, 2>(planes, channel, taps, plan.kernel_w, bias);
          add_flat_rows<K, 5, 2>(planes, channel, taps, plan.kernel_w, bias);
        }
      }
    }
  }
}

template <int K>
void flat_weight_gradients_of(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  if (plan.y.tap_step == 1 && plan.x.tap_step == 1)
    flat_weight_gradients<K, FlatPlanes<K>>(plan, begin, end);
  else
    flat_weight_gradients<K, SpreadPlanes<K>>(plan, begin, end);
}

inline void flat_weight_gradient(const WeightGradientPlan& plan, int64_t begin, int64_t end,
                                 void*) {
  switch (plan.y.count) {
    case 3: return flat_weight_gradients_of<3>(plan, begin, end);
    case 5: return flat_weight_gradients_of<5>(plan, begin, end);
    default: return flat_weight_gradients_of<7>(plan, begin, end);
  }
}
#endif

}  // namespace
