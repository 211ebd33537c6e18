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
    group_ = int(blockIdx.x / blocks);
    image_steps_ = (p.tokens + p.tiling.slots - 1) / p.tiling.slots;
    row_tiles_ = kRowTiles / (this->warps_ / p.tiling.warps_r);
    channel0_ = this->warp_ / p.tiling.warps_r * 16 * row_tiles_;
  }

  LKA_DEVICE void run() {
    const TokenTensor& rows = p.of_up ? p.grad_output : p.x;
    void* const columns = p.of_up ? p.e : p.grad_z;
    const int first = group_ * p.tiles_of_group, all = p.batch * image_steps_;
    const int steps = least(p.tiles_of_group, all - first);
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
      const Tensor channels = this->over_tokens(rows, this->stage(buffer, 0));
      const Tensor ranks = {this->stage(buffer, p.at_weight), this->token_pitch_, false};
      if (live > 0)
        multiply_tiles<Storage>(sums, channels.from(channel0_), ranks.from(this->first_rank()),
                                whole_products<Storage>(tile.count), row_tiles_, live);
      if (p.of_up)
        bias += sum_of_row(channels, p.block_c, tile);
      else if (c0_ == 0)
        bias += sum_of_row(ranks, p.rank, tile);
    });
    store(sums, bias);
  }

 private:
  LKA_DEVICE TokenTile tokens_of(int step) const {
    TokenTile tile = {};
    const int image = step / image_steps_;
    tile.image = image;
    tile.t0 = (step - image * image_steps_) * p.tiling.slots;
    tile.count = least(p.tiling.slots, p.tokens - tile.t0);
    return tile;
  }

  // A thread has a row, for the bias. In the one mode, prefix tokens have no gradient; their e is
  // zero for the weight.
  LKA_DEVICE float sum_of_row(const Tensor& rows, int count, const TokenTile& tile) const {
    float sum = 0;
    if (int(threadIdx.x) >= count) return sum;
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
    const int64_t step = p.of_up ? p.rank + 1 : 1;  // of channels in the partial sums
    const int64_t rank_step = p.of_up ? 1 : p.channels + 1;
    const float factor = p.of_up ? p.scale : 1.0f;
    float* const to = p.of_up ? this->up_partial(group_, c0_) : this->down_partial(group_, 0) + c0_;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r >= row_tiles_) continue;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int channel = channel0_ + 16 * r + row_of_sum(j);
          const int rank = this->first_rank() + 8 * c + column_of_sum(j);
          if (channel < p.block_c && c0_ + channel < p.channels && rank < p.rank)
            store_global(to + channel * step + rank * rank_step, sums[r][c][j] * factor);
        }
    }
  }

  int group_, c0_, image_steps_, row_tiles_, channel0_;
};

}  // namespace lka::cuda
