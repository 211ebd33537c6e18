// Depthwise correlation as products for the tensor cores: forward, and backward-input with the taps
// reversed.
//
// A row of outputs is a row of the source times the Toeplitz matrix of a kernel row. One product
// has 16 slots × 16 columns of the source times 16 × 8 of that matrix. A slot is a strip of kRows
// rows of outputs of one image, images fastest; a warp has one channel, 16 slots and up to 8·kTiles
// columns. The block walks down the rows of the source: each is staged once, read into registers
// once, and meets all rows of its strip, with kernel row s - r for row r of the strip at step s.
//
// The matrix is never stored. Shared memory has the taps of each kernel row, dilated, between
// zeros; what a lane needs of the matrix is two neighbouring taps at a time. Neighbours that start
// at an odd element come from a second copy, shifted by one, so that each pair is one load.
#pragma once

#include "stage_rows.cuh"

namespace lka::cuda {

struct CorrelateParams {
  // result[y, x] = Σ source[y - top + ky·dilation_h, x - left + kx·dilation_w]·tap[ky, kx] + bias
  MapAccess source, result;
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t weight_stride_c = 0;
  int32_t first_tap = 0, tap_stride_y = 0, tap_stride_x = 0;  // negative strides: taps reversed
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;  // padding in front of the first of them; negative: cropped

  int32_t strips = 0;                       // of an image
  int32_t x_tiles = 0, channel_groups = 0;  // blocks: x_tiles · channel_groups · slots / 16
  int32_t chunks = 0;                       // of 16 columns that 8 outputs meet
  int32_t taps_pitch = 0, taps_copy = 0;    // words of a kernel row, of all rows
  int32_t taps_plane = 0;                   // words of both copies
  Tile tile;                                // of one stage
  int32_t stages = 4;                       // 4 or 2: rows of the source in shared memory
};

struct ToeplitzCorrelate {
  static constexpr int kRows = 4, kTiles = 4, kSlots = 16;
  static constexpr int kColumns = 8 * kTiles;
  // Elements between slots of results on their way to channels-last memory, beside the channels.
  static constexpr int kResultPad = 8;

  struct Slot {
    int64_t source, result;  // offsets of the image
    int32_t first_row, pad;  // of the outputs
  };

  static LKA_DEVICE int first_row_of_strip(int strip, int dilation) {
    return strip / dilation * dilation * kRows + strip % dilation;
  }
};

// `shared` has slots, taps and stages, in this order; see plan_correlate for its size.
template <class Storage>
class ToeplitzCorrelateBlock : ToeplitzCorrelate {
 public:
  LKA_DEVICE ToeplitzCorrelateBlock(const CorrelateParams& params, char* shared) : p(params) {
    slots_ = reinterpret_cast<Slot*>(shared);
    taps_ = reinterpret_cast<uint32_t*>(slots_ + kSlots);
    warps_ = blockDim.x / kWarp;
    warp_ = threadIdx.x / kWarp;
    lane_ = threadIdx.x % kWarp;
    stages_ = reinterpret_cast<uint16_t*>(taps_ + warps_ * p.taps_plane);
    int64_t block = blockIdx.x;
    x0_ = int(block % p.x_tiles) * kColumns;
    block /= p.x_tiles;
    channel0_ = int(block % p.channel_groups) * warps_;
    slot0_ = block / p.channel_groups * kSlots;
    const int out_width = int(p.result.view.width);
    live_tiles_ = out_width - x0_ >= kColumns ? kTiles : (out_width - x0_ + 7) / 8;
    // The window begins at a multiple of 8 columns. Of the rest an even number is skipped, and an
    // odd column becomes a row of zeros of the matrix.
    const int from = x0_ - p.left;
    from_x_ = (from >= 0 ? from : from - 7) / 8 * 8;
    slack_ = (from - from_x_) & 1;
    skipped_ = from - from_x_ - slack_;
    first_chunk_ = 0;
    end_chunk_ = p.chunks;
    const int window = from - slack_, extent = 16 + 8 * (live_tiles_ - 1);
    const int width = int(p.source.view.width);
    if (window + extent <= 0) first_chunk_ = (-window - extent) / 16 + 1;
    if (window + 16 * p.chunks > width)
      end_chunk_ = width > window ? (width - window + 15) / 16 : 0;
  }

  LKA_DEVICE void run() {
    describe_slots();
    stage_taps();
    __syncthreads();
    find_steps();
    // The loop is p.stages - 1 steps behind the copies.
    for (int i = 0; i < p.stages - 1; ++i) stage(first_step_ + i, i);
    float sums[kRows][kTiles][4] = {};
    int buffer = 0;
    for (int s = first_step_; s < end_step_; ++s) {
      if (p.stages == 4)
        cp_async_wait<2>();
      else
        cp_async_wait<0>();
      __syncthreads();
      stage(s + p.stages - 1, buffer == 0 ? p.stages - 1 : buffer - 1);
      multiply(sums, stages_ + buffer * stage_size(), s);
      buffer = buffer == p.stages - 1 ? 0 : buffer + 1;
    }
    add_bias(sums);
    if (p.result.row_vector > 0)
      store_rows(sums);
    else
      store_through_shared(sums);
  }

 private:
  LKA_DEVICE void describe_slots() {
    if (threadIdx.x >= kSlots) return;
    const int64_t m = slot0_ + threadIdx.x;
    const bool exists = m < int64_t(p.strips) * p.batch;
    const int64_t b = m % p.batch;
    Slot& slot = slots_[threadIdx.x];
    store_shared(&slot.source, b * p.source.view.stride_b);
    store_shared(&slot.result, b * p.result.view.stride_b);
    // A strip that does not exist begins below its map.
    store_shared(&slot.first_row, exists ? first_row_of_strip(int(m / p.batch), p.dilation_h)
                                         : int32_t(p.result.view.height));
  }

  // Rows of zeros, taps, zeros: element q has the tap at column q - 8 of the window.
  LKA_DEVICE void stage_taps() {
    const auto* weight = static_cast<const uint16_t*>(p.weight);
    const int channel = channel0_ + warp_;
    if (channel >= p.channels) return;
    weight += channel * p.weight_stride_c + p.first_tap;
    auto* taps = reinterpret_cast<uint16_t*>(taps_ + warp_ * p.taps_plane);
    const int length = 16 * p.chunks + 8;
    for (int ky = 0; ky < p.kernel_h; ++ky) {
      for (int q = lane_; q < 2 * length; q += kWarp) {
        const int copy = q >= length;
        const int at = q - copy * length;
        const int column = at + copy - 8;
        int kx = column;
        bool is_tap = column >= 0;
        if (p.dilation_w != 1) {
          kx = column / p.dilation_w;
          is_tap = is_tap && kx * p.dilation_w == column;
        }
        is_tap = is_tap && kx < p.kernel_w;
        store_shared(
            taps + 2 * (copy * p.taps_copy + ky * p.taps_pitch) + at,
            is_tap ? load_global(weight + ky * p.tap_stride_y + kx * p.tap_stride_x) : uint16_t(0));
      }
    }
  }

  // Steps whose row of the source lies within the map for at least one slot.
  LKA_DEVICE void find_steps() {
    const int height = int(p.result.view.height);
    int lowest = height, highest = -1;
    for (int i = 0; i < kSlots; ++i) {
      const int row = load_shared(&slots_[i].first_row);
      if (row >= height) continue;
      lowest = row < lowest ? row : lowest;
      highest = row > highest ? row : highest;
    }
    const int above = p.top - highest;
    first_step_ = above > 0 ? (above + p.dilation_h - 1) / p.dilation_h : 0;
    const int below = int(p.source.view.height) + p.top - lowest;  // rows from there to the end
    end_step_ = below > 0 ? (below + p.dilation_h - 1) / p.dilation_h : 0;
    const int steps = p.kernel_h + kRows - 1;
    end_step_ = end_step_ < steps ? end_step_ : steps;
  }

  LKA_DEVICE int stage_size() const { return warps_ * p.tile.plane_pitch; }

  LKA_DEVICE void stage(int s, int buffer) {
    if (s < end_step_) {
      const int columns = (skipped_ + 8 * (live_tiles_ - 1) + 16 * p.chunks + 7) / 8 * 8;
      stage_rows(
          p.source, channel0_, p.channels, kSlots, from_x_, columns,
          stages_ + buffer * stage_size(), p.tile, [&](int row) {
            const int first = load_shared(&slots_[row].first_row);
            const int y = first - p.top + s * p.dilation_h;
            const bool exists = first < p.result.view.height && y >= 0 && y < p.source.view.height;
            return exists ? load_shared(&slots_[row].source) + y * p.source.view.stride_h : kNoRow;
          });
    }
    cp_async_commit();  // an empty group too, as groups are counted
  }

  // The last half that `chunk` or one behind it takes, counted from the first of `chunk`.
  LKA_DEVICE int last_half(int chunk) const { return live_tiles_ + 2 * (end_chunk_ - chunk - 1); }

  LKA_DEVICE void multiply(float (&sums)[kRows][kTiles][4], const uint16_t* stage, int s) {
    if (channel0_ + warp_ >= p.channels || first_chunk_ >= end_chunk_) return;
    const int slot = lane_ / 4, pair = lane_ % 4 * 2;
    const uint16_t* row = stage + warp_ * p.tile.plane_pitch + slot * p.tile.row_pitch + skipped_ +
                          pair + 16 * first_chunk_;
    const int below = 8 * p.tile.row_pitch;  // the other slot of the lane
    const auto load_half = [&](uint32_t (&half)[2], int i) {
      half[0] = load_shared(reinterpret_cast<const uint32_t*>(row + 8 * i));
      half[1] = load_shared(reinterpret_cast<const uint32_t*>(row + 8 * i + below));
    };
    // Column lane / 4 of the matrix is shifted by as many taps.
    const int start = pair - slack_ - lane_ / 4 + 8;
    const uint32_t* taps =
        taps_ + warp_ * p.taps_plane + (start & 1) * p.taps_copy + start / 2 + 8 * first_chunk_;
    // Eight columns of the source each; tile t takes halves t and t + 1.
    uint32_t halves[kTiles + 1][2];
#pragma unroll
    for (int i = 0; i < kTiles - 1; ++i)
      if (i <= last_half(first_chunk_)) load_half(halves[i], i);
    for (int chunk = first_chunk_; chunk < end_chunk_; ++chunk) {
#pragma unroll
      for (int i = kTiles - 1; i <= kTiles; ++i)
        if (i <= last_half(chunk)) load_half(halves[i], i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int ky = s - r;
        if (ky < 0 || ky >= p.kernel_h) continue;
        const uint32_t* at = taps + ky * p.taps_pitch;
        const uint32_t matrix[2] = {load_shared(at), load_shared(at + 4)};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t >= live_tiles_) break;
          const uint32_t rows[4] = {halves[t][0], halves[t][1], halves[t + 1][0], halves[t + 1][1]};
          mma_16x8x16<Storage>(sums[r][t], rows, matrix);
        }
      }
      row += 16;
      taps += 8;
#pragma unroll
      for (int i = 0; i < kTiles - 1; ++i) {
        halves[i][0] = halves[i + 2][0];
        halves[i][1] = halves[i + 2][1];
      }
    }
  }

  LKA_DEVICE void add_bias(float (&sums)[kRows][kTiles][4]) {
    if (p.bias == nullptr || channel0_ + warp_ >= p.channels) return;
    const float bias =
        widen<Storage>(load_global(static_cast<const uint16_t*>(p.bias) + channel0_ + warp_));
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][t][i] += bias;
  }

  LKA_DEVICE void store_rows(const float (&sums)[kRows][kTiles][4]) {
    if (channel0_ + warp_ >= p.channels) return;
    auto* result =
        static_cast<uint16_t*>(p.result.view.data) + (channel0_ + warp_) * p.result.view.stride_c;
    const int width = int(p.result.view.width);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Slot& slot = slots_[lane_ / 4 + 8 * half];
      const int first = load_shared(&slot.first_row);
      uint16_t* image = result + load_shared(&slot.result);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = first + r * p.dilation_h;
        if (y >= p.result.view.height) break;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int x = x0_ + 8 * t + lane_ % 4 * 2;
          if (x >= width) break;
          uint16_t* at = image + y * p.result.view.stride_h + x;
          const uint16_t low = narrow<Storage>(sums[r][t][2 * half]);
          const uint16_t high = narrow<Storage>(sums[r][t][2 * half + 1]);
          if (p.result.row_vector >= 2 && x + 1 < width) {
            store_global(reinterpret_cast<uint32_t*>(at), pack(low, high));
          } else {
            store_global(at, low);
            if (x + 1 < width) store_global(at + 1, high);
          }
        }
      }
    }
  }

  // Channels are neighbours in memory but not in a warp: one row of every strip at a time is turned
  // in shared memory, over the stages that are no longer needed.
  LKA_DEVICE void store_through_shared(const float (&sums)[kRows][kTiles][4]) {
    const int pitch = kColumns * warps_ + kResultPad;
    const int width = int(p.result.view.width);
    auto* result = static_cast<uint16_t*>(p.result.view.data);
    const bool wide = p.result.channel_vector == 8 && warps_ == 8;
    const int live = p.channels - channel0_ < warps_ ? p.channels - channel0_ : warps_;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          store_shared(stages_ + (lane_ / 4 + i / 2 * 8) * pitch +
                           (8 * t + lane_ % 4 * 2 + i % 2) * warps_ + warp_,
                       narrow<Storage>(sums[r][t][i]));
      __syncthreads();
      for (int slot = warp_; slot < kSlots; slot += warps_) {
        const int y = load_shared(&slots_[slot].first_row) + r * p.dilation_h;
        if (y >= p.result.view.height) continue;
        const uint16_t* from = stages_ + slot * pitch;
        uint16_t* row = result + load_shared(&slots_[slot].result) + y * p.result.view.stride_h +
                        channel0_ * p.result.view.stride_c;
        if (wide) {
          if (x0_ + lane_ < width)
            store_global(reinterpret_cast<Vector16*>(row + (x0_ + lane_) * p.result.view.stride_w),
                         load_shared(reinterpret_cast<const Vector16*>(from + lane_ * 8)));
          continue;
        }
        const int channel = lane_ % warps_;
        for (int x = lane_ / warps_; x < kColumns; x += kWarp / warps_)
          if (channel < live && x0_ + x < width)
            store_global(
                row + (x0_ + x) * p.result.view.stride_w + channel * p.result.view.stride_c,
                load_shared(from + x * warps_ + channel));
      }
    }
  }

  const CorrelateParams& p;
  Slot* slots_;
  uint32_t* taps_;
  uint16_t* stages_;
  int64_t slot0_;
  int warps_, warp_, lane_;
  int x0_, channel0_, live_tiles_;
  int from_x_, slack_, skipped_, first_chunk_, end_chunk_;
  int first_step_, end_step_;
};

}  // namespace lka::cuda
