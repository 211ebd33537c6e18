// Weight gradients of a depthwise convolution on small maps as one product for the tensor cores.
//
// Of one channel, (positions of dy × images) · (images × positions of x) has the products of every
// output's gradient with every input, summed over images; the gradient of a tap is the sum along
// the diagonal of those that lie apart by it. A warp has 16 positions of dy and up to 8 · kTiles of
// x in registers. A block has the warps of some channels, a part of each map, whole rows of it, and
// a group of images. At the end the products go to shared memory, as many rows at a time as it
// holds, and every thread adds those of its taps. Sums of parts and groups are added by
// sum_partials.
#pragma once

#include "stage_planes.cuh"

namespace lka::cuda {

struct DenseWeightGradientParams {
  PlaneAccess grad_output, input;  // their positions are those of a part
  float* partials = nullptr;       // as in WeightGradientParams
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;
  int32_t first_h = 0, first_w = 0, full_h = 0, full_w = 0;

  int32_t tiles = 0;                        // kTiles: 8 or 14, of 8 positions of x
  int32_t grad_parts = 1, grad_rows = 0;    // of dy; rows of a part
  int32_t input_parts = 1, input_rows = 0;  // of x
  int32_t images = 0;                       // of a step, a multiple of 16
  int32_t steps = 0, steps_of_group = 0;
  int32_t groups = 0;  // of images, times parts of either map
  int32_t block_channels = 0, warps_of_channel = 0;
  int32_t channel_groups = 0;                    // blocks: channel_groups · groups
  int32_t grad_pitch = 0, input_pitch = 0;       // elements of an image in shared memory
  int32_t product_tiles = 0, product_pitch = 0;  // of 16 rows at a time; floats of a row
  int32_t channel_bytes = 0;                     // of shared memory
};

struct DenseWeightGradient {
  static constexpr int kMostTaps = 4;  // of a thread
};

template <class Storage, int kTiles>
class DenseWeightGradientBlock : DenseWeightGradient {
 public:
  LKA_DEVICE DenseWeightGradientBlock(const DenseWeightGradientParams& params, char* shared)
      : p(params) {
    threads_ = kWarp * p.warps_of_channel;
    const int of_block = int(threadIdx.x) / threads_;
    thread_ = int(threadIdx.x) - of_block * threads_;
    channel_ = int(blockIdx.x % p.channel_groups) * p.block_channels + of_block;
    group_ = int(blockIdx.x / p.channel_groups);
    const int part = group_ % (p.grad_parts * p.input_parts);
    first_grad_ = part / p.input_parts * p.grad_rows;
    first_input_ = part % p.input_parts * p.input_rows;
    const int grads = int(p.grad_output.view.height) - first_grad_;
    const int inputs = int(p.input.view.height) - first_input_;
    grads_ = grads < p.grad_rows ? grads : p.grad_rows;
    inputs_ = inputs < p.input_rows ? inputs : p.input_rows;
    char* own = shared + of_block * p.channel_bytes;
    grad_ = reinterpret_cast<uint16_t*>(own);
    input_ = grad_ + p.images * p.grad_pitch;
    products_ = reinterpret_cast<float*>(own);
  }

  LKA_DEVICE void run() {
    float sums[kTiles][4] = {};
    float bias = 0;
    const int first = group_ / (p.grad_parts * p.input_parts) * p.steps_of_group;
    const int end = first + p.steps_of_group < p.steps ? first + p.steps_of_group : p.steps;
    for (int step = first; step < end; ++step) {
      if (step > first) __syncthreads();  // the planes of the last step are no longer read
      stage(int64_t(step) * p.images);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      if (channel_ < p.channels) {
        multiply(sums);
        bias += sum_of_images();
      }
    }
    add_diagonals(sums, bias);
  }

 private:
  LKA_DEVICE void stage(int64_t image) {
    if (channel_ >= p.channels) return;
    const int64_t left = p.batch - image;
    const int live = left < p.images ? int(left) : p.images;
    const auto planes = [&](const PlaneAccess& map, int first, int rows, uint16_t* to, int pitch) {
      const int64_t plane = image * map.view.stride_b + channel_ * map.view.stride_c;
      stage_planes(map, plane + first * map.view.stride_h, rows, p.images, live, thread_, threads_,
                   to, pitch);
    };
    planes(p.grad_output, first_grad_, grads_, grad_, p.grad_pitch);
    planes(p.input, first_input_, inputs_, input_, p.input_pitch);
  }

  LKA_DEVICE void multiply(float (&sums)[kTiles][4]) const {
    // Lane 8·n + r names row r of matrix n, an image. Of dy: the first eight positions, the next,
    // the same of eight more images; of x: eight more images first.
    const int lane = thread_ % kWarp, warp = thread_ / kWarp;
    const uint16_t* grads =
        grad_ + (lane % 8 + lane / 16 * 8) * p.grad_pitch + 16 * warp + lane / 8 % 2 * 8;
    const uint16_t* inputs = input_ + (lane % 8 + lane / 8 % 2 * 8) * p.input_pitch + lane / 16 * 8;
    for (int image = 0; image < p.images; image += 16) {
      uint32_t rows[4];
      load_matrices_transposed(rows, grads + image * p.grad_pitch);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        if (8 * t >= p.input.positions) continue;
        uint32_t columns[4];
        load_matrices_transposed(columns, inputs + image * p.input_pitch + 8 * t);
        const uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
        mma_16x8x16<Storage>(sums[t], rows, left);
        mma_16x8x16<Storage>(sums[t + 1], rows, right);
      }
    }
  }

  // A thread has one position of dy.
  LKA_DEVICE float sum_of_images() const {
    float sum = 0;
    if (first_input_ == 0 && thread_ < p.grad_output.positions)
      for (int image = 0; image < p.images; ++image)
        sum += widen<Storage>(load_shared(grad_ + image * p.grad_pitch + thread_));
    return sum;
  }

  LKA_DEVICE void add_diagonals(const float (&sums)[kTiles][4], float bias) {
    const int lane = thread_ % kWarp, warp = thread_ / kWarp;
    const bool exists = channel_ < p.channels;
    const int taps = p.kernel_h * p.kernel_w;
    float gradients[kMostTaps] = {};
    for (int tile = 0; tile < p.warps_of_channel; tile += p.product_tiles) {
      __syncthreads();  // what is there is no longer read
      if (exists && warp >= tile && warp < tile + p.product_tiles) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (8 * t >= p.input.positions) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            store_shared(products_ + (16 * (warp - tile) + lane / 4 + i / 2 * 8) * p.product_pitch +
                             8 * t + lane % 4 * 2 + i % 2,
                         sums[t][i]);
        }
      }
      __syncthreads();
      if (!exists) continue;
#pragma unroll
      for (int i = 0; i < kMostTaps; ++i) {
        const int tap = thread_ + i * threads_;
        if (tap < taps) gradients[i] += diagonal(tap, 16 * tile);
      }
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      bias += __shfl_xor_sync(0xffffffffu, bias, mask);
    __syncthreads();
    if (exists && lane == 0) store_shared(products_ + warp, bias);
    __syncthreads();
    if (!exists) return;
    float* to =
        p.partials + (int64_t(group_) * p.channels + channel_) * (int64_t(p.full_h) * p.full_w + 1);
#pragma unroll
    for (int i = 0; i < kMostTaps; ++i) {
      const int tap = thread_ + i * threads_;
      if (tap >= taps) continue;
      const int ky = tap / p.kernel_w, kx = tap - ky * p.kernel_w;
      store_global(to + int64_t(p.first_h + ky) * p.full_w + p.first_w + kx, gradients[i]);
    }
    if (thread_ > 0) return;
    float total = 0;
    for (int w = 0; w < p.warps_of_channel; ++w) total += load_shared(products_ + w);
    store_global(to + int64_t(p.full_h) * p.full_w, total);
  }

  // Of the rows from `first` on that are in shared memory.
  LKA_DEVICE float diagonal(int tap, int first) const {
    const int ky = tap / p.kernel_w, kx = tap - ky * p.kernel_w;
    const int below = first_grad_ + ky * p.dilation_h - p.top - first_input_;
    const int right = kx * p.dilation_w - p.left;
    const int width = int(p.grad_output.view.width);
    const int in_width = int(p.input.view.width);
    const int from_x = right < 0 ? -right : 0;
    const int end_x = width < in_width - right ? width : in_width - right;
    const int last = first + 16 * p.product_tiles, pitch = p.grad_output.pitch;
    float sum = 0;
    for (int y = first / pitch; y < grads_ && y * pitch < last; ++y) {
      if (y + below < 0 || y + below >= inputs_) continue;
      int x = from_x > first - y * pitch ? from_x : first - y * pitch;
      const int end = end_x < last - y * pitch ? end_x : last - y * pitch;
      const float* at = products_ + (y * pitch + x - first) * p.product_pitch +
                        (y + below) * p.input.pitch + x + right;
      for (; x < end; ++x, at += p.product_pitch + 1) sum += load_shared(at);
    }
    return sum;
  }

  const DenseWeightGradientParams& p;
  uint16_t *grad_, *input_;
  float* products_;
  int threads_, thread_, channel_, group_;
  int first_grad_, first_input_, grads_, inputs_;  // rows of the block's parts
};

}  // namespace lka::cuda
