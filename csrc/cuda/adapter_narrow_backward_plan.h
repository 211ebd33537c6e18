// The launches of adapter_narrow_backward.cuh, as adapter_plan.h has those of the other kernels.
#pragma once

#include "adapter_call.h"
#include "device/adapter_narrow_backward.cuh"

namespace lka::cuda::detail {

// Places are computed in 32 bits.
inline bool has_small_places(const TokenTensor& t, const AdapterParams& p) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const auto extent = [](int64_t size, int64_t stride) { return (size - 1) * stride; };
  return t.data == nullptr ||
         extent(p.batch, t.stride_b) + extent(p.tokens, t.stride_t) + p.channels < kMost;
}

// What both launches ask beside is_narrow: no tile in more than two images.
inline bool has_narrow_sequence(const AdapterParams& p) {
  return p.tokens >= TokenFragment::kTokens && int64_t(p.batch) * p.rank * p.tokens < int64_t(1)
                                                                                          << 31;
}

// Rows of warps and their runs of tiles: blocks for the whole device before rows in a block, two
// blocks on a multiprocessor where a row lets them, each of which leaves partial sums.
inline void share_narrow_tiles(AdapterParams& p, int64_t multiprocessors, int64_t resident_warps) {
  const int64_t tiles = ceil_div(int64_t(p.batch) * p.tokens, TokenFragment::kTokens);
  const int64_t shared_by = p.channel_warps <= resident_warps / 2 ? 2 : 1;
  const int64_t blocks = std::max<int64_t>(1, shared_by * multiprocessors / p.splits);
  const int64_t most = resident_warps / shared_by / p.channel_warps;
  p.token_warps = int32_t(std::clamp<int64_t>(tiles / blocks, 1, most));
  p.tiles_of_group = int32_t(ceil_div(tiles, blocks * p.token_warps));
  p.groups = int32_t(ceil_div(tiles, int64_t(p.tiles_of_group) * p.token_warps));
}

// Tokens of a rank-r tensor in one access: two, which then are of one image, or one.
inline int32_t narrow_rank_vector(const AdapterParams& p,
                                  std::initializer_list<const void*> tensors) {
  constexpr int64_t kElement = 2;
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const void* t) { return widest(kElement, t, {p.tokens}) > 1; })
             ? 2
             : 1;
}

// Calls f with the block of a launch: the number of units that a warp has is the least that a block
// has warps for. False where there is none.
template <class Storage, class F>
bool with_narrow_up_block(const AdapterParams& p, F f) {
  const int units = p.channels / TokenFragment::kChannels;
  const auto fits = [&](auto block) {
    if (units > block.kWarps * block.kUnits) return false;
    f(block);
    return true;
  };
  if (p.rank <= 8)
    return fits(NarrowUpBackward<Storage, 2, 1>()) || fits(NarrowUpBackward<Storage, 4, 1>());
  return fits(NarrowUpBackward<Storage, 2, 2>());
}
template <class Storage, class F>
void with_narrow_down_block(const AdapterParams& p, F f) {
  if (p.rank <= 8)
    f(NarrowDownBackward<Storage, 1>());
  else
    f(NarrowDownBackward<Storage, 2>());
}

// Both leave no blocks where the kernel cannot be.
inline void plan_narrow_up_backward(const AdapterParams& call, int64_t multiprocessors,
                                    AdapterParams& p, LaunchShape& shape) {
  p = call;
  if (!has_narrow_sequence(p) || !has_small_places(p.grad_output, p)) return;
  with_narrow_up_block<BFloat16>(p, [&](auto block) {
    const int64_t units = p.channels / TokenFragment::kChannels;
    p.channel_warps = int32_t(ceil_div(units, block.kUnits));
    share_narrow_tiles(p, multiprocessors, block.kResidentWarps);
    p.rank_vector = narrow_rank_vector(p, {p.c, p.grad_c});
    // In shared memory: the weight; two buffers of parts of grad_c, later what rows of warps have
    // of the gradients; two of e and of its slope.
    const int64_t lane = 32 * int64_t(p.token_warps), pairs = 2 * lane * 2 * block.kTiles;
    const int64_t parts = 2 * lane * p.channel_warps * block.kTiles * 16;
    const int64_t joined = 4 * (lane - 32) * p.channel_warps * block.kSums;
    p.at_weight = 0;
    p.at_stages = int32_t(units * 64 * 16);
    p.at_rank = int32_t(p.at_stages + std::max(parts, joined));
    p.at_added = int32_t(p.at_rank + pairs * 4);
    const bool activates = p.behind != Activation::none || p.dropout.seed != nullptr;
    shape.blocks = p.groups;
    shape.threads = 32 * p.channel_warps * p.token_warps;
    shape.shared_bytes = activates ? p.at_added + pairs * 8 : p.at_rank;
  });
}

inline void plan_narrow_down_backward(const AdapterParams& call, int64_t multiprocessors,
                                      AdapterParams& p, LaunchShape& shape) {
  p = call;
  if (!has_narrow_sequence(p) || !has_small_places(p.x, p) || !has_small_places(p.residual, p) ||
      !has_small_places(p.grad_x, p))
    return;
  with_narrow_down_block<BFloat16>(p, [&](auto block) {
    const int64_t units = p.channels / TokenFragment::kChannels;
    p.splits = int32_t(ceil_div(units, block.kWarps));
    p.channel_warps = int32_t(ceil_div(units, p.splits));
    share_narrow_tiles(p, multiprocessors, block.kResidentWarps);
    p.rank_vector = narrow_rank_vector(p, {p.grad_z});
    shape.blocks = int64_t(p.groups) * p.splits;
    shape.threads = 32 * p.channel_warps * p.token_warps;
    shape.shared_bytes = int64_t(4 * 32) * (p.token_warps - 1) * p.channel_warps * block.kSums;
  });
}

}  // namespace lka::cuda::detail
