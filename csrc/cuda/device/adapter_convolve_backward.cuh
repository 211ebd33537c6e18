// The convolution of the fused adapter backward: one launch with two kinds of blocks, as neither
// needs the other's result. Where the tensor cores have convolved, or will find the taps'
// gradients, what they leave remains: prefix tokens and slope, nothing of the taps.
//
// The first blocks have a tile of tokens and some channels: grad_z = act'(z)·(correlation of grad_c
// with the taps reversed). The others have partial sums of the taps' gradients: a thread has eight
// taps of two neighbouring kernel rows, and goes down strips of four outputs a row. What a row of
// the source is to the one kernel row and a row of grad_c, it is to the other and the row before:
// four loads make 64 multiply-adds. Threads with the same taps are neighbours, and so are their
// strips; what they have is added in a fixed order.
#pragma once

#include "adapter_convolve.cuh"

namespace lka::cuda {

template <class Storage>
class AdapterTapGradientBlock {
  using Element = typename Stored<Storage>::Type;

 public:
  static constexpr int kTaps = 8, kThreads = 128, kWarps = kThreads / 32;
  static constexpr int kSums = 2 * kTaps;  // of a thread

  // Floats that the sums of all threads take: see store.
  static constexpr int floats_of_sums(int units) {
    return units * kSums * (kThreads / units | 1) + 2 * kWarps;
  }

  LKA_DEVICE AdapterTapGradientBlock(const AdapterParams& params, char* shared)
      : p(params), t(params.taps) {
    source_ = reinterpret_cast<float*>(shared);
    grad_ = source_ + t.staged_rows * t.source_pitch;
    int64_t block = blockIdx.x - p.first_weight_block;
    const int tap_tile = int(block % (t.tiles_h * t.tiles_w));
    block /= t.tiles_h * t.tiles_w;
    channel_ = int(block % p.rank);
    group_ = block / p.rank;
    ky0_ = tap_tile / t.tiles_w * t.tap_pairs * 2;
    kx0_ = tap_tile % t.tiles_w * t.tap_chunks * kTaps;
    units_ = t.tap_pairs * t.tap_chunks;
    parts_ = kThreads / units_;
    unit_ = threadIdx.x / parts_;
    part_ = threadIdx.x - unit_ * parts_;
    ky_ = ky0_ + unit_ / t.tap_chunks * 2;
    kx_ = kx0_ + unit_ % t.tap_chunks * kTaps;
  }

  LKA_DEVICE void run() {
    float sums[2][kTaps] = {};
    const int64_t all = int64_t(p.batch) * t.y_pieces * t.x_pieces;
    const int64_t first = group_ * t.pieces_of_group;
    const int64_t end = first + t.pieces_of_group < all ? first + t.pieces_of_group : all;
    for (int64_t piece = first; piece < end; ++piece) add_piece(sums, piece);
    store(sums);
  }

 private:
  LKA_DEVICE const Element* plane(const void* tensor, int64_t image) const {
    return static_cast<const Element*>(tensor) + (image * p.rank + channel_) * p.tokens;
  }

  LKA_DEVICE void add_piece(float (&sums)[2][kTaps], int64_t piece) {
    const int64_t row_of_pieces = piece / t.x_pieces, image = row_of_pieces / t.y_pieces;
    const int x0 = int(piece - row_of_pieces * t.x_pieces) * t.columns;
    const int y0 = int(row_of_pieces - image * t.y_pieces) * t.rows;
    const int rows = least(t.rows, p.height - y0), columns = least(t.columns, p.width - x0);
    const Element *z = plane(p.z, image), *grad_c = plane(p.grad_c, image);
    StagedGrid grad;
    grad.width = p.width;
    grad.first_y = y0;
    grad.end_y = y0 + rows;
    grad.from_x = x0;
    grad.end_x = x0 + columns;  // those beyond belong to the next piece
    grad.columns = grad.pitch = t.grad_pitch;
    StagedGrid source;
    source.width = source.end_x = p.width;
    source.first_y = clamped(y0 - t.top + ky0_ * t.dilation_h, 0, p.height);
    source.end_y = least(p.height, y0 + rows - t.top + (ky0_ + 2 * t.tap_pairs - 1) * t.dilation_h);
    source.from_x = x0 - t.left + kx0_ * t.dilation_w;
    source.columns = source.pitch = t.source_pitch;
    __syncthreads();
    stage_grid<Storage>(grad_c + p.prefix, grad, grad_, [&](const auto& values) {
      for (const float value : values) bias_ += value;
    });
    stage_grid<Storage>(z + p.prefix, source, source_,
                        [&](auto& values) { activate_all(p.before, values); });
    __syncthreads();
    if (y0 == 0 && x0 == 0) add_prefix(z, grad_c);
    if (unit_ < units_ && ky_ < t.kernel_h && kx_ < t.kernel_w)
      add_strips(sums, y0, rows, (columns + 3) / 4, source.first_y);
  }

  // A strip has four columns and, of the rows that are dilation_h apart, up to strip_rows.
  LKA_DEVICE void add_strips(float (&sums)[2][kTaps], int y0, int rows, int quads, int first_y) {
    const int d = t.dilation_h;
    const int of_phase = (rows + d - 1) / d;
    const int strips = (of_phase + t.strip_rows - 1) / t.strip_rows * d * quads;
    for (int strip = part_; strip < strips; strip += parts_) {
      const int segment = strip / quads, x = (strip - segment * quads) * 4;
      const int row0 =
          d == 1 ? segment * t.strip_rows : segment / d * t.strip_rows * d + segment % d;
      // Rows row0 + i·d for i from 0 to count; the source's meet them from `begin` to `end`.
      const int count = least(t.strip_rows, rows_of(rows - row0));
      const int y = y0 + row0 - t.top + ky_ * d;
      const int begin = y < 0 ? least(rows_of(-y), count + 1) : 0;
      const int end = least(count + 1, rows_of(p.height - y));
      if (count <= 0 || begin >= end) continue;
      add_strip(
          sums, grad_ + (row0 + begin * d) * t.grad_pitch + x,
          source_ + (y + begin * d - first_y) * t.source_pitch + x + (kx_ - kx0_) * t.dilation_w,
          begin, end, count);
    }
  }

  // Of `rows`, how many are at multiples of the dilation.
  LKA_DEVICE int rows_of(int rows) const {
    return t.dilation_h == 1 ? rows : (rows + t.dilation_h - 1) / t.dilation_h;
  }

  LKA_DEVICE void add_strip(float (&sums)[2][kTaps], const float* grad, const float* source,
                            int begin, int end, int count) const {
    const int grad_step = t.dilation_h * t.grad_pitch, step = t.dilation_h * t.source_pitch;
    float before[4] = {};
    if (begin > 0) load_row(before, grad - grad_step);
#pragma unroll 2
    for (int i = begin; i < least(end, count); ++i) {
      float now[4];
      load_row(now, grad);
      add_row<2>(sums, now, before, source);
#pragma unroll
      for (int j = 0; j < 4; ++j) before[j] = now[j];
      grad += grad_step;
      source += step;
    }
    // Behind the last row of the strip.
    if (end > count) add_row<1>(sums, before, before, source);
  }

  // A row of the source; where kRows is one, for the second kernel row alone.
  template <int kRows>
  LKA_DEVICE void add_row(float (&sums)[2][kTaps], const float (&now)[4], const float (&before)[4],
                          const float* source) const {
    const auto add = [&](int i, int j, float value) {
      if (kRows == 2) sums[0][i] += now[j] * value;
      sums[1][i] += before[j] * value;
    };
    if (t.dilation_w == 1) {
      float window[kTaps + 4];
      load_row(window, source);
#pragma unroll
      for (int i = 0; i < kTaps; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) add(i, j, window[i + j]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (kx_ + i >= t.kernel_w) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) add(i, j, load_shared(source + i * t.dilation_w + j));
    }
  }

  LKA_DEVICE void add_prefix(const Element* z, const Element* grad_c) {
    if (p.prefix_mode != PrefixMode::center_tap) return;
    for (int token = threadIdx.x; token < p.prefix; token += kThreads) {
      const float grad = Stored<Storage>::value(load_global(grad_c + token));
      const float value = Stored<Storage>::value(load_global(z + token));
      bias_ += grad;
      center_ += grad * activate(p.before, value);
    }
  }

  LKA_DEVICE static float sum_of_warp(float sum) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
  }

  // The sums of the threads with the same taps follow one another in shared memory, an odd number
  // of floats for each tap; behind them those of the warps, for bias and prefix tokens. All are
  // added in their order. Taps that touch nothing have no sums.
  LKA_DEVICE void store(const float (&sums)[2][kTaps]) {
    const int pitch = parts_ | 1;
    float* const of_warps = source_ + units_ * kSums * pitch;
    const float bias = sum_of_warp(bias_), center = sum_of_warp(center_);
    __syncthreads();
    if (unit_ < units_)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        store_shared(source_ + (unit_ * kSums + i) * pitch + part_, sums[i / kTaps][i % kTaps]);
    if (threadIdx.x % 32 == 0) {
      store_shared(of_warps + threadIdx.x / 32, bias);
      store_shared(of_warps + kWarps + threadIdx.x / 32, center);
    }
    __syncthreads();
    const auto total = [](const float* of, int count) {
      float sum = 0;
#pragma unroll 8
      for (int i = 0; i < count; ++i) sum += load_shared(of + i);
      return sum;
    };
    const int64_t taps = int64_t(t.full_h) * t.full_w;
    float* to = p.conv_partials + (group_ * p.rank + channel_) * (taps + 1);
    if (threadIdx.x == kThreads - 1 && ky0_ == 0 && kx0_ == 0)
      store_global(to + taps, total(of_warps, kWarps));
    for (int i = threadIdx.x; i < units_ * kSums; i += kThreads) {
      const int unit = i / kSums, row = unit / t.tap_chunks;
      const int ky = ky0_ + row * 2 + i / kTaps % 2;
      const int kx = kx0_ + (unit - row * t.tap_chunks) * kTaps + i % kTaps;
      if (ky >= t.kernel_h || kx >= t.kernel_w) continue;
      const int tap = (ky + t.first_h) * t.full_w + kx + t.first_w;
      float sum = total(source_ + i * pitch, parts_);
      if (tap == p.center) sum += total(of_warps + kWarps, kWarps);
      store_global(to + tap, sum);
    }
  }

  const AdapterParams& p;
  const AdapterTapGradient& t;
  float *source_, *grad_;
  int64_t group_;
  int channel_, ky0_, kx0_, ky_, kx_;
  int units_, unit_, parts_, part_;
  float bias_ = 0, center_ = 0;  // what the thread has of the bias' gradient and of prefix tokens'
};

template <class Storage>
class AdapterConvolveBackwardBlock {
  using Element = typename Stored<Storage>::Type;

 public:
  LKA_DEVICE AdapterConvolveBackwardBlock(const AdapterParams& params, char* shared)
      : p(params), shared_(shared) {}

  LKA_DEVICE void run() {
    if (int64_t(blockIdx.x) >= p.first_weight_block)
      AdapterTapGradientBlock<Storage>(p, shared_).run();
    else
      run_input();
  }

 private:
  // Up to four elements that follow one another.
  struct Four {
    Element v[4];
  };
  LKA_DEVICE static Four load(const void* from, int64_t at, int count) {
    Four four = {};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) four.v[j] = load_global(static_cast<const Element*>(from) + at + j);
    return four;
  }

  // grad_z, and where it is asked for a, from the gradient of a.
  LKA_DEVICE void finish(int64_t at, int count, const float (&sums)[4], const Four& z) const {
    if (count <= 0) return;
    float factors[4], values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) factors[j] = values[j] = Stored<Storage>::value(z.v[j]);
    slope_all(p.before, factors);
    if (p.before != Activation::none && p.convolved && p.a != nullptr) {
      activate_all(p.before, values);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < count)
          store_global(static_cast<Element*>(p.a) + at + j, Stored<Storage>::of(values[j]));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count)
        store_global(static_cast<Element*>(p.grad_z) + at + j,
                     Stored<Storage>::of(sums[j] * factors[j]));
  }

  LKA_DEVICE void run_input() {
    const int blocks = (p.rank + p.convolution.staged_channels - 1) / p.convolution.staged_channels;
    const int64_t index = blockIdx.x / blocks;
    const TokenTile tile = tile_of(p, index);
    const int first = int(blockIdx.x - index * blocks) * p.convolution.staged_channels;
    const int channels = least(p.convolution.staged_channels, p.rank - first);
    const auto at = [&](int channel, int token) {
      return (tile.image * p.rank + channel) * p.tokens + tile.t0 + token;
    };
    const auto load_z = [&](int channel, int token, int count) {
      return load(p.z, at(channel, token), p.before == Activation::none ? 0 : count);
    };
    TileConvolution<Storage> convolution(p, p.grad_c, shared_);
    convolution.run_prefix(tile, first, channels, [&](int channel, int token, float sum) {
      const float sums[4] = {sum};
      finish(at(channel, token), 1, sums, load_z(channel, token, 1));
    });
    if (!p.convolved) {
      convolution.run_grid(tile, first, channels, load_z,
                           [&](int channel, int token, int count, const float (&sums)[4],
                               const Four& z) { finish(at(channel, token), count, sums, z); });
      return;
    }
    const int grid = tile.count - tile.prefix, quads = (grid + 3) / 4;
    for (int i = threadIdx.x; i < channels * quads; i += blockDim.x) {
      const int row = i / quads, channel = first + row;
      const int token = tile.prefix + (i - row * quads) * 4, count = least(4, tile.count - token);
      const Four sum = load(p.grad_z, at(channel, token), count);
      const Four z = load_z(channel, token, count);
      float sums[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = Stored<Storage>::value(sum.v[j]);
      finish(at(channel, token), count, sums, z);
    }
  }

  const AdapterParams& p;
  char* shared_;
};

}  // namespace lka::cuda
