// The fused adapter forward for narrow ranks, up to 16, in 16-bit types: the launches of
// adapter_forward.cuh with few instructions. x, the residual and y go between global memory and the
// registers that the tensor cores take, 16 bytes a lane (token_fragments.cuh); shared memory has
// the tile of the convolution, nothing else.
#pragma once

#include "adapter_forward.cuh"
#include "token_fragments.cuh"

namespace lka::cuda {

// z = x·Wdᵀ + bd and a = act(z). Tokens of all images are one sequence, 16 for each of token_warps;
// channel_warps share out the terms of their sums.
template <class Storage, int kRankTiles>
class AdapterNarrowDownBlock {
  using Sums = float[kRankTiles][4];

 public:
  LKA_DEVICE AdapterNarrowDownBlock(const AdapterParams& params, char* shared)
      : p(params), parts_(reinterpret_cast<float*>(shared)) {
    lane_ = threadIdx.x % 32;
    group_ = lane_ / 4;
    pair_ = lane_ % 4;
    token_warp_ = threadIdx.x / 32 / p.channel_warps;
    channel_warp_ = threadIdx.x / 32 % p.channel_warps;
    const uint32_t first =
        (blockIdx.x * uint32_t(p.token_warps) + token_warp_) * TokenFragment::kTokens + group_;
    find(first, 0);
    find(first + 8, 1);
  }

  LKA_DEVICE void run() {
    Sums sums = {};
    const int units = p.channels / TokenFragment::kChannels;
    for (int unit = channel_warp_; unit < units; unit += kBatch * p.channel_warps)
      multiply(sums, unit, units);
    if (p.channel_warps > 1) join(sums);
    if (channel_warp_ == 0) store(sums);
  }

 private:
  static constexpr int kBatch = 3;  // fragments whose loads are under way together

  LKA_DEVICE void find(uint32_t token, int row) {
    const uint32_t image = token / uint32_t(p.tokens);
    exists_[row] = image < uint32_t(p.batch);
    image_[row] = int(image);
    token_[row] = int(token - image * uint32_t(p.tokens));
  }

  LKA_DEVICE const uint16_t* row_of_x(int row) const {
    return static_cast<const uint16_t*>(p.x.data) + image_[row] * p.x.stride_b +
           token_[row] * p.x.stride_t + 8 * pair_;
  }

  LKA_DEVICE void multiply(Sums& sums, int first, int units) const {
    const uint16_t *low = row_of_x(0), *high = row_of_x(1);
    const auto* weight =
        static_cast<const uint16_t*>(p.down_weight) + int64_t(group_) * p.channels + 8 * pair_;
    TokenFragment x[kBatch];
    Vector16 rows[kBatch][kRankTiles];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * p.channel_warps, c0 = unit * TokenFragment::kChannels;
      x[i].low = load_vector_if(exists_[0] && unit < units, low + c0);
      x[i].high = load_vector_if(exists_[1] && unit < units, high + c0);
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
        rows[i][n] = load_vector_if(8 * n + group_ < p.rank && unit < units,
                                    weight + int64_t(8 * n) * p.channels + c0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t a[4], b[2];
        x[i].as_rows(s, a);
#pragma unroll
        for (int n = 0; n < kRankTiles; ++n) {
          as_terms(rows[i][n], s, b);
          mma_16x8x16<Storage>(sums[n], a, b);
        }
      }
  }

  // Adds up the sums of all channel warps, in their order, for the first.
  LKA_DEVICE void join(Sums& sums) const {
    float* own = parts_ + (token_warp_ * p.channel_warps + channel_warp_) * kSums * 32 + lane_;
    if (channel_warp_ > 0) {
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(own + (4 * n + i) * 32, sums[n][i]);
    }
    __syncthreads();
    if (channel_warp_ > 0) return;
#pragma unroll 1
    for (int other = 1; other < p.channel_warps; ++other)
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[n][i] += load_shared(own + (other * kSums + 4 * n + i) * 32);
  }

  LKA_DEVICE void store(const Sums& sums) const {
    const auto* bias = static_cast<const uint16_t*>(p.down_bias);
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int rank = 8 * n + 2 * pair_ + i;
        if (rank >= p.rank) continue;
        const float b = bias == nullptr ? 0.0f : widen<Storage>(load_global(bias + rank));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!exists_[row]) continue;
          const int64_t at = (int64_t(image_[row]) * p.rank + rank) * p.tokens + token_[row];
          const uint16_t z = narrow<Storage>(sums[n][2 * row + i] + b);
          store_global(static_cast<uint16_t*>(p.z) + at, z);
          // Of z as it is stored, so that backward sees the same argument.
          if (p.before != Activation::none)
            store_global(static_cast<uint16_t*>(p.a) + at,
                         narrow<Storage>(activate(p.before, widen<Storage>(z))));
        }
      }
  }

  static constexpr int kSums = 4 * kRankTiles;

  const AdapterParams& p;
  float* parts_;
  int lane_, group_, pair_, token_warp_, channel_warp_;
  int image_[2], token_[2];  // of rows g and g + 8
  bool exists_[2];
};

// y = residual + scale·(e·Wuᵀ + bu), e being what the tile's convolution leaves. Warps share out
// the fragments of the tile and of the block's channels.
template <class Storage>
class AdapterNarrowUpBlock : AdapterTile<Storage> {
  using Base = AdapterTile<Storage>;
  using Base::p;

 public:
  LKA_DEVICE AdapterNarrowUpBlock(const AdapterParams& params, char* shared)
      : Base(params, shared), tile_(tile_of(params, blockIdx.x / params.splits)) {
    group_ = this->lane_ / 4;
    pair_ = this->lane_ % 4;
  }

  LKA_DEVICE void run() {
    const int split = int(blockIdx.x % p.splits), all = p.channels / TokenFragment::kChannels;
    const int first = all * split / p.splits, units = all * (split + 1) / p.splits - first;
    const int rows = (tile_.count + TokenFragment::kTokens - 1) / TokenFragment::kTokens;
    const int work = units * rows;
    int i = work * this->warp_ / this->warps_;
    const int end = work * (this->warp_ + 1) / this->warps_;
    Place place = {first + i / rows, i % rows};
    const auto next_of = [&](Place at) {
      return at.row + 1 < rows ? Place{at.unit, at.row + 1} : Place{at.unit + 1, 0};
    };
    // The first fragment comes while the tile is convolved, the others one ahead.
    TokenFragment residual = load(place, i < end);
    if (p.convolved) {
      this->stage_grid_of_c(tile_);
      cp_async_commit();
    }
    this->convolve(tile_, split == 0, 0);
    __syncthreads();
    Weights weights;
    bool fresh = true;
    for (; i < end; ++i) {
      const Place next = next_of(place);
      const TokenFragment ahead = load(next, i + 1 < end);
      if (fresh) load(weights, place.unit * TokenFragment::kChannels);
      add_product(residual, weights, place);
      fresh = next.unit != place.unit;
      place = next;
      residual = ahead;
    }
  }

 private:
  struct Place {
    int unit, row;  // 32 channels, and 16 tokens of the tile
  };
  struct Weights {
    uint32_t columns[4][2];  // operands of the four products
    float bias[4][2];        // of the lane's channels
  };

  LKA_DEVICE int token(const Place& at, int half) const {
    return at.row * TokenFragment::kTokens + 8 * half + group_;
  }
  // The plan has made sure that offsets in an image fit 32 bits.
  LKA_DEVICE uint16_t* at(const TokenTensor& tensor, const Place& place, int half) const {
    return static_cast<uint16_t*>(tensor.data) + tile_.image * tensor.stride_b +
           ((tile_.t0 + token(place, half)) * int(tensor.stride_t) +
            place.unit * TokenFragment::kChannels + 8 * pair_);
  }

  LKA_DEVICE TokenFragment load(const Place& place, bool exists) const {
    exists = exists && p.residual.data != nullptr;
    return {
        load_vector_if(exists && token(place, 0) < tile_.count, at(p.residual, place, 0)),
        load_vector_if(exists && token(place, 1) < tile_.count, at(p.residual, place, 1)),
    };
  }

  LKA_DEVICE void load(Weights& weights, int c0) const {
    const auto* up = static_cast<const uint16_t*>(p.up_weight) + 2 * pair_;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint16_t* row = up + int64_t(c0 + channel_of_column(group_, j)) * p.rank;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights.columns[j][half] =
            2 * pair_ + 8 * half < p.rank
                ? load_global(reinterpret_cast<const uint32_t*>(row + 8 * half))
                : 0;
    }
    const Vector16 bias = load_vector_if(p.up_bias != nullptr,
                                         static_cast<const uint16_t*>(p.up_bias) + c0 + 8 * pair_);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weights.bias[j][0] = widen<Storage>(uint16_t(bias.words[j]));
      weights.bias[j][1] = widen<Storage>(uint16_t(bias.words[j] >> 16));
    }
  }

  LKA_DEVICE void add_product(const TokenFragment& residual, const Weights& weights,
                              const Place& place) const {
    uint32_t e[4];
    load_matrices_transposed(e, this->rank_tile_ +
                                    (this->lane_ / 16 * 8 + this->lane_ % 8) * this->token_pitch_ +
                                    place.row * TokenFragment::kTokens + this->lane_ / 8 % 2 * 8);
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j][0] = sums[j][2] = weights.bias[j][0];
      sums[j][1] = sums[j][3] = weights.bias[j][1];
      mma_16x8x16<Storage>(sums[j], e, weights.columns[j]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = token(place, half);
      if (t >= tile_.count) continue;
      const Vector16& before = half == 0 ? residual.low : residual.high;
      Vector16 y = before;
      if (p.prefix_mode != PrefixMode::zero || t >= tile_.prefix)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          y.words[j] = narrow_pair<Storage>(
              widen<Storage>(uint16_t(before.words[j])) + p.scale * sums[j][2 * half],
              widen<Storage>(uint16_t(before.words[j] >> 16)) + p.scale * sums[j][2 * half + 1]);
      store_global(reinterpret_cast<Vector16*>(at(p.y, place, half)), y);
    }
  }

  const TokenTile tile_;
  int group_, pair_;
};

}  // namespace lka::cuda
