// Weight gradients of a depthwise convolution as products for the tensor cores.
//
// For one channel, dW[ky, kx] = Σ x[oy - top + ky·dilation_h, ix]·dy[oy, ix + left - kx·dilation_w]
// over images, rows oy and columns ix: for one oy a product of 16 kernel rows (rows of x) × 16
// columns with 16 columns × 8 kernel columns, the Toeplitz matrix of a row of dy. x is read as it
// lies; pairs of the matrix are pairs of dy, which has a second copy, shifted by one element, for
// those that begin at an odd one. A warp has one channel and a tile of kTapRows × kTapColumns taps,
// and keeps their sums in registers over all its steps; a step is a strip of rows of some images.
// Sums of groups of steps are added in order by sum_partials: the same bits every run.
#pragma once

#include "stage_rows.cuh"

namespace lka::cuda {

struct WeightGradientParams {
  MapAccess grad_output, input;
  float* partials = nullptr;  // (groups, channels, kernel taps + 1): the last is the bias's
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;         // padding in front of the first of them; negative: cropped
  int32_t first_h = 0, first_w = 0;  // which tap that is
  int32_t full_h = 0, full_w = 0;    // of the kernel

  int32_t strip_rows = 0, strips = 0;      // rows of grad_output in a step, strips of an image
  int32_t images = 0, image_groups = 0;    // of a step, of the batch
  int32_t column_tiles = 0;                // of the input
  int64_t steps = 0, steps_of_group = 0;   // steps: image_groups · strips · column_tiles
  int32_t groups = 0, channel_groups = 0;  // blocks: groups · channel_groups · tap tiles
  int32_t tap_tiles_h = 0, tap_tiles_w = 0;
  int32_t input_rows = 0;      // staged for an image
  Tile input_tile, grad_tile;  // the latter holds two copies, apart by
  int32_t grad_copy = 0;       // words
};

struct WeightGradient {
  static constexpr int kTapRows = 32, kTapColumns = 32, kColumns = 64;
};

template <class Storage>
class WeightGradientBlock : WeightGradient {
 public:
  LKA_DEVICE WeightGradientBlock(const WeightGradientParams& params, char* shared) : p(params) {
    warps_ = blockDim.x / kWarp;
    warp_ = threadIdx.x / kWarp;
    lane_ = threadIdx.x % kWarp;
    input_ = reinterpret_cast<uint16_t*>(shared);
    grad_ = input_ + warps_ * p.input_tile.plane_pitch;
    int64_t block = blockIdx.x;
    const int tile_w = int(block % p.tap_tiles_w);
    block /= p.tap_tiles_w;
    const int tile_h = int(block % p.tap_tiles_h);
    block /= p.tap_tiles_h;
    channel0_ = int(block % p.channel_groups) * warps_;
    group_ = int(block / p.channel_groups);
    tap_h_ = tile_h * kTapRows;
    tap_w_ = tile_w * kTapColumns;
    taps_h_ = p.kernel_h - tap_h_ < kTapRows ? p.kernel_h - tap_h_ : kTapRows;
    taps_w_ = p.kernel_w - tap_w_ < kTapColumns ? p.kernel_w - tap_w_ : kTapColumns;
  }

  LKA_DEVICE void run() {
    float sums[kTapRows / 16][kTapColumns / 8][4] = {};
    float bias = 0;
    const int64_t first = group_ * p.steps_of_group;
    const int64_t end = first + p.steps_of_group < p.steps ? first + p.steps_of_group : p.steps;
    for (int64_t step = first; step < end; ++step) {
      int64_t rest = step;
      const int column = int(rest % p.column_tiles) * kColumns;
      rest /= p.column_tiles;
      const int row = int(rest % p.strips) * p.strip_rows;
      const int image = int(rest / p.strips) * p.images;
      const int images = p.batch - image < p.images ? p.batch - image : p.images;
      const int height = int(p.grad_output.view.height);
      const int rows = height - row < p.strip_rows ? height - row : p.strip_rows;
      const int width = int(p.input.view.width) - column;
      const int chunks = width >= kColumns ? kColumns / 16 : (width + 15) / 16;
      // Of what the window of dy begins with, all but whole vectors is skipped.
      const int from = column + p.left - (tap_w_ + taps_w_ - 1) * p.dilation_w;
      const int from_x = (from >= 0 ? from : from - 7) / 8 * 8;
      const int columns = (from - from_x + 16 * chunks + (taps_w_ - 1) * p.dilation_w + 7) / 8 * 8;
      __syncthreads();  // the tiles of the last step are no longer read
      stage_input(image, images, row, rows, column, chunks);
      stage_grad(image, images, row, rows, from_x, columns);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      shift_grad(images * rows, columns);
      __syncthreads();
      multiply(sums, images, row, rows, chunks, from - from_x);
      if (tap_h_ == 0 && tap_w_ == 0 && column == 0) bias += sum_of_rows(image, images, row, rows);
    }
    store(sums, bias);
  }

 private:
  // Rows of an image follow those of the one before.
  LKA_DEVICE int input_rows(int rows) const { return rows + (taps_h_ - 1) * p.dilation_h; }

  LKA_DEVICE void stage_input(int image, int images, int row, int rows, int column, int chunks) {
    const int of_image = input_rows(rows);
    const int first = row - p.top + tap_h_ * p.dilation_h;
    stage_rows(p.input, channel0_, p.channels, images * of_image, column, 16 * chunks, input_,
               p.input_tile, [&](int i) {
                 const int y = first + i % of_image;
                 return y >= 0 && y < p.input.view.height
                            ? (image + i / of_image) * p.input.view.stride_b +
                                  y * p.input.view.stride_h
                            : kNoRow;
               });
  }

  LKA_DEVICE void stage_grad(int image, int images, int row, int rows, int from_x, int columns) {
    stage_rows(p.grad_output, channel0_, p.channels, images * rows, from_x, columns, grad_,
               p.grad_tile, [&](int i) {
                 return (image + i / rows) * p.grad_output.view.stride_b +
                        (row + i % rows) * p.grad_output.view.stride_h;
               });
  }

  // The second copy: word w has elements 2·w + 1 and 2·w + 2.
  LKA_DEVICE void shift_grad(int rows, int columns) {
    if (channel0_ + warp_ >= p.channels) return;
    auto* plane = reinterpret_cast<uint32_t*>(grad_ + warp_ * p.grad_tile.plane_pitch);
    const int words = columns / 2, pitch = p.grad_tile.row_pitch / 2;
    for (int row = 0; row < rows; ++row)
      for (int w = lane_; w < words; w += kWarp) {
        const uint32_t* at = plane + row * pitch + w;
        const uint32_t low = load_shared(at), high = w + 1 < words ? load_shared(at + 1) : 0;
        store_shared(plane + p.grad_copy + row * pitch + w, low >> 16 | high << 16);
      }
  }

  LKA_DEVICE void multiply(float (&sums)[kTapRows / 16][kTapColumns / 8][4], int images, int row,
                           int rows, int chunks, int skipped) {
    if (channel0_ + warp_ >= p.channels) return;
    // Lane 8·n + i names row i of matrix n: kernel rows below, then columns to the right.
    const uint16_t* input_rows_of[kTapRows / 16];
#pragma unroll
    for (int m = 0; m < kTapRows / 16; ++m) {
      int ky = 16 * m + lane_ % 8 + lane_ / 8 % 2 * 8;
      ky = ky < taps_h_ ? ky : taps_h_ - 1;  // what is beyond is multiplied, but not stored
      input_rows_of[m] = input_ + warp_ * p.input_tile.plane_pitch +
                         ky * p.dilation_h * p.input_tile.row_pitch + lane_ / 16 * 8;
    }
    const uint32_t* grad_of[kTapColumns / 8];
#pragma unroll
    for (int n = 0; n < kTapColumns / 8; ++n) {
      int kx = 8 * n + lane_ / 4;
      kx = kx < taps_w_ ? kx : taps_w_ - 1;
      const int start = skipped + lane_ % 4 * 2 + (taps_w_ - 1 - kx) * p.dilation_w;
      grad_of[n] = reinterpret_cast<const uint32_t*>(grad_ + warp_ * p.grad_tile.plane_pitch) +
                   (start & 1) * p.grad_copy + start / 2;
    }
    const int of_image = input_rows(rows), height = int(p.input.view.height);
    for (int image = 0; image < images; ++image)
      for (int i = 0; i < rows; ++i) {
        const int input_row = (image * of_image + i) * p.input_tile.row_pitch;
        const int grad_row = (image * rows + i) * (p.grad_tile.row_pitch / 2);
        const int y = row + i - p.top + tap_h_ * p.dilation_h;  // where tap 0 of the tile looks
        for (int chunk = 0; chunk < chunks; ++chunk) {
          uint32_t matrix[kTapColumns / 8][2];
#pragma unroll
          for (int n = 0; n < kTapColumns / 8; ++n) {
            if (8 * n >= taps_w_) break;
            const uint32_t* at = grad_of[n] + grad_row + 8 * chunk;
            matrix[n][0] = load_shared(at);
            matrix[n][1] = load_shared(at + 4);
          }
#pragma unroll
          for (int m = 0; m < kTapRows / 16; ++m) {
            // All sixteen kernel rows beyond the taps, above or below the map.
            if (16 * m >= taps_h_ || y + (16 * m + 15) * p.dilation_h < 0 ||
                y + 16 * m * p.dilation_h >= height)
              continue;
            uint32_t x[4];
            load_matrices(x, input_rows_of[m] + input_row + 16 * chunk);
#pragma unroll
            for (int n = 0; n < kTapColumns / 8; ++n) {
              if (8 * n >= taps_w_) break;
              mma_16x8x16<Storage>(sums[m][n], x, matrix[n]);
            }
          }
        }
      }
  }

  // Of this lane's columns; only the block of the first taps adds the bias's gradient.
  LKA_DEVICE float sum_of_rows(int image, int images, int row, int rows) {
    if (channel0_ + warp_ >= p.channels) return 0;
    const MapView& view = p.grad_output.view;
    const auto* grad =
        static_cast<const uint16_t*>(view.data) + (channel0_ + warp_) * view.stride_c;
    float sum = 0;
    for (int b = image; b < image + images; ++b)
      for (int y = row; y < row + rows; ++y)
        for (int x = lane_; x < view.width; x += kWarp)
          sum += widen<Storage>(
              load_global(grad + b * view.stride_b + y * view.stride_h + x * view.stride_w));
    return sum;
  }

  LKA_DEVICE void store(const float (&sums)[kTapRows / 16][kTapColumns / 8][4], float bias) {
    const int channel = channel0_ + warp_;
    if (channel >= p.channels) return;
    const int64_t taps = int64_t(p.full_h) * p.full_w;
    float* to = p.partials + (int64_t(group_) * p.channels + channel) * (taps + 1);
#pragma unroll
    for (int m = 0; m < kTapRows / 16; ++m)
#pragma unroll
      for (int n = 0; n < kTapColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int ky = 16 * m + lane_ / 4 + i / 2 * 8, kx = 8 * n + lane_ % 4 * 2 + i % 2;
          if (ky < taps_h_ && kx < taps_w_)
            store_global(to + int64_t(p.first_h + tap_h_ + ky) * p.full_w + p.first_w + tap_w_ + kx,
                         sums[m][n][i]);
        }
    if (tap_h_ > 0 || tap_w_ > 0) return;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      bias += __shfl_xor_sync(0xffffffffu, bias, mask);
    if (lane_ == 0) store_global(to + taps, bias);
  }

  const WeightGradientParams& p;
  uint16_t *input_, *grad_;
  int warps_, warp_, lane_;
  int group_, channel0_;
  int tap_h_, tap_w_, taps_h_, taps_w_;  // the block's tile of taps
};

}  // namespace lka::cuda
