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

// Terms of a run of a tile in place (see rows_of_run): of 9 or 11 rows a second run took 7 % of the
// time, for the last row or two.
constexpr int64_t kTermsPerTileRun = 128;

// Whether one of `count` outputs is left over by tiles of `columns`: it is computed by itself.
// Otherwise the last tile overlaps the one before.
static inline bool one_is_left(int64_t count, int64_t columns) {
  return count > columns && count % columns == 1;
}

// So many outputs in whole tiles take as long as `count` in tiles of `columns`.
static inline int64_t tiled_outputs(int64_t count, int64_t columns) {
  if (one_is_left(count, columns)) return count - 1 + kSingleOutput;
  return (count + columns - 1) / columns * columns;
}

static inline bool wide_tiles_fit(int64_t count) {
  return tiled_outputs(count, kWideTileColumns) <= tiled_outputs(count, kRowTileColumns);
}

// Rows of so many taps in a run of a tile in place. Of a narrow output all are. With more there is
// a kind of tile that sums in runs, of which no output is left over.
static inline int64_t rows_of_tile_run(int64_t taps, bool narrow) {
  return narrow ? INT64_MAX / 2 : kTermsPerTileRun / taps + 1;
}

}  // namespace lka::cpu
