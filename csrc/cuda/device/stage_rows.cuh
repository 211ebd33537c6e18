// Rows of maps into shared memory, one plane for each channel, whatever layout they come in.
#pragma once

#include "../../conv_params.h"
#include "cp_async.cuh"
#include "mma.cuh"

namespace lka::cuda {

// How a map of 16-bit elements is read and written, decided before the launch. Widths are powers
// of two by which base address, strides and what is in a row divide.
struct MapAccess {
  MapView view;
  int32_t row_vector = 0;      // neighbouring columns in one access; 0 where columns are no run
  int32_t channel_vector = 1;  // neighbouring channels in one access, 8 or 1
};

// A tile in shared memory: [channel][row][column].
struct Tile {
  int32_t row_pitch = 0;    // elements, an odd multiple of 8: eight rows then meet no bank twice
  int32_t plane_pitch = 0;  // elements
};

constexpr int kWarp = 32;
constexpr int64_t kNoRow = -1;

namespace detail {

template <int kVector, class RowOffset>
LKA_DEVICE void stage_runs(const MapAccess& map, int64_t plane, int rows, int from_x, int columns,
                           uint16_t* to, int row_pitch, RowOffset row_offset) {
  const auto* source = static_cast<const uint16_t*>(map.view.data);
  const int width = int(map.view.width);
  const int vectors = columns / kVector;
  // Lanes of one row: a power of two, so that nothing is divided.
  int shift = 0;
  while (shift < 5 && (1 << shift) < vectors) ++shift;
  const int lane = threadIdx.x % kWarp;
  for (int row = lane >> shift; row < rows; row += kWarp >> shift) {
    const int64_t offset = row_offset(row);
    for (int v = lane & ((1 << shift) - 1); v < vectors; v += 1 << shift) {
      const int x = from_x + v * kVector;
      uint16_t* at = to + row * row_pitch + v * kVector;
      const bool exists = offset != kNoRow && x >= 0 && x < width;
      const uint16_t* element = exists ? source + (plane + offset + x) : source;
      if constexpr (kVector == 1) {
        store_shared(at, exists ? load_global(element) : uint16_t(0));
      } else {
        const int left = width - x;
        const int valid = !exists ? 0 : left < kVector ? left : kVector;
        cp_async<kVector * 2>(at, element, valid * 2);
      }
    }
  }
}

}  // namespace detail

// Columns [from_x, from_x + columns) of rows of blockDim.x / 32 channels, from channel `first`;
// elements outside of the map are zeros. from_x and columns are multiples of 8. row_offset(row) is
// where a row begins in its channel, or kNoRow. Copies may be under way when this returns.
template <class RowOffset>
LKA_DEVICE void stage_rows(const MapAccess& map, int first, int channels, int rows, int from_x,
                           int columns, uint16_t* shared, const Tile& tile, RowOffset row_offset) {
  const auto* source = static_cast<const uint16_t*>(map.view.data);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (map.row_vector > 0) {  // a warp has a channel
    if (first + warp >= channels) return;
    const int64_t plane = (first + warp) * map.view.stride_c;
    uint16_t* to = shared + warp * tile.plane_pitch;
    switch (map.row_vector) {
      case 8:
        return detail::stage_runs<8>(map, plane, rows, from_x, columns, to, tile.row_pitch,
                                     row_offset);
      case 4:
        return detail::stage_runs<4>(map, plane, rows, from_x, columns, to, tile.row_pitch,
                                     row_offset);
      case 2:
        return detail::stage_runs<2>(map, plane, rows, from_x, columns, to, tile.row_pitch,
                                     row_offset);
      default:
        return detail::stage_runs<1>(map, plane, rows, from_x, columns, to, tile.row_pitch,
                                     row_offset);
    }
  }
  // Pairs of columns, transposed on the way through registers.
  const int width = int(map.view.width);
  const bool wide = map.channel_vector == 8 && warps == 8;
  for (int row = warp; row < rows; row += warps) {
    const int64_t offset = row_offset(row);
    const bool row_exists = offset != kNoRow;
    // Neighbouring lanes have neighbouring channels, or where a lane has all of them, columns.
    const int step = wide ? kWarp : kWarp / warps;
    const int channel = wide ? 0 : lane % warps;
    if (first + channel >= channels) continue;
    const uint16_t* from =
        source + (row_exists ? offset + (first + channel) * map.view.stride_c : int64_t(0));
    for (int pair = wide ? lane : lane / warps; pair < columns / 2; pair += step) {
      const int x = from_x + 2 * pair;
      const bool low = row_exists && x >= 0 && x < width;
      const bool high = row_exists && x + 1 >= 0 && x + 1 < width;
      uint16_t* at = shared + channel * tile.plane_pitch + row * tile.row_pitch + 2 * pair;
      const uint16_t* element = from + (low || high ? x * map.view.stride_w : int64_t(0));
      if (wide) {
        const Vector16 none = {};
        const Vector16 a = low ? load_global(reinterpret_cast<const Vector16*>(element)) : none;
        const Vector16 b =
            high ? load_global(reinterpret_cast<const Vector16*>(element + map.view.stride_w))
                 : none;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          auto* even = reinterpret_cast<uint32_t*>(at + 2 * i * tile.plane_pitch);
          auto* odd = reinterpret_cast<uint32_t*>(at + (2 * i + 1) * tile.plane_pitch);
          store_shared(even, (a.words[i] & 0xffffu) | b.words[i] << 16);
          store_shared(odd, a.words[i] >> 16 | (b.words[i] & 0xffff0000u));
        }
      } else {
        const uint16_t a = low ? load_global(element) : uint16_t(0);
        const uint16_t b = high ? load_global(element + map.view.stride_w) : uint16_t(0);
        store_shared(reinterpret_cast<uint32_t*>(at), pack(a, b));
      }
    }
  }
}

}  // namespace lka::cuda
