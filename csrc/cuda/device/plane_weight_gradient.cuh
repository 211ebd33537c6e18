// Weight gradients of small kernels, up to 15 × 8 taps, as products for the tensor cores with
// planes in shared memory, as plane_correlate.cuh.
//
// One product has the rows of the input that a row of dy meets with each kernel row, 16 × 16
// columns by `ldmatrix`, times the Toeplitz matrix of that row of dy for eight kernel columns. The
// matrix is never stored: a lane loads two neighbours of the row of dy, or where they begin at an
// odd element, the two words that they lie in. A row of ones beside the rows of the input sums the
// bias's gradient, in the kernel column that meets the first column of dy with that of the input.
// A warp has a channel and some images or bands of rows, and waits for no other warp unless
// channels are neighbours in memory (kWide). Groups of them are summed by sum_partials.
#pragma once

#include "stage_channel_planes.cuh"

namespace lka::cuda {

struct PlaneWeightGradientParams {
  MapAccess grad_output, input;
  float* partials = nullptr;  // as in WeightGradientParams
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch the map
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;
  int32_t first_h = 0, first_w = 0, full_h = 0, full_w = 0;

  int32_t chunks = 0;                         // of 16 columns
  int32_t bias_column = 0;                    // left / dilation_w
  int32_t grad_lead = 0;                      // columns of zeros in front of a row of dy
  int32_t grad_pitch = 0, input_pitch = 0;    // elements of a row, odd multiples of 8
  int32_t images = 0;                         // of a step
  int32_t band_rows = 0, bands = 0;           // of dy; of an image
  int32_t staged_rows = 0;                    // of the input for a band
  int32_t steps = 0, steps_of_group = 0;      // of a channel
  int32_t groups = 0, channel_groups = 0;     // blocks: channel_groups · groups
  int32_t constant_elements = 0;              // of a row of zeros, and of a row of ones
  int32_t warp_bytes = 0, at_grad_bytes = 0;  // of a warp's planes; of dy in them
};

struct PlaneWeightGradient {
  static constexpr int kMostRows = 15, kMostColumns = 8;
  static constexpr int kSums = 4;  // products that do not wait for each other
};

template <class Storage, bool kWide>
class PlaneWeightGradientBlock : PlaneWeightGradient {
 public:
  LKA_DEVICE PlaneWeightGradientBlock(const PlaneWeightGradientParams& params, char* shared)
      : p(params) {
    warps_ = blockDim.x / kWarp;
    warp_ = threadIdx.x / kWarp;
    lane_ = threadIdx.x % kWarp;
    channel0_ = int(blockIdx.x % p.channel_groups) * warps_;
    group_ = int(blockIdx.x / p.channel_groups);
    zeros_ = reinterpret_cast<uint16_t*>(shared);
    ones_ = zeros_ + p.constant_elements;
    planes_ = ones_ + p.constant_elements;
    input_ = planes_ + warp_ * (p.warp_bytes / 2);
    grad_ = input_ + p.at_grad_bytes / 2;
  }

  LKA_DEVICE void run() {
    prepare();
    __syncthreads();
    if (!kWide && channel0_ + warp_ >= p.channels) return;
    const int first = group_ * p.steps_of_group;
    const int end = first + p.steps_of_group < p.steps ? first + p.steps_of_group : p.steps;
    float sums[kSums][4] = {};
    for (int step = first; step < end; ++step) {
      if (step > first) synchronize();  // the planes of the last step are no longer read
      find(step);
      stage();
      cp_async_wait<0>();
      synchronize();
      for (int i = 0; i < p.images && image0_ + i < p.batch; ++i) {
        // Chunks of a row that are unrolled.
        if (p.chunks == 1)
          multiply<1>(sums, i);
        else if (p.chunks == 2)
          multiply<2>(sums, i);
        else
          multiply<kSums>(sums, i);
      }
    }
    store(sums);
  }

 private:
  LKA_DEVICE static void synchronize() {
    if constexpr (kWide)
      __syncthreads();
    else
      __syncwarp();
  }

  // What is never staged stays zero.
  LKA_DEVICE void prepare() const {
    const uint16_t one = narrow<Storage>(1.0f);
    for (int i = threadIdx.x; i < p.constant_elements; i += blockDim.x) {
      store_shared(zeros_ + i, uint16_t(0));
      store_shared(ones_ + i, one);
    }
    for (int i = lane_; i < p.warp_bytes / 16; i += kWarp)
      store_shared(reinterpret_cast<Vector16*>(input_) + i, Vector16{});
  }

  LKA_DEVICE void find(int step) {
    image0_ = step / p.bands * p.images;
    y0_ = step % p.bands * p.band_rows;
    const int left = int(p.grad_output.view.height) - y0_, height = int(p.input.view.height);
    rows_ = left < p.band_rows ? left : p.band_rows;
    first_row_ = y0_ - p.top;
    end_row_ = first_row_ + rows_ + (p.kernel_h - 1) * p.dilation_h;
    if (first_row_ < 0) first_row_ = 0;
    if (end_row_ > height) end_row_ = height;
  }

  LKA_DEVICE void stage() const {
    const int left = p.batch - image0_, images = left < p.images ? left : p.images;
    const int input = p.staged_rows * p.input_pitch, grad = p.band_rows * p.grad_pitch;
    if constexpr (kWide) {
      const int plane = p.warp_bytes / 2;
      for (int i = 0; i < images; ++i) {
        stage_eight_planes(p.input, image0_ + i, channel0_, first_row_, end_row_,
                           planes_ + i * input, plane, p.input_pitch, 0);
        stage_eight_planes(p.grad_output, image0_ + i, channel0_, y0_, y0_ + rows_,
                           planes_ + p.at_grad_bytes / 2 + i * grad, plane, p.grad_pitch,
                           p.grad_lead);
      }
    } else {
      stage(p.input, images, first_row_, end_row_, input_, input, p.input_pitch, 0);
      stage(p.grad_output, images, y0_, y0_ + rows_, grad_, grad, p.grad_pitch, p.grad_lead);
      cp_async_commit();
    }
  }

  LKA_DEVICE void stage(const MapAccess& map, int images, int first, int end, uint16_t* to,
                        int to_image, int pitch, int lead) const {
    const int channel = channel0_ + warp_;
    if (map.row_vector == 1)
      return stage_channel_elements(map, image0_, images, channel, first, end, to, to_image, pitch,
                                    lead);
    for (int i = 0; i < images; ++i)
      stage_channel_plane(map, image0_ + i, channel, first, end, to + i * to_image, pitch, lead);
  }

  // By kChunks products at a time.
  template <int kChunks>
  LKA_DEVICE void multiply(float (&sums)[kSums][4], int image) const {
    const int height = int(p.input.view.height);
    // Lane l gives row l % 16 of the left matrix, lanes 16 to 31 its second eight columns.
    const int kernel_row = lane_ % 16, column = lane_ / 16 * 8;
    const SharedAddress constant =
        shared_address((kernel_row == kMostRows ? ones_ : zeros_) + column);
    // As a row of the input, none of which a row of ones or of zeros is.
    int y = kernel_row < p.kernel_h ? y0_ - p.top + kernel_row * p.dilation_h : -(1 << 30);
    SharedAddress row =
        shared_address(input_ + column)
            .after((image * p.staged_rows + y0_ - p.top + kernel_row * p.dilation_h - first_row_) *
                   p.input_pitch);
    // Row lane % 4 · 2 and column lane / 4 of the right matrix.
    const int start = p.grad_lead + p.left + lane_ % 4 * 2 - lane_ / 4 * p.dilation_w;
    SharedAddress pair =
        shared_address(grad_).after(image * p.band_rows * p.grad_pitch + (start & ~1));
    const int odd = start & 1;
    for (int i = 0; i < rows_; ++i) {
      const SharedAddress from = y >= 0 && y < height ? row : constant;
      for (int chunk0 = 0; chunk0 < p.chunks; chunk0 += kChunks) {
        const int left = p.chunks - chunk0;
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          if (kChunks == kSums && j >= left) continue;  // fewer are whole
          uint32_t rows[4];
          load_matrices(rows, from.after(16 * (chunk0 + j)));
          const SharedAddress at = pair.after(16 * (chunk0 + j));
          const uint32_t matrix[2] = {pair_at(at, odd), pair_at(at.after(8), odd)};
          mma_16x8x16<Storage>(sums[j], rows, matrix);
        }
      }
      ++y;
      row = row.after(p.input_pitch);
      pair = pair.after(p.grad_pitch);
    }
  }

  // Two neighbours, from the second half of a word on if `odd`.
  static LKA_DEVICE uint32_t pair_at(SharedAddress word, int odd) {
    const uint64_t both = load_pair(word) | uint64_t(load_pair(word.after(2))) << 32;
    return uint32_t(both >> 16 * odd);
  }

  LKA_DEVICE void store(const float (&sums)[kSums][4]) const {
    const int64_t taps = int64_t(p.full_h) * p.full_w;
    float* to = p.partials + (int64_t(group_) * p.channels + channel0_ + warp_) * (taps + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum += sums[j][i];
      const int ky = lane_ / 4 + i / 2 * 8, kx = lane_ % 4 * 2 + i % 2;
      if (ky < p.kernel_h && kx < p.kernel_w)
        store_global(to + (ky + p.first_h) * p.full_w + kx + p.first_w, sum);
      if (ky == kMostRows && kx == p.bias_column) store_global(to + taps, sum);
    }
  }

  const PlaneWeightGradientParams& p;
  uint16_t *zeros_, *ones_, *planes_, *input_, *grad_;
  int warps_, warp_, lane_, channel0_, group_;
  int image0_, y0_, rows_, first_row_, end_row_;  // of the step
};

}  // namespace lka::cuda
