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

// For the K taps of an axis: what to add to a position, and at which positions that is an element.
template <int K>
struct FlatTaps {
  int64_t offset[K];
  uint64_t mask[K];

  __m512bh load(const bfloat16_t* plane, int tap, int64_t at) const {
    return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32(mask[tap] >> at), plane + offset[tap] + at);
  }
};

template <int K>
struct FlatPlanes {
  FlatTaps<K> input, grad;  // kernel rows of the input, kernel columns of grad_output
  int64_t positions;

  explicit FlatPlanes(const WeightGradientPlan& plan) {
    const int64_t width = plan.input.width, rows = plan.grad_output.height;
    positions = rows * width;
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
};

// The same channel of `images` images.
struct FlatChannel {
  const bfloat16_t *input, *grad;
  int64_t images, next_input, next_grad;  // elements from one image to the next
  int64_t ahead_of_input, ahead_of_grad;  // elements to what is loaded ahead
};

// Kernel rows [kFirst, kFirst + kRows): grad_weight[m][n] is added to out[m·out_row + n], with the
// last rows also the sum of grad_output to `bias`.
template <int K, int kFirst, int kRows>
void add_flat_rows(const FlatPlanes<K>& flat, const FlatChannel& channel, float* out,
                   int64_t out_row, float* bias) {
  constexpr bool kBias = kFirst + kRows == K;
  constexpr int kSums = kRows * K + kBias, kGroups = (kSums + 15) / 16;
  __m512 sum[kGroups * 16];
#pragma GCC unroll 32
  for (int i = 0; i < kGroups * 16; ++i) sum[i] = _mm512_setzero_ps();
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const uint64_t whole = bits_between(0, flat.positions);
  const bfloat16_t *x = channel.input, *grad = channel.grad;
  for (int64_t image = 0; image < channel.images; ++image) {
    for (int64_t at = 0; at < flat.positions; at += kFlatLanes) {
      if constexpr (kFirst == 0) {
        __builtin_prefetch(x + channel.ahead_of_input + at);
        __builtin_prefetch(grad + channel.ahead_of_grad + at);
      }
      if constexpr (kBias) {
        sum[kRows * K] = _mm512_dpbf16_ps(
            sum[kRows * K], (__m512bh)_mm512_maskz_loadu_epi16(__mmask32(whole >> at), grad + at),
            ones);
      }
      __m512bh shifted[K];
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) shifted[n] = flat.grad.load(grad, n, at);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512bh row = flat.input.load(x, kFirst + m, at);
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

template <int K>
void flat_weight_gradients(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  const MapView &in = plan.input, &out = plan.grad_output;
  const FlatPlanes<K> flat(plan);
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
          add_flat_rows<K, 0, K>(flat, channel, taps, plan.kernel_w, bias);
        } else {
          add_flat_rows<K, 0, 3>(flat, channel, taps, plan.kernel_w, bias);
          add_flat_rows<K, 3, 2>(flat, channel, taps, plan.kernel_w, bias);
          add_flat_rows<K, 5, 2>(flat, channel, taps, plan.kernel_w, bias);
        }
      }
    }
  }
}

inline void flat_weight_gradient(const WeightGradientPlan& plan, int64_t begin, int64_t end,
                                 void*) {
  switch (plan.y.count) {
    case 3: return flat_weight_gradients<3>(plan, begin, end);
    case 5: return flat_weight_gradients<5>(plan, begin, end);
    default: return flat_weight_gradients<7>(plan, begin, end);
  }
}
#endif

}  // namespace
