// How rows of outputs are divided into tiles: what planner and kernels must agree on. Functions are
// static, so that every instruction set has a copy of its own.
#pragma once

#include <cstdint>

namespace lka::cpu {

// Neighbouring outputs of a tile. Maps of networks are multiples of 7.
constexpr int kRowTileColumns = 7;
// Of wide vectors some tiles in place have more.
constexpr int kWideTileColumns = 14;
// An output by itself takes as long as so many of a tile.
constexpr int64_t kSingleOutput = 3;

// Whether one of `count` outputs is left over by tiles of `columns`: it is computed by itself.
// Otherwise the last tile overlaps the one before.
static inline bool one_is_left(int64_t count, int64_t columns) {
  return count > columns && count % columns == 1;
}

// So many outputs of tiles take as long as `count` in tiles of `columns`.
static inline int64_t tiled_outputs(int64_t count, int64_t columns) {
  if (one_is_left(count, columns)) return count - 1 + kSingleOutput;
  return (count + columns - 1) / columns * columns;
}

static inline bool wide_tiles_fit(int64_t count) {
  return tiled_outputs(count, kWideTileColumns) <= tiled_outputs(count, kRowTileColumns);
}

}  // namespace lka::cpu
