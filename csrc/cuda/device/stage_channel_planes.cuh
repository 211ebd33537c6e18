// Rows of maps into planes of shared memory, one for each channel, `pitch` elements a row; columns
// begin behind `lead` others, which nobody writes here.
#pragma once

#include "stage_rows.cuh"

namespace lka::cuda {

// Lanes of a row of `count`: 1 << shift, a power of two, so that nothing is divided.
LKA_DEVICE int shift_of_lanes(int count) {
  int shift = 0;
  while (shift < 5 && (1 << shift) < count) ++shift;
  return shift;
}

namespace detail {

template <int kVector>
LKA_DEVICE void stage_plane_vectors(const uint16_t* from, const MapView& view, int first_row,
                                    int end_row, uint16_t* to, int pitch) {
  const int vectors = int(view.width) / kVector, shift = shift_of_lanes(vectors);
  const int lane = threadIdx.x % kWarp, rows = kWarp >> shift, first = lane >> shift;
  const int64_t step = rows * view.stride_h;
  // A lane goes down a column of vectors: rows hardly ever have more than a warp has lanes.
  for (int v = lane & ((1 << shift) - 1); v < vectors; v += 1 << shift) {
    const uint16_t* element = from + (first_row + first) * view.stride_h + v * kVector;
    uint16_t* at = to + first * pitch + v * kVector;
    for (int y = first_row + first; y < end_row; y += rows, element += step, at += rows * pitch) {
      cp_async<2 * kVector>(at, element, 2 * kVector);
    }
  }
}

}  // namespace detail

// Rows [first_row, end_row) of one channel of one image, by one warp, in vectors of two elements or
// more. Copies may be under way when this returns.
LKA_DEVICE void stage_channel_plane(const MapAccess& map, int64_t image, int64_t channel,
                                    int first_row, int end_row, uint16_t* to, int pitch, int lead) {
  const auto* from = static_cast<const uint16_t*>(map.view.data) + image * map.view.stride_b +
                     channel * map.view.stride_c;
  to += lead;
  switch (map.row_vector) {
    case 8: return detail::stage_plane_vectors<8>(from, map.view, first_row, end_row, to, pitch);
    case 4: return detail::stage_plane_vectors<4>(from, map.view, first_row, end_row, to, pitch);
    default: return detail::stage_plane_vectors<2>(from, map.view, first_row, end_row, to, pitch);
  }
}

// The same of several images, `to_image` elements apart, whose elements are copied one by one:
// loads of four rows, of whatever images, are under way together.
LKA_DEVICE void stage_channel_elements(const MapAccess& map, int64_t image, int images,
                                       int64_t channel, int first_row, int end_row, uint16_t* to,
                                       int to_image, int pitch, int lead) {
  constexpr int kBatch = 4;
  const MapView& view = map.view;
  const auto* from =
      static_cast<const uint16_t*>(view.data) + image * view.stride_b + channel * view.stride_c;
  const int width = int(view.width), shift = shift_of_lanes(width), lane = threadIdx.x % kWarp;
  const int step = kWarp >> shift, rows = end_row - first_row;
  for (int x = lane & ((1 << shift) - 1); x < width; x += 1 << shift) {
    int i = 0, y = lane >> shift;  // of the images, and from first_row on
    while (i < images) {
      uint16_t values[kBatch];
      uint16_t* targets[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        while (i < images && y >= rows) {
          y -= rows;
          ++i;
        }
        targets[b] = i < images ? to + i * to_image + y * pitch + lead + x : nullptr;
        if (i < images)
          values[b] = load_global(from + i * view.stride_b + (first_row + y) * view.stride_h + x);
        y += step;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (targets[b] != nullptr) store_shared(targets[b], values[b]);
    }
  }
}

// The same of eight channels that are neighbours in memory, by the whole block: pairs of columns
// are turned in registers. Planes are `plane` elements apart; `lead` is even, and behind an odd
// width one column more is written, with zeros.
LKA_DEVICE void stage_eight_planes(const MapAccess& map, int64_t image, int64_t channel,
                                   int first_row, int end_row, uint16_t* to, int plane, int pitch,
                                   int lead) {
  const int width = int(map.view.width), pairs = (width + 1) / 2, shift = shift_of_lanes(pairs);
  const auto* from = static_cast<const uint16_t*>(map.view.data) + image * map.view.stride_b +
                     channel * map.view.stride_c;
  const int rows = int(blockDim.x) >> shift;
  for (int y = first_row + int(threadIdx.x >> shift); y < end_row; y += rows) {
    const uint16_t* row = from + y * map.view.stride_h;
    for (int pair = threadIdx.x & ((1 << shift) - 1); pair < pairs; pair += 1 << shift) {
      const uint16_t* pixel = row + 2 * pair * map.view.stride_w;
      const Vector16 a = load_global(reinterpret_cast<const Vector16*>(pixel));
      const Vector16 b =
          2 * pair + 1 < width
              ? load_global(reinterpret_cast<const Vector16*>(pixel + map.view.stride_w))
              : Vector16{};
      uint16_t* at = to + (y - first_row) * pitch + lead + 2 * pair;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(reinterpret_cast<uint32_t*>(at + 2 * i * plane),
                     (a.words[i] & 0xffffu) | b.words[i] << 16);
        store_shared(reinterpret_cast<uint32_t*>(at + (2 * i + 1) * plane),
                     a.words[i] >> 16 | (b.words[i] & 0xffff0000u));
      }
    }
  }
}

}  // namespace lka::cuda
