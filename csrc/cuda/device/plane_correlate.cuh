// Depthwise correlation as products for the tensor cores, planes in shared memory: forward, and
// backward-input with the taps reversed.
//
// As in toeplitz_correlate.cuh a row of outputs is a row of the source times the Toeplitz matrix of
// a kernel row, 16 slots × 16 columns of the source times 16 × 8 of that matrix. Here a slot is one
// row of outputs, and what a kernel row needs of the source is 16 rows of a plane that lies in
// shared memory, `ldmatrix` being told where each begins. So a warp has a channel to itself: it
// stages whole planes, of as many images as fill its slots, or a band of rows of a large one, and
// waits for no other warp. Kernel rows meet zeros where a row lies beyond the map; columns beyond
// it are zeros in the plane.
//
// Where channels are neighbours in memory (kWide), the eight warps of a block stage eight
// channels together, 16 bytes a pixel, and store them so.
#pragma once

#include "stage_channel_planes.cuh"

namespace lka::cuda {

struct PlaneCorrelateParams {
  // result[y, x] = Σ source[y - top + ky·dilation_h, x - left + kx·dilation_w]·tap[ky, kx] + bias
  MapAccess source, result;
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t weight_stride_c = 0;
  int32_t first_tap = 0, tap_stride_y = 0, tap_stride_x = 0;  // negative strides: taps reversed
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;  // padding in front of the first of them

  int32_t chunks = 0;                     // of 16 columns that 8 outputs meet
  int32_t tiles = 0;                      // of 8 columns of outputs in a row
  int32_t taps_pitch = 0, taps_copy = 0;  // words of a kernel row, of all rows
  int32_t lead = 0;                       // columns of zeros in front of a staged row
  int32_t pitch = 0, result_pitch = 0;    // elements of a staged row, odd multiples of 8
  int32_t images = 0;                     // of a step: their rows are one sequence of slots
  int32_t band_rows = 0, bands = 0;       // of outputs of a step in each image; of an image
  int32_t inverse_rows = 0;               // 65536 / band_rows, rounded up
  int32_t staged_rows = 0;                // of the source for a band
  int32_t steps = 0, steps_of_group = 0;  // of a channel, of a block
  int32_t channel_groups = 0;             // blocks: channel_groups · groups of steps
  int32_t plane_bytes = 0, warp_bytes = 0;
};

struct PlaneCorrelate {
  static constexpr int kSlots = 16;
  // Elements of a row of taps in front of the window: more than any shift.
  static constexpr int kTapsLead = 16;
};

// `shared` has a row of zeros and of each warp a plane, results and taps; see plan_plane_correlate.
template <class Storage, int kTiles, bool kWide>
class PlaneCorrelateBlock : PlaneCorrelate {
 public:
  LKA_DEVICE PlaneCorrelateBlock(const PlaneCorrelateParams& params, char* shared) : p(params) {
    warps_ = blockDim.x / kWarp;
    warp_ = threadIdx.x / kWarp;
    lane_ = threadIdx.x % kWarp;
    channel0_ = int(blockIdx.x % p.channel_groups) * warps_;
    zeros_ = reinterpret_cast<uint16_t*>(shared);
    planes_ = zeros_ + p.pitch;
    plane_ = planes_ + warp_ * (p.warp_bytes / 2);
    result_ = kWide ? planes_ + warps_ * (p.warp_bytes / 2) : plane_ + p.plane_bytes / 2;
    taps_ = reinterpret_cast<uint32_t*>(plane_ + (p.warp_bytes - 8 * p.taps_copy) / 2);
  }

  LKA_DEVICE void run() {
    clear();
    __syncthreads();
    const int first = int(blockIdx.x / p.channel_groups) * p.steps_of_group;
    const int end = first + p.steps_of_group < p.steps ? first + p.steps_of_group : p.steps;
    if (!kWide && channel0_ + warp_ >= p.channels) return;
    for (int step = first; step < end; ++step) {
      find(step);
      stage();
      if (step == first) stage_taps();
      cp_async_wait<0>();
      synchronize();
      const int slots = p.images * p.band_rows;
      for (int slot0 = 0; slot0 < slots; slot0 += kSlots)
        for (int tile0 = 0; tile0 < p.tiles; tile0 += kTiles) run_strip(slot0, tile0);
    }
  }

 private:
  // Of a warp that shares nothing, or of all that have the same pixels.
  LKA_DEVICE static void synchronize() {
    if constexpr (kWide)
      __syncthreads();
    else
      __syncwarp();
  }

  // Columns that are never staged stay zero.
  LKA_DEVICE void clear() const {
    for (int i = threadIdx.x; i < p.pitch / 8; i += blockDim.x)
      store_shared(reinterpret_cast<Vector16*>(zeros_) + i, Vector16{});
    for (int i = lane_; i < p.plane_bytes / 16; i += kWarp)
      store_shared(reinterpret_cast<Vector16*>(plane_) + i, Vector16{});
  }

  LKA_DEVICE void find(int step) {
    image0_ = step / p.bands * p.images;
    y0_ = step % p.bands * p.band_rows;
    const int height = int(p.source.view.height);
    first_row_ = y0_ - p.top;
    end_row_ = first_row_ + p.band_rows + (p.kernel_h - 1) * p.dilation_h;
    if (first_row_ < 0) first_row_ = 0;
    if (end_row_ > height) end_row_ = height;
  }

  LKA_DEVICE void stage() const {
    const int left = p.batch - image0_, images = left < p.images ? left : p.images;
    if (p.source.row_vector == 1)
      return stage_channel_elements(p.source, image0_, images, channel0_ + warp_, first_row_,
                                    end_row_, plane_, p.staged_rows * p.pitch, p.pitch, p.lead);
    for (int i = 0; i < images; ++i) {
      const int at = i * p.staged_rows * p.pitch;
      if constexpr (kWide)
        stage_eight_planes(p.source, image0_ + i, channel0_, first_row_, end_row_, planes_ + at,
                           p.warp_bytes / 2, p.pitch, p.lead);
      else
        stage_channel_plane(p.source, image0_ + i, channel0_ + warp_, first_row_, end_row_,
                            plane_ + at, p.pitch, p.lead);
    }
    cp_async_commit();
  }

  // Rows of zeros, taps, zeros: element q has the tap at column q - kTapsLead of the window. Twice,
  // the second time shifted by one, so that two neighbours are one load at odd elements too.
  LKA_DEVICE void stage_taps() const {
    const auto* weight = static_cast<const uint16_t*>(p.weight) +
                         (channel0_ + warp_) * p.weight_stride_c + p.first_tap;
    auto* taps = reinterpret_cast<uint16_t*>(taps_);
    for (int ky = 0; ky < p.kernel_h; ++ky)
      for (int at = lane_; at < 2 * p.taps_pitch; at += kWarp) {
        const int column = at - kTapsLead;
        int kx = column;
        bool is_tap = column >= 0;
        if (p.dilation_w != 1) {
          kx = column / p.dilation_w;
          is_tap = is_tap && kx * p.dilation_w == column;
        }
        const uint16_t tap = is_tap && kx < p.kernel_w
                                 ? load_global(weight + ky * p.tap_stride_y + kx * p.tap_stride_x)
                                 : uint16_t(0);
        uint16_t* row = taps + 2 * ky * p.taps_pitch;
        store_shared(row + at, tap);
        if (at > 0) store_shared(row + 2 * p.taps_copy + at - 1, tap);
      }
  }

  struct Slot {
    int image, row;  // of the step and of the band
  };
  LKA_DEVICE Slot slot_of(int slot) const {
    const int image = slot * p.inverse_rows >> 16;
    return {image, slot - image * p.band_rows};
  }

  // Rows of outputs from slot0 on, columns from tile0 on.
  LKA_DEVICE void run_strip(int slot0, int tile0) {
    float sums[kTiles][4];
    const float bias =
        p.bias == nullptr
            ? 0.0f
            : widen<Storage>(load_global(static_cast<const uint16_t*>(p.bias) + channel0_ + warp_));
    const int live = p.tiles - tile0 < kTiles ? p.tiles - tile0 : kTiles;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][i] = bias;
    if (live == kTiles)
      multiply<true>(sums, slot0, tile0, live);
    else
      multiply<false>(sums, slot0, tile0, live);
    if constexpr (kWide)
      store_pixels(sums, slot0, tile0, live);
    else
      store_rows(sums, slot0, tile0, live);
  }

  // kAll: live is kTiles.
  template <bool kAll>
  LKA_DEVICE void multiply(float (&sums)[kTiles][4], int slot0, int tile0, int live) const {
    const int height = int(p.source.view.height);
    const Slot slot = slot_of(slot0 + lane_ % kSlots);
    const bool exists = slot.image < p.images;
    // Lanes 16 to 31 give the second eight columns of the same rows.
    const int columns = 8 * tile0 + lane_ / 16 * 8;
    int y = y0_ + slot.row - p.top;
    const SharedAddress none = shared_address(zeros_ + columns);
    SharedAddress row = shared_address(plane_ + columns)
                            .after((slot.image * p.staged_rows + y - first_row_) * p.pitch);
    // Kernel rows that meet the map in a strip of one image.
    int first = 0, end = p.kernel_h;
    if (p.images == 1) {
      const int highest = y0_ + slot0 - p.top;
      first = steps_of(-(highest + kSlots - 1));
      const int met = steps_of(height - highest);  // rows from there to the end
      end = met < end ? met : end;
    }
    // Column lane / 4 of the matrix is shifted by as many taps.
    const int start = lane_ % 4 * 2 - lane_ / 4 - (p.lead - p.left) + kTapsLead;
    SharedAddress taps =
        shared_address(reinterpret_cast<const uint16_t*>(taps_))
            .after(2 * ((start & 1) * p.taps_copy + start / 2 + first * p.taps_pitch));
    const int step = p.dilation_h * p.pitch;
    y += first * p.dilation_h;
    row = row.after(first * step);
    for (int ky = first; ky < end; ++ky) {
      const SharedAddress from = exists && y >= 0 && y < height ? row : none;
#pragma unroll 1  // there is one, mostly
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const SharedAddress at = taps.after(16 * chunk), rows_at = from.after(16 * chunk);
        const uint32_t matrix[2] = {load_pair(at), load_pair(at.after(8))};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (!kAll && t >= live) continue;
          uint32_t rows[4];
          load_matrices(rows, rows_at.after(8 * t));
          mma_16x8x16<Storage>(sums[t], rows, matrix);
        }
      }
      y += p.dilation_h;
      row = row.after(step);
      taps = taps.after(2 * p.taps_pitch);
    }
  }

  // Steps of the dilation that `rows` take, none for negative ones.
  LKA_DEVICE int steps_of(int rows) const {
    if (rows <= 0) return 0;
    return p.dilation_h == 1 ? rows : (rows + p.dilation_h - 1) / p.dilation_h;
  }

  // By way of shared memory, so that lanes store whole vectors of a row.
  LKA_DEVICE void store_rows(const float (&sums)[kTiles][4], int slot0, int tile0, int live) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= live) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(reinterpret_cast<uint32_t*>(result_ + (lane_ / 4 + 8 * half) * p.result_pitch +
                                                 8 * t + lane_ % 4 * 2),
                     narrow_pair<Storage>(sums[t][2 * half], sums[t][2 * half + 1]));
    }
    __syncwarp();
    const int left = int(p.result.view.width) - 8 * tile0,
              columns = left < 8 * live ? left : 8 * live;
    switch (p.result.row_vector) {
      case 8: store_vectors<8>(slot0, 8 * tile0, columns); break;
      case 4: store_vectors<4>(slot0, 8 * tile0, columns); break;
      case 2: store_vectors<2>(slot0, 8 * tile0, columns); break;
      default: store_vectors<1>(slot0, 8 * tile0, columns);
    }
    __syncwarp();
  }

  template <int kVector>
  LKA_DEVICE void store_vectors(int slot0, int x0, int columns) const {
    struct alignas(2 * kVector) Vector {
      uint16_t values[kVector];
    };
    const int vectors = columns / kVector, shift = shift_of_lanes(vectors);
    const int first = lane_ >> shift, rows = kWarp >> shift;
    const int stride_b = int(p.result.view.stride_b), stride_h = int(p.result.view.stride_h);
    for (int v = lane_ & ((1 << shift) - 1); v < vectors; v += 1 << shift) {
      auto* to = static_cast<uint16_t*>(p.result.view.data) + image0_ * p.result.view.stride_b +
                 (channel0_ + warp_) * p.result.view.stride_c + y0_ * p.result.view.stride_h + x0 +
                 v * kVector;
      const uint16_t* from = result_ + first * p.result_pitch + v * kVector;
      for (int i = first; i < kSlots; i += rows, from += rows * p.result_pitch) {
        const Slot slot = slot_of(slot0 + i);
        // The plan has made sure that offsets from the first image of a step fit 32 bits.
        if (stores(slot))
          store_global(
              reinterpret_cast<Vector*>(to + (slot.image * stride_b + slot.row * stride_h)),
              load_shared(reinterpret_cast<const Vector*>(from)));
      }
    }
  }

  LKA_DEVICE bool stores(const Slot& slot) const {
    return slot.image < p.images && image0_ + slot.image < p.batch &&
           y0_ + slot.row < p.result.view.height;
  }

  // Channels are neighbours in memory: all warps bring theirs.
  LKA_DEVICE void store_pixels(const float (&sums)[kTiles][4], int slot0, int tile0,
                               int live) const {
    constexpr int kChannels = 8;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= live) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_shared(result_ + (lane_ / 4 + i / 2 * 8) * p.result_pitch +
                         (8 * t + lane_ % 4 * 2 + i % 2) * kChannels + warp_,
                     narrow<Storage>(sums[t][i]));
    }
    __syncthreads();
    const int left = int(p.result.view.width) - 8 * tile0,
              columns = left < 8 * live ? left : 8 * live;
    const int shift = shift_of_lanes(columns);
    auto* to =
        static_cast<uint16_t*>(p.result.view.data) + channel0_ + 8 * tile0 * p.result.view.stride_w;
    for (int i = threadIdx.x >> shift; i < kSlots; i += blockDim.x >> shift) {
      const Slot slot = slot_of(slot0 + i);
      if (!stores(slot)) continue;
      uint16_t* row = to + (image0_ + slot.image) * p.result.view.stride_b +
                      (y0_ + slot.row) * p.result.view.stride_h;
      const uint16_t* from = result_ + i * p.result_pitch;
      for (int x = threadIdx.x & ((1 << shift) - 1); x < columns; x += 1 << shift)
        store_global(reinterpret_cast<Vector16*>(row + x * p.result.view.stride_w),
                     load_shared(reinterpret_cast<const Vector16*>(from + x * kChannels)));
    }
    __syncthreads();
  }

  const PlaneCorrelateParams& p;
  uint16_t *zeros_, *planes_, *plane_, *result_;
  uint32_t* taps_;
  int warps_, warp_, lane_, channel0_;
  int image0_, y0_, first_row_, end_row_;  // of the step
};

}  // namespace lka::cuda
