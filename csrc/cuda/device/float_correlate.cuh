// Depthwise correlation in float32 by multiply-adds: forward, and backward-input with the taps
// reversed. IEEE arithmetic, no tf32.
//
// A thread has kRows × kColumns outputs of one channel, dilation apart, so that an element of the
// source that it loads meets kRows kernel rows and kColumns taps of each. Along a row the elements
// in hand are a ring of kColumns registers.
#pragma once

#include "../../conv_params.h"
#include "memory.cuh"

namespace lka::cuda {

struct FloatCorrelateParams {
  // As in CorrelateParams.
  MapView source, result;
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t weight_stride_c = 0;
  int64_t first_tap = 0, tap_stride_y = 0, tap_stride_x = 0;  // negative strides: taps reversed
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;

  bool channels_in_lanes = false;   // neighbouring threads have neighbouring channels
  int32_t strips = 0, columns = 0;  // of kRows rows, of kColumns columns
  int64_t threads = 0;              // batch · channels · strips · columns
};

struct FloatCorrelate {
  static constexpr int kRows = 4, kColumns = 8, kThreads = 128;
};

class FloatCorrelateThread : FloatCorrelate {
 public:
  LKA_DEVICE explicit FloatCorrelateThread(const FloatCorrelateParams& params) : p(params) {}

  LKA_DEVICE void run() {
    int64_t rest = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (rest >= p.threads) return;
    int channel = 0;
    const auto take = [&](int n) {
      const int64_t quotient = rest / n;
      const int remainder = int(rest - quotient * n);
      rest = quotient;
      return remainder;
    };
    if (p.channels_in_lanes) channel = take(p.channels);
    const int x0 = first(take(p.columns), p.dilation_w, kColumns);
    const int y0 = first(take(p.strips), p.dilation_h, kRows);
    if (!p.channels_in_lanes) channel = take(p.channels);
    const int64_t image = rest;

    const float bias = p.bias == nullptr ? 0.0f : load_global(p.bias + channel);
    float sums[kRows][kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[r][i] = bias;
    const auto* source = static_cast<const float*>(p.source.data) + image * p.source.stride_b +
                         channel * p.source.stride_c;
    const float* weight = p.weight + channel * p.weight_stride_c + p.first_tap;
    for (int s = 0; s < p.kernel_h + kRows - 1; ++s) {
      const int y = y0 - p.top + s * p.dilation_h;
      if (y < 0 || y >= p.source.height) continue;
      add_row(sums, source + y * p.source.stride_h, x0 - p.left, weight, s);
    }
    auto* result = static_cast<float*>(p.result.data) + image * p.result.stride_b +
                   channel * p.result.stride_c;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int y = y0 + r * p.dilation_h, x = x0 + i * p.dilation_w;
        if (y < p.result.height && x < p.result.width)
          store_global(result + y * p.result.stride_h + x * p.result.stride_w, sums[r][i]);
      }
  }

 private:
  // The first of `size` elements, dilation apart, of group `i`.
  static LKA_DEVICE int first(int i, int dilation, int size) {
    return i / dilation * dilation * size + i % dilation;
  }

  LKA_DEVICE float element(const float* row, int x) const {
    return x >= 0 && x < p.source.width ? load_global(row + x * p.source.stride_w) : 0.0f;
  }

  LKA_DEVICE void add_row(float (&sums)[kRows][kColumns], const float* row, int x,
                          const float* weight, int s) {
    float ring[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) ring[i] = element(row, x + i * p.dilation_w);
    for (int kx0 = 0; kx0 < p.kernel_w; kx0 += kColumns) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int kx = kx0 + j;
        if (kx >= p.kernel_w) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int ky = s - r;
          if (ky < 0 || ky >= p.kernel_h) continue;
          const float tap = load_global(weight + ky * p.tap_stride_y + kx * p.tap_stride_x);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) sums[r][i] += tap * ring[(i + j) % kColumns];
        }
        ring[j] = element(row, x + (kx + kColumns) * p.dilation_w);
      }
    }
  }

  const FloatCorrelateParams& p;
};

}  // namespace lka::cuda
