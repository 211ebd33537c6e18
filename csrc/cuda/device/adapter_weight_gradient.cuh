// The gradients of the adapter's projections, where the rank is so large that partial sums of every
// tile would cost more than to read the tokens again.
//
// A block has p.block_c channels, all of the rank and a group of steps of p.tiling.slots tokens of
// one image; its sums stay in registers. Of the up-projection (p.of_up) rows are grad_output and
// columns e = dropout(act(c)), of the down-projection x and grad_z.
#pragma once

#include "adapter_block.cuh"

namespace lka::cuda {

template <class Storage>
class AdapterWeightGradientBlock : AdapterBlock<Storage> {
  using Base = AdapterBlock<Storage>;
  using Base::kColumnTiles;
  using Base::p;
  using typename Base::Element;
  using typename Base::Tensor;

 public:
  static constexpr int kChannels = 64;
  static constexpr int kRowTiles = kChannels / 16;

  LKA_DEVICE AdapterWeightGradientBlock(const AdapterParams& params, char* shared)
      : Base(params, shared) {
    const int blocks = (p.channels + p.block_c - 1) / p.block_c;
    c0_ = int(blockIdx.x % blocks) * p.block_c;
    group_ = blockIdx.x / blocks;
    image_steps_ = (p.tokens + p.tiling.slots - 1) / p.tiling.slots;
    row_tiles_ = kRowTiles / (this->warps_ / p.tiling.warps_r);
    channel0_ = this->warp_ / p.tiling.warps_r * 16 * row_tiles_;
  }

  LKA_DEVICE void run() {
    const TokenTensor& rows = p.of_up ? p.grad_output : p.x;
    void* const columns = p.of_up ? p.e : p.grad_z;
    const int64_t first = group_ * p.tiles_of_group, all = int64_t(p.batch) * image_steps_;
    const int steps = int(first + p.tiles_of_group < all ? p.tiles_of_group : all - first);
    const auto stage = [&](int step, int buffer) {
      const TokenTile tile = tokens_of(first + step);
      this->stage_tokens(rows, tile, tile.count, c0_, this->stage(buffer, 0));
      stage_matrix(Base::read_only(this->rank_matrix(columns, tile)), p.rank_rows, p.tiling.slots,
                   this->stage(buffer, p.at_weight), this->token_pitch_);
    };
    const int live = this->rank_tiles_from(this->first_rank(), p.rank);
    float sums[kRowTiles][kColumnTiles][4] = {};
    float bias = 0;
    this->begin_steps(steps, stage);
    this->run_steps(steps, stage, [&](int step, int buffer) {
      const TokenTile tile = tokens_of(first + step);
      const Element* staged = this->stage(buffer, 0);
      const Tensor ranks = {this->stage(buffer, p.at_weight), this->token_pitch_, false};
      if (live > 0)
        multiply_tiles<Storage>(sums, this->over_tokens(rows, staged).from(channel0_),
                                ranks.from(this->first_rank()), whole_products<Storage>(tile.count),
                                row_tiles_, live);
      bias += p.of_up ? sum_of_row(this->over_tokens(rows, staged), p.block_c, tile)
                      : sum_of_row(ranks, p.rank, tile);
    });
    store(sums, bias);
  }

 private:
  LKA_DEVICE TokenTile tokens_of(int64_t step) const {
    TokenTile tile = {};
    tile.image = step / image_steps_;
    tile.t0 = int(step - tile.image * image_steps_) * p.tiling.slots;
    tile.count = least(p.tiling.slots, p.tokens - tile.t0);
    return tile;
  }

  // A thread has a row, for the bias. In the one mode, prefix tokens have no gradient; their e is
  // zero for the weight.
  LKA_DEVICE float sum_of_row(const Tensor& rows, int count, const TokenTile& tile) const {
    float sum = 0;
    if (int(threadIdx.x) >= count || (!p.of_up && c0_ > 0)) return sum;
    const int from = p.prefix_mode == PrefixMode::zero ? p.prefix - tile.t0 : 0;
    for (int token = from > 0 ? from : 0; token < tile.count; ++token)
      sum += Stored<Storage>::value(load_shared(rows.from(threadIdx.x, token).data));
    return sum;
  }

  LKA_DEVICE void store(const float (&sums)[kRowTiles][kColumnTiles][4], float bias) const {
    const int i = threadIdx.x;
    if (p.of_up && i < p.block_c && c0_ + i < p.channels)
      store_global(this->up_partial(group_, c0_ + i) + p.rank, bias * p.scale);
    if (!p.of_up && c0_ == 0 && i < p.rank)
      store_global(this->down_partial(group_, i) + p.channels, bias);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r >= row_tiles_) break;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int channel = channel0_ + 16 * r + row_of_sum(j);
          const int rank = this->first_rank() + 8 * c + column_of_sum(j);
          if (channel >= p.block_c || c0_ + channel >= p.channels || rank >= p.rank) continue;
          if (p.of_up)
            store_global(this->up_partial(group_, c0_ + channel) + rank, sums[r][c][j] * p.scale);
          else
            store_global(this->down_partial(group_, rank) + c0_ + channel, sums[r][c][j]);
        }
    }
  }

  int64_t group_;
  int c0_, image_steps_, row_tiles_, channel0_;
};

}  // namespace lka::cuda
