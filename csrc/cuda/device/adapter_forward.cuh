// The fused adapter forward, in two launches.
//
// Down: z = x·Wdᵀ + bd and a = act(z), if an activation comes here: its halo would be activated
// many times otherwise. A block has a tile of tokens and goes over the channels of x, which is read
// once. Up: the convolution of a tile's own tokens (a and its halo come from the second-level
// cache), activation, dropout, and y = residual + scale·(e·Wuᵀ + bu) channel block by channel
// block: the residual is staged ahead, and y takes its place on the way out.
#pragma once

#include "adapter_convolve.cuh"

namespace lka::cuda {

template <class Storage>
class AdapterDownBlock : AdapterBlock<Storage> {
  using Base = AdapterBlock<Storage>;
  using Base::p;
  using typename Base::Element;
  using typename Base::RankSums;
  using typename Base::Tensor;

 public:
  LKA_DEVICE AdapterDownBlock(const AdapterParams& params, char* shared) : Base(params, shared) {}

  LKA_DEVICE void run() {
    const TokenTile tile = tile_of(p, blockIdx.x);
    const int steps = (p.channels + p.block_c - 1) / p.block_c;
    const auto stage = [&](int step, int buffer) {
      this->stage_tokens(p.x, tile, tile.count, step * p.block_c, this->stage(buffer, 0));
      this->stage_down_weight(step * p.block_c, this->stage(buffer, p.at_weight));
    };
    RankSums sums = {};
    this->begin_steps(steps, stage);
    this->run_steps(steps, stage, [&](int, int buffer) {
      const Tensor weight = {this->stage(buffer, p.at_weight), this->channel_pitch_, false};
      this->multiply_channels(sums, this->over_channels(p.x, this->stage(buffer, 0)), weight);
    });
    // Turned in shared memory, where the stages were.
    __syncthreads();
    Element* to = this->stage(0, 0);
    this->join_sums(sums, reinterpret_cast<char*>(to));
    const auto* bias = static_cast<const Element*>(p.down_bias);
    this->for_each_sum(sums, [&](int token, int rank, float sum) {
      if (bias != nullptr) sum += Stored<Storage>::value(load_global(bias + rank));
      store_shared(to + rank * this->token_pitch_ + token, Stored<Storage>::of(sum));
    });
    __syncthreads();
    store_matrix(to, this->token_pitch_, this->rank_matrix(p.z, tile));
    if (p.before == Activation::none) return;
    __syncthreads();
    // Of z as it is stored, so that backward sees the same argument.
    for (int rank = this->warp_; rank < p.rank; rank += this->warps_)
      for (int token = this->lane_; token < tile.count; token += 32) {
        Element* at = to + rank * this->token_pitch_ + token;
        const float z = Stored<Storage>::value(load_shared(at));
        store_shared(at, Stored<Storage>::of(activate(p.before, z)));
      }
    __syncthreads();
    store_matrix(to, this->token_pitch_, this->rank_matrix(p.a, tile));
  }
};

// The convolution of a tile's own tokens, which stay in shared memory.
template <class Storage>
class AdapterTile : protected AdapterBlock<Storage> {
  using Base = AdapterBlock<Storage>;

 protected:
  using Base::p;
  using typename Base::Element;

  LKA_DEVICE AdapterTile(const AdapterParams& params, char* shared) : Base(params, shared) {}

  // What the correlation has left of c. Nobody has written its prefix tokens yet: they are left to
  // run_prefix, but for the rows of zeros below the rank, which are factors too.
  LKA_DEVICE void stage_grid_of_c(const TokenTile& tile) const {
    auto grid = Base::read_only(this->rank_matrix(p.c, tile));
    grid.data += tile.prefix;
    grid.columns -= tile.prefix;
    stage_matrix(grid, p.rank_rows, p.tiling.slots - tile.prefix, this->rank_tile_ + tile.prefix,
                 this->token_pitch_);
    const int end = p.rank_rows * tile.prefix;
    for (int i = p.rank * tile.prefix + threadIdx.x; i < end; i += blockDim.x)
      store_shared(this->rank_tile_ + i / tile.prefix * this->token_pitch_ + i % tile.prefix,
                   Element());
  }

  // Leaves dropout(act(c)) in the rank tile; c is kept for backward, which sees it as it is stored.
  // `later` groups of copies have begun since stage_grid_of_c.
  LKA_DEVICE void convolve(const TokenTile& tile, bool keep, int later) {
    const auto* bias = static_cast<const Element*>(p.conv_bias);
    const auto emit = [&](int channel, int token, float sum) {
      const bool biased = token >= tile.prefix || p.prefix_mode == PrefixMode::center_tap;
      if (bias != nullptr && biased) sum += Stored<Storage>::value(load_global(bias + channel));
      store_shared(this->rank_tile_ + channel * this->token_pitch_ + token,
                   Stored<Storage>::of(sum));
    };
    TileConvolution<Storage> convolution(p, p.a, this->shared_);
    auto kept = this->rank_matrix(p.c, tile);
    if (p.convolved) {
      if (later == 2)
        cp_async_wait<2>();
      else if (later == 1)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();
      convolution.run_prefix(tile, 0, p.rank, emit);
      kept.columns = tile.prefix;
    } else {
      this->clear_rank_tile();
      __syncthreads();
      convolution.run(tile, 0, p.rank, emit);
    }
    __syncthreads();
    if (keep) {
      store_matrix(this->rank_tile_, this->token_pitch_, kept);
      __syncthreads();
    }
    if (p.behind == Activation::none && p.dropout.seed == nullptr) return;
    this->for_each_of_rank(tile, [&](int token, int rank, float factor) {
      Element* at = this->rank_tile_ + rank * this->token_pitch_ + token;
      const float c = Stored<Storage>::value(load_shared(at));
      store_shared(at, Stored<Storage>::of(activate(p.behind, c) * factor));
    });
  }
};

template <class Storage>
class AdapterUpBlock : AdapterTile<Storage> {
  using Base = AdapterTile<Storage>;
  using Base::p;
  using typename Base::Element;
  using typename Base::Tensor;

 public:
  LKA_DEVICE AdapterUpBlock(const AdapterParams& params, char* shared) : Base(params, shared) {}

  LKA_DEVICE void run() {
    const int split = int(blockIdx.x % p.splits);
    const TokenTile tile = tile_of(p, blockIdx.x / p.splits);
    const int all = (p.channels + p.block_c - 1) / p.block_c;
    const int first = int(int64_t(all) * split / p.splits);
    const int steps = int(int64_t(all) * (split + 1) / p.splits) - first;
    const bool add = p.residual.data != nullptr;
    const auto stage = [&](int step, int buffer) {
      const int c0 = (first + step) * p.block_c;
      if (add) this->stage_tokens(p.residual, tile, tile.count, c0, this->stage(buffer, 0));
      this->stage_up_weight(c0, this->stage(buffer, p.at_weight));
    };
    // Ahead of the steps' copies: what comes behind them need not be waited for.
    if (p.convolved) {
      this->stage_grid_of_c(tile);
      cp_async_commit();
    }
    this->begin_steps(steps, stage);
    this->convolve(tile, split == 0, p.stages - 1);
    const auto* bias = static_cast<const Element*>(p.up_bias);
    this->run_steps(steps, stage, [&](int step, int buffer) {
      const int c0 = (first + step) * p.block_c;
      const Tensor weight = {this->stage(buffer, p.at_weight), this->rank_pitch_, false};
      Element* to = this->stage(buffer, 0);
      this->expand(tile, weight, c0, to, p.residual.turned, add,
                   [&](float sum, int token, int channel) {
                     if (p.prefix_mode == PrefixMode::zero && token < tile.prefix) return 0.0f;
                     if (bias != nullptr && channel < p.channels)
                       sum += Stored<Storage>::value(load_global(bias + channel));
                     return sum * p.scale;
                   });
      __syncthreads();
      this->store_tokens(p.y, tile, c0, to);
    });
  }
};

}  // namespace lka::cuda
