// The convolution of the fused adapter backward: one launch with two kinds of blocks, as neither
// needs the other's result. Where the tensor cores have convolved, or will find the taps'
// gradients, what they leave remains: prefix tokens and slope, nothing of the taps.
//
// The first blocks have a tile of tokens and some channels: grad_z = act'(z)·(correlation of grad_c
// with the taps reversed). The others have partial sums of the taps' gradients: a thread has eight
// taps of a kernel row and some of the outputs, four at a time, so that four loads make 32
// multiply-adds; a fixed tree adds what threads with the same taps have.
#pragma once

#include "adapter_convolve.cuh"

namespace lka::cuda {

template <class Storage>
class AdapterTapGradientBlock {
  using Element = typename Stored<Storage>::Type;

 public:
  static constexpr int kTaps = 8, kThreads = 128;
  // A thread's sums: of its taps, of the bias, of the tap that prefix tokens meet.
  static constexpr int kSums = kTaps + 2;

  LKA_DEVICE AdapterTapGradientBlock(const AdapterParams& params, char* shared)
      : p(params), t(params.taps) {
    source_ = reinterpret_cast<float*>(shared);
    grad_ = source_ + t.staged_rows * t.source_pitch;
    int64_t block = blockIdx.x - p.first_weight_block;
    const int tap_tile = int(block % (t.tiles_h * t.tiles_w));
    block /= t.tiles_h * t.tiles_w;
    channel_ = int(block % p.rank);
    group_ = block / p.rank;
    ky0_ = tap_tile / t.tiles_w * t.tap_rows;
    kx0_ = tap_tile % t.tiles_w * t.tap_chunks * kTaps;
    units_ = t.tap_rows * t.tap_chunks;
    unit_ = threadIdx.x % units_;
    part_ = threadIdx.x / units_;
    parts_ = blockDim.x / units_;
    ky_ = ky0_ + unit_ / t.tap_chunks;
    kx_ = kx0_ + unit_ % t.tap_chunks * kTaps;
  }

  LKA_DEVICE void run() {
    float sums[kSums] = {};
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

  LKA_DEVICE void add_piece(float (&sums)[kSums], int64_t piece) {
    const int x0 = int(piece % t.x_pieces) * t.columns;
    const int y0 = int(piece / t.x_pieces % t.y_pieces) * t.rows;
    const int64_t image = piece / t.x_pieces / t.y_pieces;
    const int rows = least(t.rows, p.height - y0), columns = least(t.columns, p.width - x0);
    const Element *z = plane(p.z, image), *grad_c = plane(p.grad_c, image);
    const int first = clamped(y0 - t.top + ky0_ * t.dilation_h, 0, p.height);
    const int end = least(p.height, y0 + rows - t.top + (ky0_ + t.tap_rows - 1) * t.dilation_h);
    __syncthreads();
    stage_grid<Storage>(z + p.prefix, 0, 1, p.width, first, end, x0 - t.left + kx0_ * t.dilation_w,
                        t.source_pitch, source_, t.source_pitch, 0,
                        [&](float value) { return activate(p.before, value); });
    // Columns beyond the piece belong to the next one.
    stage_grid<Storage>(grad_c + p.prefix, 0, 1, p.width, y0, y0 + rows, x0, t.grad_pitch, grad_,
                        t.grad_pitch, 0, [](float value) { return value; });
    __syncthreads();
    if (part_ >= parts_) return;
    if (y0 == 0 && x0 == 0 && unit_ == 0) add_prefix(sums, z, grad_c);
    const int quads = (columns + 3) / 4;
    for (int i = part_; i < rows * quads; i += parts_) {
      const int row = i / quads, x = (i - row * quads) * 4;
      Float4 grad = load_shared(reinterpret_cast<const Float4*>(grad_ + row * t.grad_pitch + x));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (x + j >= columns) grad.v[j] = 0;
      if (unit_ == 0) sums[kTaps] += grad.v[0] + grad.v[1] + grad.v[2] + grad.v[3];
      const int y = y0 + row - t.top + ky_ * t.dilation_h;
      if (y < 0 || y >= p.height || ky_ >= t.kernel_h || kx_ >= t.kernel_w) continue;
      const float* values = source_ + (y - first) * t.source_pitch + x;
      if (t.dilation_w != 1) {
        values += (kx_ - kx0_) * t.dilation_w;
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
          if (kx_ + i >= t.kernel_w) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[i] += grad.v[j] * load_shared(values + i * t.dilation_w + j);
        }
        continue;
      }
      Float4 window[3];
#pragma unroll
      for (int j = 0; j < 3; ++j)
        window[j] = load_shared(reinterpret_cast<const Float4*>(values + kx_ - kx0_ + 4 * j));
#pragma unroll
      for (int i = 0; i < kTaps; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i] += grad.v[j] * window[(i + j) / 4].v[(i + j) % 4];
    }
  }

  LKA_DEVICE void add_prefix(float (&sums)[kSums], const Element* z, const Element* grad_c) const {
    if (p.prefix_mode != PrefixMode::center_tap) return;
    for (int token = part_; token < p.prefix; token += parts_) {
      const float grad = Stored<Storage>::value(load_global(grad_c + token));
      const float value = Stored<Storage>::value(load_global(z + token));
      sums[kTaps] += grad;
      sums[kTaps + 1] += grad * activate(p.before, value);
    }
  }

  // Adds the parts in their order. Taps that touch nothing have no sums.
  LKA_DEVICE void store(const float (&sums)[kSums]) {
    __syncthreads();
    if (part_ < parts_)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        store_shared(source_ + (part_ * units_ + unit_) * kSums + i, sums[i]);
    __syncthreads();
    const auto total = [&](int unit, int i) {
      float sum = 0;
      for (int part = 0; part < parts_; ++part)
        sum += load_shared(source_ + (part * units_ + unit) * kSums + i);
      return sum;
    };
    const int64_t taps = int64_t(t.full_h) * t.full_w;
    float* to = p.conv_partials + (group_ * p.rank + channel_) * (taps + 1);
    if (threadIdx.x == 0 && ky0_ == 0 && kx0_ == 0) store_global(to + taps, total(0, kTaps));
    for (int i = threadIdx.x; i < units_ * kTaps; i += blockDim.x) {
      const int unit = i / kTaps;
      const int ky = ky0_ + unit / t.tap_chunks;
      const int kx = kx0_ + unit % t.tap_chunks * kTaps + i % kTaps;
      if (ky >= t.kernel_h || kx >= t.kernel_w) continue;
      const int tap = (ky + t.first_h) * t.full_w + kx + t.first_w;
      float sum = total(unit, i % kTaps);
      if (tap == p.center) sum += total(0, kTaps + 1);
      store_global(to + tap, sum);
    }
  }

  const AdapterParams& p;
  const AdapterTapGradient& t;
  float *source_, *grad_;
  int64_t group_;
  int channel_, ky0_, kx0_, ky_, kx_;
  int units_, unit_, parts_, part_;
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
  LKA_DEVICE void run_input() {
    const int blocks = (p.rank + p.convolution.staged_channels - 1) / p.convolution.staged_channels;
    const TokenTile tile = tile_of(p, blockIdx.x / blocks);
    const int first = int(blockIdx.x % blocks) * p.convolution.staged_channels;
    const int channels = least(p.convolution.staged_channels, p.rank - first);
    const auto at = [&](int channel, int token) {
      return (tile.image * p.rank + channel) * p.tokens + tile.t0 + token;
    };
    auto* grad_z = static_cast<Element*>(p.grad_z);
    const auto emit = [&](int channel, int token, float sum) {
      const int64_t i = at(channel, token);
      if (p.before != Activation::none) {
        const float z = Stored<Storage>::value(load_global(static_cast<const Element*>(p.z) + i));
        sum *= slope(p.before, z);
        if (p.convolved && p.a != nullptr)
          store_global(static_cast<Element*>(p.a) + i, Stored<Storage>::of(activate(p.before, z)));
      }
      store_global(grad_z + i, Stored<Storage>::of(sum));
    };
    TileConvolution<Storage> convolution(p, p.grad_c, shared_);
    if (!p.convolved) return convolution.run(tile, first, channels, emit);
    convolution.run_prefix(tile, first, channels, emit);
    const int grid = tile.count - tile.prefix;
    for (int i = threadIdx.x; i < channels * grid; i += blockDim.x) {
      const int channel = first + i / grid, token = tile.prefix + i % grid;
      emit(channel, token, Stored<Storage>::value(load_global(grad_z + at(channel, token))));
    }
  }

  const AdapterParams& p;
  char* shared_;
};

}  // namespace lka::cuda
