// Depthwise convolution by transforms in shared memory, stride 1: with X and Y the transforms of
// maps and W that of the taps, Y = X·conj(W), dX = dY·W and dW = sum over the batch of X·conj(dY).
// See fft_plan.py for the size of a transform, and fft_planes.cuh for the order of a spectrum.
//
// A spectrum in global memory is [k1][k2][column] by the digits of a column's frequencies, and
// after all of that [k1][k2] of the last column.
#pragma once

#include "fft_maps.cuh"

namespace lka::cuda {

// What all kernels are told. Blocks are [image group][channel group]; a group is a block's planes.
struct FftParams {
  FftGeometry geometry;
  int32_t batch = 0, channels = 0;
  bool planes_are_channels = false;
  int32_t channel_groups = 0;
  Complex* spectra = nullptr;
  float scale = 1;  // of what the kernel leaves behind

  LKA_DEVICE Complex* spectrum(int64_t plane) const {
    return spectra + plane * (geometry.x.size / 2 + 1) * geometry.y.size;
  }
  // Of a spectrum the numbers of column c and digit k1, `stride` apart.
  struct Numbers {
    int first, stride;
  };
  LKA_DEVICE Numbers numbers(int c, int k1) const {
    const int half = int(geometry.by_half.divisor), at = k1 * geometry.y.second;
    return c < half ? Numbers{at * half + c, half} : Numbers{half * geometry.y.size + at, 1};
  }
  LKA_DEVICE FftPlanes planes(char* shared, int count, int maps = 1) const {
    auto* cells = reinterpret_cast<Complex*>(shared);
    auto* end = cells + (int64_t(maps) * geometry.plane_pitch << geometry.planes_shift);
    return FftPlanes(geometry, cells, reinterpret_cast<FftColumn*>(end), count);
  }
  LKA_DEVICE FftBlock block(int image_group, int channel_group) const {
    const int shift = geometry.planes_shift;
    FftBlock found;
    found.of_channels = planes_are_channels;
    found.image = planes_are_channels ? image_group : image_group << shift;
    found.channel = planes_are_channels ? channel_group << shift : channel_group;
    const int left = planes_are_channels ? channels - found.channel : batch - found.image;
    found.count = left < 1 << shift ? left : 1 << shift;
    return found;
  }
};

struct FftSpectraParams : FftParams {
  FftTaps taps;
  FftRows rows;
};

struct FftCorrelateParams : FftParams {
  MapView source, result;
  FftRows source_rows, result_rows;
  const void* bias = nullptr;
  bool conjugated = false;  // whether it is conj(W) that X is multiplied by
};

struct FftWeightGradientParams : FftParams {
  MapView grad_output, input;
  FftRows grad_rows, input_rows;
  int32_t steps = 0, steps_of_group = 0;  // image groups
  int32_t groups = 0;                     // blocks are groups · channel groups
  float* bias_sums = nullptr;             // [group][channel]
};

struct FftTapGradientParams : FftParams {
  FftTaps taps;
  FftRows rows;
  int32_t groups = 0;
  const float* bias_sums = nullptr;
  void* grad_bias = nullptr;
};

namespace detail {

// The numbers of one `second` transform of a column, pitch apart in shared memory.
template <int kSecond>
LKA_DEVICE void load_column(Complex (&v)[kSecond], const Complex* from, int pitch) {
#pragma unroll
  for (int i = 0; i < kSecond; ++i) v[i] = load_shared(from + i * pitch);
}
template <int kSecond>
LKA_DEVICE void store_column(const Complex (&v)[kSecond], Complex* to, int pitch) {
#pragma unroll
  for (int i = 0; i < kSecond; ++i) store_shared(to + i * pitch, v[i]);
}

}  // namespace detail

// Transforms of the taps of some channels.
class FftSpectraBlock {
 public:
  LKA_DEVICE FftSpectraBlock(const FftSpectraParams& params, char* shared)
      : p(params), block_(p.block(0, int(blockIdx.x))), planes_(p.planes(shared, block_.count)) {}

  LKA_DEVICE void run() const {
    planes_.prepare();
    planes_.transform_rows(FftTapPlanes{p.taps, block_.channel, p.scale}, p.rows);
    planes_.begin_columns(p.rows);
    with_small(p.geometry.y.second, [&](auto radix) { finish(radix); });
  }

 private:
  template <class R>
  LKA_DEVICE void finish(R) const {
    planes_.each_second_of_columns(block_.count, [&](int plane, int c, int k1, int at) {
      Complex v[R::value];
      detail::load_column(v, planes_.plane(plane) + at, p.geometry.pitch);
      dft(v);
      const auto [first, stride] = p.numbers(c, k1);
      Complex* to = p.spectrum(block_.channel + plane) + first;
#pragma unroll
      for (int k2 = 0; k2 < R::value; ++k2) store_global(to + k2 * stride, v[k2]);
    });
  }

  const FftSpectraParams& p;
  FftBlock block_;
  FftPlanes planes_;
};

// Forward and backward-input, all of it in one launch.
template <class Storage>
class FftCorrelateBlock {
 public:
  LKA_DEVICE FftCorrelateBlock(const FftCorrelateParams& params, char* shared)
      : p(params),
        block_(p.block(int(blockIdx.x) / p.channel_groups, int(blockIdx.x) % p.channel_groups)),
        planes_(p.planes(shared, block_.count)) {}

  LKA_DEVICE void run() const {
    planes_.prepare();
    planes_.transform_rows(FftSource<Storage>{p.source, block_}, p.source_rows);
    planes_.begin_columns(p.source_rows);
    with_small(p.geometry.y.second, [&](auto radix) { multiply(radix); });
    __syncthreads();
    planes_.finish_columns(p.result_rows);
    planes_.restore_rows(FftSink<Storage>{p.result, block_}, p.result_rows);
  }

 private:
  // Between two transforms of a column its numbers stay in registers.
  template <class R>
  LKA_DEVICE void multiply(R) const {
    const float sign = p.conjugated ? -1.0f : 1.0f;
    planes_.each_second_of_columns(block_.count, [&](int plane, int c, int k1, int at) {
      const auto [first, stride] = p.numbers(c, k1);
      const Complex* weight = p.spectrum(block_.channel_of(plane)) + first;
      Complex v[R::value], w[R::value];
#pragma unroll
      for (int k2 = 0; k2 < R::value; ++k2) w[k2] = load_global(weight + k2 * stride);
      Complex* cells = planes_.plane(plane) + at;
      detail::load_column(v, cells, p.geometry.pitch);
      dft(v);
#pragma unroll
      for (int k2 = 0; k2 < R::value; ++k2) v[k2] = v[k2] * Complex{w[k2].re, sign * w[k2].im};
      if (p.bias != nullptr && c == 0 && k1 == 0) v[0].re += bias_of(plane);  // frequency 0
      inverse_dft(v);
      detail::store_column(v, cells, p.geometry.pitch);
    });
  }

  LKA_DEVICE float bias_of(int plane) const {
    using Type = typename Stored<Storage>::Type;
    const Type* biases = static_cast<const Type*>(p.bias);
    return Stored<Storage>::value(load_global(biases + block_.channel_of(plane)));
  }

  const FftCorrelateParams& p;
  FftBlock block_;
  FftPlanes planes_;
};

// X·conj(dY), summed over the image groups of a block in their order. The sums stand in global
// memory, each number with one thread: beside both maps they would not fit shared memory.
template <class Storage>
class FftWeightGradientBlock {
 public:
  LKA_DEVICE FftWeightGradientBlock(const FftWeightGradientParams& params, char* shared)
      : p(params), shared_(shared), group_(int(blockIdx.x) / p.channel_groups) {}

  LKA_DEVICE void run() const {
    const int first = group_ * p.steps_of_group;
    const int end = first + p.steps_of_group < p.steps ? first + p.steps_of_group : p.steps;
    p.planes(shared_, 0, 2).prepare();
    for (int step = first; step < end; ++step) {
      const FftBlock block = p.block(step, int(blockIdx.x) % p.channel_groups);
      const FftPlanes grads = p.planes(shared_, block.count, 2);
      const FftPlanes inputs = grads.after(1 << p.geometry.planes_shift);
      if (step > first) __syncthreads();
#pragma unroll 1  // the code of transforms is long
      for (int i = 0; i < 2; ++i) {
        const MapView& map = i == 0 ? p.grad_output : p.input;
        const FftRows& rows = i == 0 ? p.grad_rows : p.input_rows;
        const FftPlanes planes = grads.after(i << p.geometry.planes_shift);
        planes.transform_rows(FftSource<Storage>{map, block}, rows);
        planes.begin_columns(rows);
      }
      with_small(p.geometry.y.second,
                 [&](auto radix) { add(radix, block, grads, inputs, step > first); });
    }
  }

 private:
  template <class R>
  LKA_DEVICE void add(R, const FftBlock& block, const FftPlanes& grads, const FftPlanes& inputs,
                      bool onto) const {
    const int pitch = p.geometry.pitch;
    const int images = block.of_channels ? 1 : block.count;
    const int channels = block.of_channels ? block.count : 1;
    grads.each_second_of_columns(channels, [&](int channel, int c, int k1, int at) {
      const int64_t sum_of = int64_t(group_) * p.channels + block.channel + channel;
      const auto [first, stride] = p.numbers(c, k1);
      Complex* sums = p.spectrum(sum_of) + first;
      Complex total[R::value];
#pragma unroll
      for (int k2 = 0; k2 < R::value; ++k2)
        total[k2] = onto ? load_global(sums + k2 * stride) : Complex{0, 0};
      float bias = 0;
#pragma unroll 1
      for (int i = channel; i < channel + images; ++i) {
        Complex d[R::value], x[R::value];
        detail::load_column(d, grads.plane(i) + at, pitch);
        detail::load_column(x, inputs.plane(i) + at, pitch);
        dft(d);
        dft(x);
        bias += d[0].re;
#pragma unroll
        for (int k2 = 0; k2 < R::value; ++k2) total[k2] = total[k2] + x[k2] * conjugate(d[k2]);
      }
#pragma unroll
      for (int k2 = 0; k2 < R::value; ++k2) store_global(sums + k2 * stride, total[k2]);
      if (c == 0 && k1 == 0) {  // frequency 0, twice the sum of the plane
        float* to = p.bias_sums + sum_of;
        store_global(to, 0.5f * bias + (onto ? load_global(to) : 0.0f));
      }
    });
  }

  const FftWeightGradientParams& p;
  char* shared_;
  int group_;
};

// Adds the groups' sums in their order and transforms them back to the gradients of some channels.
class FftTapGradientBlock {
 public:
  LKA_DEVICE FftTapGradientBlock(const FftTapGradientParams& params, char* shared)
      : p(params), block_(p.block(0, int(blockIdx.x))), planes_(p.planes(shared, block_.count)) {}

  LKA_DEVICE void run() const {
    planes_.prepare();
    with_small(p.geometry.y.second, [&](auto radix) { add(radix); });
    __syncthreads();
    planes_.finish_columns(p.rows);
    planes_.restore_rows(FftTapPlanes{p.taps, block_.channel, p.scale}, p.rows);
    clear_what_touches_nothing();
    for (int i = threadIdx.x; i < block_.count; i += blockDim.x) {
      const float* sums = p.bias_sums + block_.channel + i;
      float sum = 0;
      for (int group = 0; group < p.groups; ++group)
        sum += load_global(sums + int64_t(group) * p.channels);
      p.taps.store(p.grad_bias, block_.channel + i, sum);
    }
  }

 private:
  template <class R>
  LKA_DEVICE void add(R) const {
    planes_.each_second_of_columns(block_.count, [&](int plane, int c, int k1, int at) {
      const auto [first, stride] = p.numbers(c, k1);
      Complex total[R::value] = {};
      for (int group = 0; group < p.groups; ++group) {
        const Complex* sums =
            p.spectrum(int64_t(group) * p.channels + block_.channel + plane) + first;
#pragma unroll
        for (int k2 = 0; k2 < R::value; ++k2)
          total[k2] = total[k2] + load_global(sums + k2 * stride);
      }
      inverse_dft(total);
      detail::store_column(total, planes_.plane(plane) + at, p.geometry.pitch);
    });
  }

  LKA_DEVICE void clear_what_touches_nothing() const {
    const int taps = p.taps.y.full * p.taps.x.full;
    for (int64_t i = threadIdx.x; i < int64_t(block_.count) * taps; i += blockDim.x) {
      const int tap = int(i % taps);
      if (!p.taps.y.touches(tap / p.taps.x.full) || !p.taps.x.touches(tap % p.taps.x.full))
        p.taps.store(p.taps.plane(block_.channel) + i, 0.0f);
    }
  }

  const FftTapGradientParams& p;
  FftBlock block_;
  FftPlanes planes_;
};

}  // namespace lka::cuda
