// Weight gradients of a depthwise convolution in float32 by multiply-adds.
//
// A block has one channel and a tile of kTapRows × kTapColumns taps; a thread goes along segments
// of kSegment outputs, dilation apart, with the elements of kTapRows input rows in rings of
// registers: one gradient and kTapRows elements are loaded for all taps of the tile. The threads'
// sums are added by a fixed tree, those of groups of segments in order by sum_partials: the same
// bits every run.
#pragma once

#include "../../conv_params.h"
#include "memory.cuh"

namespace lka::cuda {

struct FloatWeightGradientParams {
  // As in WeightGradientParams.
  MapView grad_output, input;
  float* partials = nullptr;
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;
  int32_t first_h = 0, first_w = 0;
  int32_t full_h = 0, full_w = 0;

  int32_t segments = 0;                   // of a row of grad_output
  int64_t units = 0, units_of_group = 0;  // units: batch · rows · segments
  int32_t groups = 0;                     // blocks: groups · channels · tap tiles
  int32_t tap_tiles_h = 0, tap_tiles_w = 0;
};

struct FloatWeightGradient {
  static constexpr int kTapRows = 2, kTapColumns = 8, kSegment = 16, kThreads = 128;
  static constexpr int kSums = kTapRows * kTapColumns + 1;  // and the bias's
  static constexpr int kWarps = kThreads / 32;
};

class FloatWeightGradientBlock : FloatWeightGradient {
 public:
  LKA_DEVICE FloatWeightGradientBlock(const FloatWeightGradientParams& params, float* shared)
      : p(params), shared_(shared) {
    int64_t block = blockIdx.x;
    tap_w_ = int(block % p.tap_tiles_w) * kTapColumns;
    block /= p.tap_tiles_w;
    tap_h_ = int(block % p.tap_tiles_h) * kTapRows;
    block /= p.tap_tiles_h;
    channel_ = int(block % p.channels);
    group_ = int(block / p.channels);
  }

  LKA_DEVICE void run() {
    float sums[kSums] = {};
    const int64_t first = group_ * p.units_of_group;
    const int64_t end = first + p.units_of_group < p.units ? first + p.units_of_group : p.units;
    for (int64_t unit = first + threadIdx.x; unit < end; unit += kThreads) add_segment(sums, unit);
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], mask);
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kSums; ++i) store_shared(shared_ + threadIdx.x / 32 * kSums + i, sums[i]);
    __syncthreads();
    if (threadIdx.x < kSums) store(int(threadIdx.x));
  }

 private:
  LKA_DEVICE void add_segment(float (&sums)[kSums], int64_t unit) const {
    const int segment = int(unit % p.segments);
    unit /= p.segments;
    const int y = int(unit % p.grad_output.height);
    const int64_t image = unit / p.grad_output.height;
    const int x0 = segment / p.dilation_w * p.dilation_w * kSegment + segment % p.dilation_w;
    const float* grad = static_cast<const float*>(p.grad_output.data) +
                        image * p.grad_output.stride_b + channel_ * p.grad_output.stride_c +
                        y * p.grad_output.stride_h;
    const float* input = static_cast<const float*>(p.input.data) + image * p.input.stride_b +
                         channel_ * p.input.stride_c;
    const int from_y = y - p.top + tap_h_ * p.dilation_h;
    const int from_x = x0 - p.left + tap_w_ * p.dilation_w;
    const auto element = [&](int r, int i) {
      const int at_y = from_y + r * p.dilation_h, at_x = from_x + i * p.dilation_w;
      const bool exists = at_y >= 0 && at_y < p.input.height && at_x >= 0 && at_x < p.input.width;
      return exists ? load_global(input + at_y * p.input.stride_h + at_x * p.input.stride_w) : 0.0f;
    };
    float rings[kTapRows][kTapColumns];
#pragma unroll
    for (int r = 0; r < kTapRows; ++r)
#pragma unroll
      for (int i = 0; i < kTapColumns; ++i) rings[r][i] = element(r, i);
#pragma unroll 1
    for (int i0 = 0; i0 < kSegment; i0 += kTapColumns) {
#pragma unroll
      for (int j = 0; j < kTapColumns; ++j) {
        const int x = x0 + (i0 + j) * p.dilation_w;
        if (x >= p.grad_output.width) return;
        const float g = load_global(grad + x * p.grad_output.stride_w);
        sums[kSums - 1] += g;
#pragma unroll
        for (int r = 0; r < kTapRows; ++r) {
#pragma unroll
          for (int kx = 0; kx < kTapColumns; ++kx)
            sums[r * kTapColumns + kx] += g * rings[r][(j + kx) % kTapColumns];
          rings[r][j] = element(r, i0 + j + kTapColumns);
        }
      }
    }
  }

  LKA_DEVICE void store(int i) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += load_shared(shared_ + warp * kSums + i);
    const int64_t taps = int64_t(p.full_h) * p.full_w;
    float* to = p.partials + (int64_t(group_) * p.channels + channel_) * (taps + 1);
    if (i == kSums - 1) {
      if (tap_h_ == 0 && tap_w_ == 0) store_global(to + taps, sum);
      return;
    }
    const int ky = tap_h_ + i / kTapColumns, kx = tap_w_ + i % kTapColumns;
    if (ky < p.kernel_h && kx < p.kernel_w)
      store_global(to + int64_t(p.first_h + ky) * p.full_w + p.first_w + kx, sum);
  }

  const FloatWeightGradientParams& p;
  float* shared_;
  int tap_h_, tap_w_, channel_, group_;
};

}  // namespace lka::cuda
