// Depthwise correlation of small maps as one product for the tensor cores: forward, and
// backward-input with the taps reversed.
//
// Of one channel, the results of all images are (images × positions of the source) · (positions of
// the source × positions of the result): an entry of the second matrix is the tap by which the two
// positions differ, or zero. Its cost does not grow with the kernel. A block stages whole planes of
// 16 · kRowTiles images and some channels; warps of a channel have kColumnTiles times eight
// positions of the result each.
//
// The matrix is never stored. Shared memory has the taps as a table of differences, zeros where
// there is no tap, and a lane's two entries, of neighbouring positions of the source, are one load:
// rows of the source begin at even numbers, and differences that begin at an odd one come from a
// second copy that is shifted by one.
#pragma once

#include "stage_planes.cuh"

namespace lka::cuda {

struct DenseCorrelateParams {
  // As in CorrelateParams.
  PlaneAccess source;  // its pitch is even
  MapView result;
  bool pairs = false;  // of neighbouring results, which one store may have
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t weight_stride_c = 0;
  int32_t first_tap = 0, tap_stride_y = 0, tap_stride_x = 0;
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;

  int32_t row_tiles = 4;                             // kRowTiles: 4, 2 or 1
  int32_t block_channels = 0, warps_of_channel = 0;  // of a block
  int32_t channel_groups = 0;                        // blocks: channel_groups · image groups
  int32_t image_pitch = 0;                           // elements of the source in shared memory
  int32_t table_rows = 0, table_pitch = 0;           // differences; the pitch is even
  int32_t table_copy = 0, table_plane = 0;           // words of a copy, of both
};

struct DenseCorrelate {
  static constexpr int kTiles = 16;  // 16 × 8 results each, of a warp at a time
};

// `shared` has steps along the source, tables and planes, in this order; see plan_dense_correlate.
template <class Storage, int kRowTiles>
class DenseCorrelateBlock : DenseCorrelate {
 public:
  static constexpr int kColumnTiles = kTiles / kRowTiles, kImages = 16 * kRowTiles;

  LKA_DEVICE DenseCorrelateBlock(const DenseCorrelateParams& params, char* shared) : p(params) {
    steps_ = reinterpret_cast<int32_t*>(shared);
    const int threads = kWarp * p.warps_of_channel;
    channel_of_block_ = int(threadIdx.x) / threads;
    thread_ = int(threadIdx.x) - channel_of_block_ * threads;
    channel_ = int(blockIdx.x % p.channel_groups) * p.block_channels + channel_of_block_;
    image_ = int64_t(blockIdx.x / p.channel_groups) * kImages;
    // Positions are a multiple of 16: tables begin at a multiple of 16 bytes.
    auto* tables = reinterpret_cast<uint32_t*>(steps_ + p.source.positions / 2);
    table_ = tables + channel_of_block_ * p.table_plane;
    planes_ = reinterpret_cast<uint16_t*>(tables + p.block_channels * p.table_plane) +
              channel_of_block_ * kImages * p.image_pitch;
  }

  LKA_DEVICE void run() {
    const bool exists = channel_ < p.channels;
    const int threads = kWarp * p.warps_of_channel;
    if (exists) {
      const int64_t left = p.batch - image_;
      stage_planes(p.source, image_ * p.source.view.stride_b + channel_ * p.source.view.stride_c,
                   int(p.source.view.height), kImages, left < kImages ? int(left) : kImages,
                   thread_, threads, planes_, p.image_pitch);
      cp_async_commit();
      stage_table(threads);
    }
    for (int pair = threadIdx.x; pair < p.source.positions / 2; pair += blockDim.x) {
      // Zeros beyond the map may meet any entry.
      const int y = 2 * pair / p.source.pitch, x = 2 * pair - y * p.source.pitch;
      const bool on_map = y < p.source.view.height;
      store_shared(steps_ + pair, on_map ? (y * p.table_pitch + x) / 2 : 0);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (!exists) return;
    const int tiles = int(p.result.height * p.result.width + 7) / 8;
    for (int tile = thread_ / kWarp * kColumnTiles; tile < tiles;
         tile += p.warps_of_channel * kColumnTiles) {
      float sums[kRowTiles][kColumnTiles][4] = {};
      multiply(sums, tile, tiles);
      store(sums, tile);
    }
  }

 private:
  // Entry (y, x) is the tap that leads from the source at y - (height of the result - 1) rows below
  // a result, and as many columns.
  LKA_DEVICE void stage_table(int threads) {
    const auto* weight =
        static_cast<const uint16_t*>(p.weight) + channel_ * p.weight_stride_c + p.first_tap;
    auto* table = reinterpret_cast<uint16_t*>(table_);
    const int columns = p.table_pitch;
    for (int y = thread_ / kWarp; y < p.table_rows; y += threads / kWarp) {
      const int dy = y - int(p.result.height - 1) + p.top;
      const int ky = p.dilation_h == 1 ? dy : dy / p.dilation_h;
      const bool row = dy >= 0 && ky * p.dilation_h == dy && ky < p.kernel_h;
      for (int x = thread_ % kWarp; x < columns; x += kWarp) {
        const int dx = x - int(p.result.width - 1) + p.left;
        const int kx = p.dilation_w == 1 ? dx : dx / p.dilation_w;
        const bool is_tap = row && dx >= 0 && kx * p.dilation_w == dx && kx < p.kernel_w;
        const uint16_t tap =
            is_tap ? load_global(weight + ky * p.tap_stride_y + kx * p.tap_stride_x) : uint16_t(0);
        const int at = y * columns + x;
        store_shared(table + at, tap);
        if (at > 0) store_shared(table + 2 * p.table_copy + at - 1, tap);
      }
    }
  }

  LKA_DEVICE void multiply(float (&sums)[kRowTiles][kColumnTiles][4], int tile, int tiles) const {
    const int lane = thread_ % kWarp;
    int entries[kColumnTiles];  // words of the table
    const int last = int(p.result.height * p.result.width) - 1, width = int(p.result.width);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      int n = 8 * (tile + t) + lane / 4;
      n = n < last ? n : last;  // what is beyond is multiplied, but not stored
      const int y = n / width, x = n - y * width;
      // From the first position of the source to this of the result.
      const int from = (int(p.result.height) - 1 - y) * p.table_pitch + width - 1 - x;
      entries[t] = (from & 1) * p.table_copy + from / 2;
    }
    // Lane 8·n + r names row r of matrix n: images below, then positions to the right.
    const uint16_t* rows = planes_ + (lane % 8 + lane / 8 % 2 * 8) * p.image_pitch + lane / 16 * 8;
    const int32_t* steps = steps_ + lane % 4;
    for (int k = 0; k < p.source.positions; k += 16) {
      uint32_t images[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrices(images[m], rows + 16 * m * p.image_pitch);
      const int near = load_shared(steps), far = load_shared(steps + 4);
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
        if (tile + t >= tiles) continue;
        const uint32_t matrix[2] = {load_shared(table_ + entries[t] + near),
                                    load_shared(table_ + entries[t] + far)};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) mma_16x8x16<Storage>(sums[m][t], images[m], matrix);
      }
      rows += 16;
      steps += 8;
    }
  }

  LKA_DEVICE void store(const float (&sums)[kRowTiles][kColumnTiles][4], int tile) const {
    const int lane = thread_ % kWarp, count = int(p.result.height * p.result.width);
    const int width = int(p.result.width);
    const float bias =
        p.bias == nullptr
            ? 0.0f
            : widen<Storage>(load_global(static_cast<const uint16_t*>(p.bias) + channel_));
    auto* result = static_cast<uint16_t*>(p.result.data) + channel_ * p.result.stride_c +
                   (image_ + lane / 4) * p.result.stride_b;
    const int64_t step = 8 * p.result.stride_b;
    const int live = int(p.batch - image_ < kImages ? p.batch - image_ : kImages);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      const int n = 8 * (tile + t) + lane % 4 * 2;
      if (n >= count) continue;
      const int y = n / width, x = n - y * width;
      // From tile to tile, so that few addresses are held beside the sums.
      uint16_t* to = result + (y * p.result.stride_h + x * p.result.stride_w);
      const bool last = n + 1 == count;
      const int64_t next = x + 1 < width ? p.result.stride_w : p.result.stride_h - x;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i, to += step) {
        if (8 * i + lane / 4 >= live) continue;
        const uint16_t low = narrow<Storage>(sums[i / 2][t][2 * (i % 2)] + bias);
        const uint16_t high = narrow<Storage>(sums[i / 2][t][2 * (i % 2) + 1] + bias);
        if (p.pairs) {
          store_global(reinterpret_cast<uint32_t*>(to), pack(low, high));
        } else {
          store_global(to, low);
          if (!last) store_global(to + next, high);
        }
      }
    }
  }

  const DenseCorrelateParams& p;
  int32_t* steps_;
  uint32_t* table_;
  uint16_t* planes_;
  int channel_of_block_, thread_, channel_;
  int64_t image_;
};

}  // namespace lka::cuda
