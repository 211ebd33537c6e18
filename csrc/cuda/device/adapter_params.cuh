// What the kernels of the fused adapter are told, and which tokens a block takes.
//
// x, y and their gradients are (B, T, C) in any strides, with T tokens an image: prefix tokens
// first, then the grid row by row. The rank-r tensors z, c and their gradients are channel-major,
// (B, r, T) and dense: a tap of the convolution then reads neighbouring tokens from neighbouring
// addresses.
#pragma once

#include "../../adapter_params.h"
#include "philox.cuh"

namespace lka::cuda {

// A tensor (B, T, C).
struct TokenTensor {
  void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_c = 0;
  int32_t vector = 1;   // neighbours in one access, whatever the tile
  bool turned = false;  // neighbours are tokens, and tiles in shared memory [channel][token]
};

// A tile has whole rows of the grid of one image, or part of one row, and tokens that follow one
// another. Prefix tokens are in the first tile where they fit, or in tiles of their own.
struct AdapterTiling {
  int32_t rows = 0, columns = 0;  // of the grid in a tile
  int32_t x_tiles = 0;            // in a row of tiles
  int32_t prefix_tiles = 0;
  bool prefix_in_first = false;
  int32_t tiles = 0;  // of an image
  int32_t slots = 0;  // tokens that a tile has room for, a power of two from 16 on
  // Warps of a block: along the rank, 32 channels each; along the tokens, row_tiles (1 or 2) of 16
  // each; and with the same sums of other terms.
  int32_t warps_r = 1, warps_t = 1, warps_k = 1;
  int32_t row_tiles = 1;
};

// A depthwise correlation of rank-r tensors: see CorrelateParams. Taps are those that can touch.
struct AdapterConvolution {
  int64_t weight_stride_c = 0;
  int32_t first_tap = 0, tap_stride_y = 0, tap_stride_x = 0;  // negative strides: taps reversed
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;

  int32_t staged_channels = 0;  // at a time in shared memory
  int32_t staged_taps = 0;      // kernel rows at a time, all unless one channel needs the room
  int32_t staged_rows = 0;      // of the source for those
  int32_t pitch = 0;            // floats of a staged row
  int32_t taps_pitch = 0;       // floats of a kernel row
};

// The gradient of the convolution's taps: a block has one channel, tap_pairs × tap_chunks of eight
// taps of two kernel rows each, and a group of pieces (rows × columns of the grid of an image).
struct AdapterTapGradient {
  int32_t batch = 0, channels = 0;
  int32_t kernel_h = 0, kernel_w = 0;  // of the taps that can touch
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t top = 0, left = 0;
  int32_t first_h = 0, first_w = 0, full_h = 0, full_w = 0;  // the first of them, and of all taps
  int32_t tap_pairs = 0, tap_chunks = 0;
  int32_t tiles_h = 0, tiles_w = 0;  // of taps
  int32_t rows = 0, columns = 0;     // of the grid in a piece
  int32_t strip_rows = 0;            // that a thread goes down
  int32_t y_pieces = 0, x_pieces = 0;
  int32_t staged_rows = 0, source_pitch = 0, grad_pitch = 0;
  int32_t groups = 0;
  int64_t pieces_of_group = 0;
};

struct AdapterParams {
  int32_t batch = 0, tokens = 0, channels = 0, rank = 0;
  int32_t prefix = 0, height = 0, width = 0;
  PrefixMode prefix_mode = PrefixMode::center_tap;
  int32_t center = -1;  // the tap, ky·kW + kx, that prefix tokens meet; -1: none
  Activation before = Activation::none, behind = Activation::none;  // the convolution
  float scale = 1;
  DropoutParams dropout;

  // Weights are dense: (r, C), (r), (r, 1, kH, kW), (r), (C, r), (C). Biases may be null.
  const void *down_weight = nullptr, *down_bias = nullptr;
  const void *conv_weight = nullptr, *conv_bias = nullptr;
  const void *up_weight = nullptr, *up_bias = nullptr;
  int32_t down_vector = 1, up_vector = 1;  // as of TokenTensor, of the projections' weights

  TokenTensor x, y, grad_output, grad_x;
  // Added to y, or where x was its own residual grad_output, added to grad_x; data may be null.
  // Turned as what it is added to.
  TokenTensor residual;
  void *z = nullptr, *a = nullptr, *c = nullptr;  // a = act(z); z itself without an activation
  void *grad_c = nullptr, *grad_z = nullptr;
  void* e = nullptr;   // what the up-projection multiplied; kept for a launch of its own
  bool of_up = false;  // of AdapterWeightGradientBlock
  // Of each group of blocks, null where no gradient is asked for: (C, r + 1) of the up-projection,
  // (r, kH·kW + 1) of the convolution and (r, C + 1) of the down-projection, the bias being last.
  float *up_partials = nullptr, *conv_partials = nullptr, *down_partials = nullptr;

  // Where a kernel for the tensor cores convolves the grid, in a launch of its own: c or grad_z
  // then has its sums, and prefix tokens, slope and bias are left to do. Backward, a is filled if
  // it is not null.
  bool convolved = false;
  AdapterTiling tiling;
  AdapterConvolution convolution;
  AdapterTapGradient taps;

  // Of one kernel.
  int32_t block_c = 0;      // channels of a step, a multiple of 16
  int32_t stages = 2;       // steps in shared memory
  int32_t rank_rows = 0;    // rank, rounded up to whole products
  int32_t rank_vector = 1;  // as of TokenTensor, of the rank-r tensors
  int32_t splits = 1;       // of the channels, one for a block
  int32_t groups = 0, tiles_of_group = 0;
  int64_t first_weight_block = 0;              // of a launch with two kinds of blocks
  int32_t channel_warps = 1, token_warps = 1;  // of a block of adapter_narrow_*.cuh
  // Offsets in shared memory, in bytes.
  int32_t at_rank = 0, at_stages = 0, at_source = 0, at_taps = 0;
  int32_t stage_bytes = 0, at_weight = 0, at_added = 0;  // of a stage, and in it
};

// The tokens of a block: `count` from t0, of which `prefix` and then rows × columns of the grid.
struct TokenTile {
  int64_t image;
  int t0, count, prefix;
  int y0, x0, rows, columns;
};

LKA_DEVICE TokenTile tile_of(const AdapterParams& p, int64_t index) {
  const AdapterTiling& tiling = p.tiling;
  TokenTile tile = {};
  tile.image = index / tiling.tiles;
  int i = int(index - tile.image * tiling.tiles);
  if (i < tiling.prefix_tiles) {
    tile.t0 = i * tiling.slots;
    const int left = p.prefix - tile.t0;
    tile.count = tile.prefix = left < tiling.slots ? left : tiling.slots;
    return tile;
  }
  i -= tiling.prefix_tiles;
  const int row = i / tiling.x_tiles;
  tile.y0 = row * tiling.rows;
  tile.x0 = (i - row * tiling.x_tiles) * tiling.columns;
  tile.rows = p.height - tile.y0 < tiling.rows ? p.height - tile.y0 : tiling.rows;
  tile.columns = p.width - tile.x0 < tiling.columns ? p.width - tile.x0 : tiling.columns;
  tile.t0 = p.prefix + tile.y0 * p.width + tile.x0;
  tile.count = tile.rows * tile.columns;
  if (i == 0 && tiling.prefix_in_first) {
    tile.t0 = 0;
    tile.prefix = p.prefix;
    tile.count += p.prefix;
  }
  return tile;
}

}  // namespace lka::cuda
