// The adapter's convolution of one tile of tokens, by multiply-adds in float32.
//
// Rows of the source, between zeros, are staged in shared memory as floats. A thread
// has four neighbouring outputs of one channel; where nothing is dilated, eight floats in hand and
// four taps make sixteen multiply-adds.
#pragma once

#include "adapter_block.cuh"

namespace lka::cuda {

struct alignas(16) Float4 {
  float v[4];
};

// Rows [first_y, end_y) of a grid from column from_x on, of channels `plane` apart, become floats:
// `columns` a row, zeros where the grid ends, rows `pitch` apart and channels `to_plane`. A thread
// goes down a column, loads of four rows under way together, and divides nothing on its way.
template <class Storage, class Map>
LKA_DEVICE void stage_grid(const typename Stored<Storage>::Type* from, int plane, int channels,
                           int width, int first_y, int end_y, int from_x, int columns, float* to,
                           int pitch, int to_plane, Map map) {
  using Element = typename Stored<Storage>::Type;
  constexpr int kBatch = 4;
  const int rows = end_y - first_y, all = channels * rows;
  if (all <= 0) return;
  // Lanes of a row: a power of two.
  int shift = 2;
  while (shift < 5 && (1 << shift) < columns) ++shift;
  const int step = blockDim.x >> shift, step_channels = step / rows,
            step_rows = step - step_channels * rows;
  // From a row to the one `step` behind it, and what more it is where a channel ends between.
  const int step_from = step_channels * plane + step_rows * width, wrap_from = plane - rows * width;
  const int step_to = step_channels * to_plane + step_rows * pitch,
            wrap_to = to_plane - rows * pitch;
  const int first = threadIdx.x >> shift, channel = first / rows;
  from += int64_t(first_y) * width + from_x;
  for (int column = threadIdx.x & ((1 << shift) - 1); column < columns; column += 1 << shift) {
    const int x = from_x + column;
    const bool exists = x >= 0 && x < width;
    int row = first - channel * rows;
    int source = channel * plane + row * width + column;
    int target = channel * to_plane + row * pitch + column;
    for (int i = first; i < all; i += kBatch * step) {
      Element values[kBatch] = {};
      int targets[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        targets[b] = target;
        if (exists && i + b * step < all) values[b] = load_global(from + source);
        row += step_rows;
        source += step_from;
        target += step_to;
        if (row >= rows) {
          row -= rows;
          source += wrap_from;
          target += wrap_to;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b * step < all)
          store_shared(to + targets[b], exists ? map(Stored<Storage>::value(values[b])) : 0.0f);
    }
  }
}

template <class Storage>
class TileConvolution {
  using Element = typename Stored<Storage>::Type;

 public:
  // `source` is (B, r, T); `shared` is that of the block.
  LKA_DEVICE TileConvolution(const AdapterParams& params, const void* from, char* shared)
      : p(params),
        k(params.convolution),
        source_(static_cast<const Element*>(from)),
        staged_(reinterpret_cast<float*>(shared + params.at_source)),
        taps_(reinterpret_cast<float*>(shared + params.at_taps)) {}

  // Calls emit(channel, token of the tile, sum) for `channels` channels from `first` on.
  template <class Emit>
  LKA_DEVICE void run(const TokenTile& tile, int first, int channels, Emit emit) {
    run_prefix(tile, first, channels, emit);
    if (tile.rows == 0) return;
    const int quads = (tile.columns + 3) / 4;
    for (int done = 0; done < channels; done += k.staged_channels) {
      const int channel0 = first + done, live = least(k.staged_channels, channels - done);
      const int units = live * tile.rows * quads;
      const bool whole = k.staged_taps >= k.kernel_h;
      for (int unit0 = 0; unit0 < units; unit0 += blockDim.x) {
        const int unit = unit0 + threadIdx.x;
        const int row = unit / quads % tile.rows, channel = unit / quads / tile.rows;
        const int x = unit % quads * 4;
        float sums[4] = {};
        for (int ky = 0; ky < k.kernel_h; ky += k.staged_taps) {
          if (unit0 == 0 || !whole) {
            __syncthreads();
            stage(tile, channel0, live, ky);
            __syncthreads();
          }
          if (unit < units) accumulate(sums, tile, channel, row, x, ky);
        }
        if (unit >= units) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (x + j < tile.columns)
            emit(channel0 + channel, tile.prefix + row * tile.columns + x + j, sums[j]);
      }
    }
  }

  // Prefix tokens alone: they meet one tap, or none, and in the other modes pass.
  template <class Emit>
  LKA_DEVICE void run_prefix(const TokenTile& tile, int first, int channels, Emit emit) const {
    for (int i = threadIdx.x; i < channels * tile.prefix; i += blockDim.x) {
      const int channel = first + i / tile.prefix, token = i % tile.prefix;
      const Element own = load_global(plane(tile, channel) + tile.t0 + token);
      float value = Stored<Storage>::value(own);
      if (p.prefix_mode == PrefixMode::center_tap)
        value *= p.center < 0 ? 0.0f : tap(channel * k.weight_stride_c + p.center);
      emit(channel, token, value);
    }
  }

 private:
  LKA_DEVICE const Element* plane(const TokenTile& tile, int channel) const {
    return source_ + (tile.image * p.rank + channel) * p.tokens;
  }

  LKA_DEVICE float tap(int64_t at) const {
    return Stored<Storage>::value(load_global(static_cast<const Element*>(p.conv_weight) + at));
  }

  // The first row of the source on the grid that kernel row ky needs.
  LKA_DEVICE int first_row(const TokenTile& tile, int ky) const {
    const int y = tile.y0 - k.top + ky * k.dilation_h;
    return y < 0 ? 0 : y;
  }

  LKA_DEVICE void stage(const TokenTile& tile, int channel0, int channels, int ky) const {
    const int taps = least(k.staged_taps, k.kernel_h - ky);
    const int first = first_row(tile, ky);
    const int end = least(p.height, tile.y0 + tile.rows - k.top + (ky + taps - 1) * k.dilation_h);
    const int columns = k.dilation_w == 1 ? (tile.columns + 3) / 4 * 4 + k.taps_pitch : k.pitch;
    stage_grid<Storage>(plane(tile, channel0) + p.prefix, p.tokens, channels, p.width, first, end,
                        tile.x0 - k.left, columns, staged_, k.pitch, k.staged_rows * k.pitch,
                        [](float value) { return value; });
    stage_taps(channel0, channels, ky, taps);
  }

  // Kernel rows ky to ky + count, between zeros: a thread has one column of some rows.
  LKA_DEVICE void stage_taps(int channel0, int channels, int ky, int count) const {
    constexpr int kBatch = 4;
    const int all = channels * count;
    int shift = 2;
    while (shift < 5 && (1 << shift) < k.taps_pitch) ++shift;
    const int step = blockDim.x >> shift, step_channels = step / count,
              step_rows = step - step_channels * count;
    const auto* weight = static_cast<const Element*>(p.conv_weight) + channel0 * k.weight_stride_c +
                         k.first_tap + ky * k.tap_stride_y;
    for (int kx = threadIdx.x & ((1 << shift) - 1); kx < k.taps_pitch; kx += 1 << shift) {
      int i = threadIdx.x >> shift, channel = i / count, row = i - channel * count;
      while (i < all) {
        Element values[kBatch];
        int places[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          places[b] = i < all ? (channel * k.staged_taps + row) * k.taps_pitch + kx : -1;
          if (i < all && kx < k.kernel_w)
            values[b] = load_global(weight + channel * k.weight_stride_c + row * k.tap_stride_y +
                                    kx * k.tap_stride_x);
          i += step;
          channel += step_channels;
          row += step_rows;
          if (row >= count) {
            row -= count;
            ++channel;
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (places[b] >= 0)
            store_shared(taps_ + places[b],
                         kx < k.kernel_w ? Stored<Storage>::value(values[b]) : 0.0f);
      }
    }
  }

  LKA_DEVICE void accumulate(float (&sums)[4], const TokenTile& tile, int channel, int row, int x,
                             int ky0) const {
    const int end = least(k.kernel_h, ky0 + k.staged_taps);
    const float* rows = staged_ + channel * k.staged_rows * k.pitch + x;
    const float* tap_rows = taps_ + channel * k.staged_taps * k.taps_pitch;
    const int first = first_row(tile, ky0);
    for (int ky = ky0; ky < end; ++ky) {
      const int y = tile.y0 + row - k.top + ky * k.dilation_h;
      if (y < 0 || y >= p.height) continue;
      const float* values = rows + (y - first) * k.pitch;
      const float* taps = tap_rows + (ky - ky0) * k.taps_pitch;
      if (k.dilation_w != 1) {
        for (int kx = 0; kx < k.kernel_w; ++kx) {
          const float t = load_shared(taps + kx);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[j] += t * load_shared(values + kx * k.dilation_w + j);
        }
        continue;
      }
      Float4 near = load_shared(reinterpret_cast<const Float4*>(values));
      for (int kx = 0; kx < k.kernel_w; kx += 4) {
        const Float4 far = load_shared(reinterpret_cast<const Float4*>(values + kx + 4));
        const Float4 t = load_shared(reinterpret_cast<const Float4*>(taps + kx));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[j] += t.v[i] * (i + j < 4 ? near.v[(i + j) & 3] : far.v[(i + j) & 3]);
        near = far;
      }
    }
  }

  const AdapterParams& p;
  const AdapterConvolution& k;
  const Element* source_;
  float *staged_, *taps_;
};

}  // namespace lka::cuda
