// The projections of the fused adapter backward: the first and the last of three launches.
//
// Up: reads grad_output once, for grad_c and partial sums of the gradients of the up-projection.
// Down: reads x once, for grad_x and partial sums of the gradients of the down-projection. A block
// has a group of tiles and adds to its own partial sums, which are too many for shared memory and
// stay in the second-level cache; for large ranks adapter_weight_gradient.cuh has them. The
// gradient of the up-projection's bias is a row of ones beside the rank-r tile.
#pragma once

#include "adapter_block.cuh"

namespace lka::cuda {

template <class Storage>
class AdapterUpBackwardBlock : AdapterBlock<Storage> {
  using Base = AdapterBlock<Storage>;
  using Base::p;
  using typename Base::Element;
  using typename Base::RankSums;
  using typename Base::Tensor;

 public:
  LKA_DEVICE AdapterUpBackwardBlock(const AdapterParams& params, char* shared)
      : Base(params, shared) {}

  LKA_DEVICE void run() {
    const int64_t first = int64_t(blockIdx.x) * p.tiles_of_group;
    const int64_t all = int64_t(p.batch) * p.tiling.tiles;
    for (int i = 0; i < p.tiles_of_group && first + i < all; ++i) {
      if (i > 0) __syncthreads();
      run_tile(tile_of(p, first + i), i == 0);
    }
  }

 private:
  LKA_DEVICE void run_tile(const TokenTile& tile, bool first) {
    const int steps = (p.channels + p.block_c - 1) / p.block_c;
    // In this mode prefix tokens have tiles of their own.
    const bool no_grad = p.prefix_mode == PrefixMode::zero && tile.prefix > 0;
    const int count = no_grad ? 0 : tile.count;
    const auto stage = [&](int step, int buffer) {
      const int c0 = step * p.block_c;
      this->stage_tokens(p.grad_output, tile, count, c0, this->stage(buffer, 0));
      if (p.grad_c != nullptr) this->stage_up_weight(c0, this->stage(buffer, p.at_weight));
    };
    if (p.e != nullptr) store_e(tile, no_grad);
    if (p.grad_c == nullptr && p.up_partials == nullptr) return;
    this->begin_steps(steps, stage);
    if (p.up_partials != nullptr) activate_c(tile);
    RankSums sums = {};
    this->run_steps(steps, stage, [&](int step, int buffer) {
      const Element* rows = this->stage(buffer, 0);
      if (p.grad_c != nullptr) {
        const Tensor weight = {this->stage(buffer, p.at_weight), this->rank_pitch_, true};
        this->multiply_channels(sums, this->over_channels(p.grad_output, rows), weight);
      }
      if (p.up_partials != nullptr)
        this->add_to_partials(tile, this->over_tokens(p.grad_output, rows), step * p.block_c,
                              p.rank + 1, p.scale, first, [&](int channel, int rank) {
                                return this->up_partial(blockIdx.x, channel) + rank;
                              });
    });
    if (p.grad_c != nullptr) store_grad_c(tile, sums);
  }

  // Calls f(token, rank, dropout(act(c))) for the tokens of a tile.
  template <class F>
  LKA_DEVICE void for_each_e(const TokenTile& tile, F f) const {
    const auto c = this->rank_matrix(p.c, tile);
    this->for_each_of_rank(tile, [&](int token, int rank, float factor) {
      const float value = Stored<Storage>::value(load_global(c.data + rank * c.row_stride + token));
      f(token, rank, Stored<Storage>::of(activate(p.behind, value) * factor));
    });
  }

  // For the launch that has the weight's gradient; zero where grad_output is not to count.
  LKA_DEVICE void store_e(const TokenTile& tile, bool no_grad) const {
    const auto to = this->rank_matrix(p.e, tile);
    for_each_e(tile, [&](int token, int rank, Element e) {
      store_global(to.data + rank * to.row_stride + token, no_grad ? Element() : e);
    });
  }

  // The rank tile gets e and a row of ones.
  LKA_DEVICE void activate_c(const TokenTile& tile) {
    this->clear_rank_tile();
    __syncthreads();
    for_each_e(tile, [&](int token, int rank, Element e) {
      store_shared(this->rank_tile_ + rank * this->token_pitch_ + token, e);
    });
    for (int token = threadIdx.x; token < tile.count; token += blockDim.x)
      store_shared(this->rank_tile_ + p.rank * this->token_pitch_ + token,
                   Stored<Storage>::of(1.0f));
  }

  // Turned in shared memory, where the stages were.
  LKA_DEVICE void store_grad_c(const TokenTile& tile, RankSums& sums) {
    __syncthreads();
    float* turned = reinterpret_cast<float*>(this->shared_ + p.at_stages);
    this->join_sums(sums, this->shared_ + p.at_stages);
    const int pitch = pitch_for<float>(p.tiling.slots);
    this->for_each_sum(sums, [&](int token, int rank, float sum) {
      store_shared(turned + rank * pitch + token, sum * p.scale);
    });
    __syncthreads();
    const auto c = this->rank_matrix(p.c, tile), grad = this->rank_matrix(p.grad_c, tile);
    this->for_each_of_rank(tile, [&](int token, int rank, float factor) {
      float sum = load_shared(turned + rank * pitch + token) * factor;
      const int64_t at = rank * c.row_stride + token;
      if (p.behind != Activation::none)
        sum *= slope(p.behind, Stored<Storage>::value(load_global(c.data + at)));
      store_global(grad.data + at, Stored<Storage>::of(sum));
    });
  }
};

template <class Storage>
class AdapterDownBackwardBlock : AdapterBlock<Storage> {
  using Base = AdapterBlock<Storage>;
  using Base::p;
  using typename Base::Element;
  using typename Base::Tensor;

 public:
  LKA_DEVICE AdapterDownBackwardBlock(const AdapterParams& params, char* shared)
      : Base(params, shared) {}

  LKA_DEVICE void run() {
    const int64_t first = int64_t(blockIdx.x) * p.tiles_of_group;
    const int64_t all = int64_t(p.batch) * p.tiling.tiles;
    for (int i = 0; i < p.tiles_of_group && first + i < all; ++i) {
      if (i > 0) __syncthreads();
      run_tile(tile_of(p, first + i), i == 0);
    }
  }

 private:
  LKA_DEVICE void run_tile(const TokenTile& tile, bool first) {
    const int steps = (p.channels + p.block_c - 1) / p.block_c;
    const bool add = p.residual.data != nullptr, expands = p.grad_x.data != nullptr;
    const bool sums = p.down_partials != nullptr;
    stage_matrix(Base::read_only(this->rank_matrix(p.grad_z, tile)), p.rank_rows, p.tiling.slots,
                 this->rank_tile_, this->token_pitch_);
    // In the group of the first step, if there is one.
    const auto stage = [&](int step, int buffer) {
      const int c0 = step * p.block_c;
      if (sums) this->stage_tokens(p.x, tile, tile.count, c0, this->stage(buffer, 0));
      if (!expands) return;
      this->stage_down_weight(c0, this->stage(buffer, p.at_weight));
      if (add)
        this->stage_tokens(p.residual, tile, tile.count, c0, this->stage(buffer, p.at_added));
    };
    this->begin_steps(steps, stage);
    this->run_steps(steps, stage, [&](int step, int buffer) {
      const int c0 = step * p.block_c;
      if (sums) {
        if (step == 0) add_bias_sums(tile, first);
        const Tensor rows = this->over_tokens(p.x, this->stage(buffer, 0));
        this->add_to_partials(tile, rows, c0, p.rank, 1.0f, first, [&](int channel, int rank) {
          return this->down_partial(blockIdx.x, rank) + channel;
        });
      }
      if (!expands) return;
      const Tensor weight = {this->stage(buffer, p.at_weight), this->channel_pitch_, true};
      Element* to = this->stage(buffer, p.at_added);
      this->expand(tile, weight, c0, to, p.grad_x.turned, add,
                   [](float sum, int, int) { return sum; });
      __syncthreads();
      this->store_tokens(p.grad_x, tile, c0, to);
    });
  }

  // Of the bias: a warp has a channel of the rank.
  LKA_DEVICE void add_bias_sums(const TokenTile& tile, bool first) {
    for (int rank = this->warp_; rank < p.rank; rank += this->warps_) {
      float sum = 0;
      for (int token = this->lane_; token < tile.count; token += 32)
        sum += Stored<Storage>::value(
            load_shared(this->rank_tile_ + rank * this->token_pitch_ + token));
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
      float* to = this->down_partial(blockIdx.x, rank) + p.channels;
      if (this->lane_ == 0) store_global(to, first ? sum : load_global(to) + sum);
    }
  }
};

}  // namespace lka::cuda
