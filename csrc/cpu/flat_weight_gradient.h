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
// With a stride, zeros stand between the elements of grad_output. Where it fits a vector it is
// loaded once, and a permutation for each n puts its elements in their places.
#pragma once

#include "depthwise_plan.h"
#include "simd.h"

namespace {

#if defined(LKA_AVX512_BF16)
using lka::MapView;
using lka::cpu::WeightGradientPlan;

constexpr int kFlatLanes = lka::cpu::kMostSpreadElements;  // elements of a vector
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

// grad_output without a stride.
template <int K>
struct FlatGrad : FlatTaps<K> {
  uint64_t whole;

  FlatGrad(const WeightGradientPlan& plan, int64_t positions) : whole(bits_between(0, positions)) {
    const int64_t width = plan.input.width;
    for (int64_t n = 0; n < K; ++n) {
      const int64_t right = n + plan.x.origin;
      this->offset[n] = -right;
      this->mask[n] = 0;
      for (int64_t row = 0; row < positions; row += width)
        this->mask[n] |=
            bits_between(row + (right > 0 ? right : 0), row + (right < 0 ? width + right : width));
    }
  }
  // Its elements, each once.
  __m512bh elements(const bfloat16_t* plane, int64_t at) const {
    return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32(whole >> at), plane + at);
  }
};

// grad_output with a stride, of at most kFlatLanes elements.
template <int K>
struct SpreadGrad {
  alignas(64) uint16_t index[K][lka::cpu::kMostFlatPositions];  // of the element at a position
  uint64_t mask[K];
  __mmask32 whole;

  SpreadGrad(const WeightGradientPlan& plan, int64_t positions) {
    const MapView& grad = plan.grad_output;
    const int64_t width = plan.input.width;
    whole = __mmask32(bits_between(0, grad.height * grad.width));
    for (int64_t n = 0; n < K; ++n) {
      mask[n] = 0;
      for (int64_t p = 0; p < lka::cpu::kMostFlatPositions; ++p) {
        const int64_t row = p / width, column = p % width - n - plan.x.origin;
        const bool there = p < positions && row % plan.y.tap_step == 0 && column >= 0 &&
                           column % plan.x.tap_step == 0 && column / plan.x.tap_step < grad.width;
        index[n][p] = there
                          ? uint16_t(row / plan.y.tap_step * grad.width + column / plan.x.tap_step)
                          : uint16_t(0);
        mask[n] |= uint64_t(there) << p;
      }
    }
  }
  __m512bh load(const bfloat16_t* plane, int tap, int64_t at) const {
    return (__m512bh)_mm512_maskz_permutexvar_epi16(__mmask32(mask[tap] >> at),
                                                    _mm512_load_si512(index[tap] + at),
                                                    _mm512_maskz_loadu_epi16(whole, plane));
  }
  __m512bh elements(const bfloat16_t* plane, int64_t at) const {
    return (__m512bh)_mm512_maskz_loadu_epi16(at == 0 ? whole : __mmask32(0), plane);
  }
};

template <int K, class Grad>
struct FlatPlanes {
  int64_t positions;
  FlatTaps<K> input;  // kernel rows
  Grad grad;          // kernel columns

  explicit FlatPlanes(const WeightGradientPlan& plan)
      : positions(((plan.grad_output.height - 1) * plan.y.tap_step + 1) * plan.input.width),
        grad(plan, positions) {
    const int64_t width = plan.input.width, rows = positions / width;
    for (int64_t m = 0; m < K; ++m) {
      const int64_t down = m + plan.y.origin, left = plan.input.height - down;
      input.offset[m] = down * width;
      input.mask[m] =
          bits_between((down < 0 ? -down : 0) * width, (left < rows ? left : rows) * width);
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
template <int K, int kFirst, int kRows, class Grad>
void add_flat_rows(const FlatPlanes<K, Grad>& flat, const FlatChannel& channel, float* out,
                   int64_t out_row, float* bias) {
  constexpr bool kBias = kFirst + kRows == K;
  constexpr int kSums = kRows * K + kBias, kGroups = (kSums + 15) / 16;
  __m512 sum[kGroups * 16];
#pragma GCC unroll 32
  for (int i = 0; i < kGroups * 16; ++i) sum[i] = _mm512_setzero_ps();
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const bfloat16_t *x = channel.input, *grad = channel.grad;
  for (int64_t image = 0; image < channel.images; ++image) {
    for (int64_t at = 0; at < flat.positions; at += kFlatLanes) {
      if constexpr (kFirst == 0) {
        __builtin_prefetch(x + channel.ahead_of_input + at);
        __builtin_prefetch(grad + channel.ahead_of_grad + at);
      }
      if constexpr (kBias) {
        sum[kRows * K] = _mm512_dpbf16_ps(sum[kRows * K], flat.grad.elements(grad, at), ones);
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

template <int K, class Grad>
void flat_weight_gradients(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  const MapView &in = plan.input, &out = plan.grad_output;
  const FlatPlanes<K, Grad> flat(plan);
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

template <int K>
void flat_weight_gradients_of(const WeightGradientPlan& plan, int64_t begin, int64_t end) {
  if (plan.y.tap_step == 1 && plan.x.tap_step == 1)
    flat_weight_gradients<K, FlatGrad<K>>(plan, begin, end);
  else
    flat_weight_gradients<K, SpreadGrad<K>>(plan, begin, end);
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
