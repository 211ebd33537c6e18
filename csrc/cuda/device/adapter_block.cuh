// What the blocks of the adapter's kernels that multiply matrices have in common.
#pragma once

#include "activation.cuh"
#include "adapter_params.cuh"
#include "stage_matrix.cuh"
#include "tile_product.cuh"

namespace lka::cuda {

LKA_DEVICE int least(int a, int b) { return a < b ? a : b; }
LKA_DEVICE int clamped(int value, int low, int high) {
  return value < low ? low : value < high ? value : high;
}

template <class Storage>
class AdapterBlock {
 protected:
  using Element = typename Stored<Storage>::Type;
  using Tensor = Operand<Element>;
  // Of 16 tokens and of 8 channels that a warp has at once.
  static constexpr int kRowTiles = 2, kColumnTiles = 4;

  LKA_DEVICE AdapterBlock(const AdapterParams& params, char* memory) : p(params), shared_(memory) {
    warps_ = blockDim.x / 32;
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    channel_pitch_ = pitch_for<Element>(p.block_c);
    token_pitch_ = pitch_for<Element>(p.tiling.slots);
    rank_pitch_ = pitch_for<Element>(p.rank_rows);
    rank_tile_ = reinterpret_cast<Element*>(shared_ + p.at_rank);
  }

  LKA_DEVICE Element* stage(int buffer, int at) const {
    return reinterpret_cast<Element*>(shared_ + p.at_stages + buffer * p.stage_bytes + at);
  }

  // Begins the copies of the first steps.
  template <class Stage>
  LKA_DEVICE void begin_steps(int steps, Stage stage_step) const {
    for (int i = 0; i < p.stages - 1; ++i) {
      if (i < steps) stage_step(i, i);
      cp_async_commit();  // an empty group too, as groups are counted
    }
  }

  // Calls work(step, buffer) with the copies p.stages - 1 steps ahead. Other threads may still be
  // at work when this returns.
  template <class Stage, class Work>
  LKA_DEVICE void run_steps(int steps, Stage stage_step, Work work) const {
    int buffer = 0;
    for (int s = 0; s < steps; ++s) {
      if (p.stages == 3)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();
      if (s + p.stages - 1 < steps)
        stage_step(s + p.stages - 1, buffer == 0 ? p.stages - 1 : buffer - 1);
      cp_async_commit();
      work(s, buffer);
      buffer = buffer == p.stages - 1 ? 0 : buffer + 1;
    }
  }

  // Channels c0 to c0 + p.block_c of the first `count` tokens of a tile.
  LKA_DEVICE MatrixView<Element> matrix_of(const TokenTensor& tensor, const TokenTile& tile,
                                           int count, int c0) const {
    auto* data = static_cast<Element*>(tensor.data) + tile.image * tensor.stride_b +
                 tile.t0 * tensor.stride_t + c0 * tensor.stride_c;
    const int channels = least(p.block_c, p.channels - c0);
    if (tensor.turned)
      return {data, tensor.stride_c, tensor.stride_t, channels, count, tensor.vector};
    return {data, tensor.stride_t, tensor.stride_c, count, channels, tensor.vector};
  }

  static LKA_DEVICE MatrixView<const Element> read_only(const MatrixView<Element>& view) {
    return {view.data, view.row_stride, view.column_stride, view.rows, view.columns, view.vector};
  }

  LKA_DEVICE void stage_tokens(const TokenTensor& tensor, const TokenTile& tile, int count, int c0,
                               Element* to) const {
    const auto from = read_only(matrix_of(tensor, tile, count, c0));
    if (tensor.turned)
      stage_matrix(from, p.block_c, p.tiling.slots, to, token_pitch_);
    else
      stage_matrix(from, p.tiling.slots, p.block_c, to, channel_pitch_);
  }

  LKA_DEVICE void store_tokens(const TokenTensor& tensor, const TokenTile& tile, int c0,
                               const Element* from) const {
    store_matrix(from, tensor.turned ? token_pitch_ : channel_pitch_,
                 matrix_of(tensor, tile, tile.count, c0));
  }

  // A staged tile as an operand with a sum over channels, or over tokens.
  LKA_DEVICE Tensor over_channels(const TokenTensor& tensor, const Element* tile) const {
    return {tile, tensor.turned ? token_pitch_ : channel_pitch_, tensor.turned};
  }
  LKA_DEVICE Tensor over_tokens(const TokenTensor& tensor, const Element* tile) const {
    return {tile, tensor.turned ? token_pitch_ : channel_pitch_, !tensor.turned};
  }

  LKA_DEVICE void stage_down_weight(int c0, Element* to) const {
    const auto* data = static_cast<const Element*>(p.down_weight) + c0;
    stage_matrix<Element>(
        {data, p.channels, 1, p.rank, least(p.block_c, p.channels - c0), p.down_vector},
        p.rank_rows, p.block_c, to, channel_pitch_);
  }

  LKA_DEVICE void stage_up_weight(int c0, Element* to) const {
    const auto* data = static_cast<const Element*>(p.up_weight) + int64_t(c0) * p.rank;
    stage_matrix<Element>({data, p.rank, 1, least(p.block_c, p.channels - c0), p.rank, p.up_vector},
                          p.block_c, p.rank_rows, to, rank_pitch_);
  }

  // The tokens of a tile in a rank-r tensor.
  LKA_DEVICE MatrixView<Element> rank_matrix(void* tensor, const TokenTile& tile) const {
    auto* data = static_cast<Element*>(tensor) + tile.image * p.rank * p.tokens + tile.t0;
    return {data, p.tokens, 1, p.rank, tile.count, p.rank_vector};
  }

  // The part of a tile's sums [token][rank] that this warp has.
  LKA_DEVICE int first_token() const {
    return warp_ / p.tiling.warps_r % p.tiling.warps_t * 16 * p.tiling.row_tiles;
  }
  LKA_DEVICE int first_rank() const { return warp_ % p.tiling.warps_r * 8 * kColumnTiles; }
  LKA_DEVICE int rank_tiles_from(int rank, int end) const {
    return clamped((end - rank + 7) / 8, 0, kColumnTiles);
  }
  using RankSums = float[kRowTiles][kColumnTiles][4];

  // sums += rows (token, channel) · weight (rank, channel).
  LKA_DEVICE void multiply_channels(RankSums& sums, const Tensor& rows, const Tensor& weight) {
    const int columns = rank_tiles_from(first_rank(), p.rank);
    const int share = (p.block_c / p.tiling.warps_k + 15) / 16 * 16,
              first = share_of_terms() * share;
    const int terms = least(share, p.block_c - first);
    if (columns > 0 && terms > 0)
      multiply_tiles<Storage>(sums, rows.from(first_token(), first),
                              weight.from(first_rank(), first), terms, p.tiling.row_tiles, columns);
  }

  // Adds up what warps with the same sums have, in their order, for the first of them. `memory` is
  // free, and has room for their sums.
  LKA_DEVICE void join_sums(RankSums& sums, char* memory) const {
    if (p.tiling.warps_k == 1) return;
    const int same = warps_ / p.tiling.warps_k;
    auto* parts = reinterpret_cast<float*>(memory) + warp_ % same * 32 + lane_;
    const int step = 32 * same;
    for_each_part(sums, share_of_terms() > 0, [&](float& sum, int i) {
      store_shared(parts + (i + (share_of_terms() - 1) * kSums) * step, sum);
    });
    __syncthreads();
    // All sums of one part after the other: their loads are under way together. One sum after
    // the other, unrolled, was 4 of the kernel's 10 thousand instructions.
#pragma unroll 1
    for (int part = 0; part < p.tiling.warps_k - 1; ++part)
      for_each_part(sums, share_of_terms() == 0, [&](float& sum, int i) {
        sum += load_shared(parts + (i + part * kSums) * step);
      });
    __syncthreads();
  }

  // Calls f(token, rank, sum) for all that this warp has, joined.
  template <class F>
  LKA_DEVICE void for_each_sum(const RankSums& sums, F f) const {
    if (share_of_terms() > 0) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r >= p.tiling.row_tiles) continue;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int rank = first_rank() + 8 * c + column_of_sum(i);
          if (rank < p.rank) f(first_token() + 16 * r + row_of_sum(i), rank, sums[r][c][i]);
        }
    }
  }

  // Calls f(token, rank, dropout factor) for the tokens of a tile.
  template <class F>
  LKA_DEVICE void for_each_of_rank(const TokenTile& tile, F f) const {
    const int slots = p.tiling.slots;
    // Four neighbouring channels of a token share a counter where four divides the rank.
    for (int i = threadIdx.x; i < (p.rank + 3) / 4 * slots; i += blockDim.x) {
      const int token = i & (slots - 1), first = i / slots * 4;
      if (token >= tile.count) continue;
      DropoutStream factors(p.dropout, (tile.image * p.tokens + tile.t0 + token) * p.rank + first);
      const int end = least(first + 4, p.rank);
      for (int rank = first; rank < end; ++rank) f(token, rank, factors.next());
    }
  }

  // Partial sums of the projections' gradients, of a channel or of a channel of the rank, of
  // `group`.
  LKA_DEVICE float* up_partial(int64_t group, int channel) const {
    return p.up_partials + (group * p.channels + channel) * (p.rank + 1);
  }
  LKA_DEVICE float* down_partial(int64_t group, int rank) const {
    return p.down_partials + (group * p.rank + rank) * (p.channels + 1);
  }

  LKA_DEVICE void clear_rank_tile() const {
    auto* vectors = reinterpret_cast<Vector16*>(rank_tile_);
    const int count = p.rank_rows * token_pitch_ * int(sizeof(Element)) / 16;
    for (int i = threadIdx.x; i < count; i += blockDim.x) store_shared(vectors + i, Vector16{});
  }

  // tile (token, channel) = finish(rank tile · weight) + what the tile has if `add`.
  template <class Finish>
  LKA_DEVICE void expand(const TokenTile& tile, const Tensor& weight, int c0, Element* to,
                         bool turned, bool add, Finish finish) const {
    const Tensor rank = {rank_tile_, token_pitch_, true};
    const int row_tiles = (tile.count + 15) / 16;
    const int channels = least(p.block_c, (p.channels - c0 + 7) / 8 * 8);
    const int units = row_tiles * ((channels + 8 * kColumnTiles - 1) / (8 * kColumnTiles));
    for (int unit = warp_; unit < units; unit += warps_) {
      const int token0 = unit % row_tiles * 16, channel0 = unit / row_tiles * 8 * kColumnTiles;
      const int columns = rank_tiles_from(channel0, channels);
      float sums[1][kColumnTiles][4] = {};
      multiply_tiles<Storage>(sums, rank.from(token0), weight.from(channel0),
                              whole_products<Storage>(p.rank), 1, columns);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        if (c >= columns) continue;
        const int channel = channel0 + 8 * c + column_of_sum(0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = token0 + row_of_sum(2 * half);
          float low = finish(sums[0][c][2 * half], token, c0 + channel);
          float high = finish(sums[0][c][2 * half + 1], token, c0 + channel + 1);
          if (turned) {
            Element* at = to + channel * token_pitch_ + token;
            add_to(at, low, add);
            add_to(at + token_pitch_, high, add);
          } else {
            struct alignas(2 * sizeof(Element)) Pair {
              Element low, high;
            };
            auto* at = reinterpret_cast<Pair*>(to + token * channel_pitch_ + channel);
            if (add) {
              const Pair before = load_shared(at);
              low += Stored<Storage>::value(before.low);
              high += Stored<Storage>::value(before.high);
            }
            store_shared(at, Pair{Stored<Storage>::of(low), Stored<Storage>::of(high)});
          }
        }
      }
    }
  }

  // Partial sums (channel, rank) += factor · Σ tokens rows·rank tile, `ranks` of them; the first
  // tile of a group replaces what is there. at(channel, rank) is the place of a sum.
  template <class At>
  LKA_DEVICE void add_to_partials(const TokenTile& tile, const Tensor& rows, int c0, int ranks,
                                  float factor, bool first, At at) const {
    const Tensor columns = {rank_tile_, token_pitch_, false};
    const int channels = least(p.block_c, p.channels - c0);
    const int row_tiles = (channels + 15) / 16;
    const int units = row_tiles * ((ranks + 8 * kColumnTiles - 1) / (8 * kColumnTiles));
    for (int unit = warp_; unit < units; unit += warps_) {
      const int channel0 = unit % row_tiles * 16, rank0 = unit / row_tiles * 8 * kColumnTiles;
      const int live = rank_tiles_from(rank0, ranks);
      float sums[1][kColumnTiles][4] = {};
      multiply_tiles<Storage>(sums, rows.from(channel0), columns.from(rank0),
                              whole_products<Storage>(tile.count), 1, live);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int channel = channel0 + row_of_sum(i), rank = rank0 + 8 * c + column_of_sum(i);
          if (channel >= channels || rank >= ranks) continue;
          float* to = at(c0 + channel, rank);
          const float sum = sums[0][c][i] * factor;
          store_global(to, first ? sum : load_global(to) + sum);
        }
    }
  }

  const AdapterParams& p;
  char* shared_;
  Element* rank_tile_;  // [rank][token]
  int warps_, warp_, lane_;
  int channel_pitch_, token_pitch_, rank_pitch_;

 private:
  static constexpr int kSums = kRowTiles * kColumnTiles * 4;

  LKA_DEVICE int share_of_terms() const { return warp_ / (p.tiling.warps_r * p.tiling.warps_t); }

  template <class F>
  LKA_DEVICE void for_each_part(RankSums& sums, bool wanted, F f) const {
    if (!wanted) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(sums[r][c][i], (r * kColumnTiles + c) * 4 + i);
  }

  LKA_DEVICE void add_to(Element* at, float value, bool add) const {
    if (add) value += Stored<Storage>::value(load_shared(at));
    store_shared(at, Stored<Storage>::of(value));
  }
};

}  // namespace lka::cuda
