// Between tensors of any layout and dtype and the kernels' buffers [positions][V].
#pragma once

#include "depthwise_plan.h"
#include "prefetch.h"
#include "simd.h"

namespace {

// V planes of a tensor (B, C, H, W): where each starts, and how its elements are laid out.
struct Lanes {
  static constexpr int kMax = 16;
  int64_t offset[kMax];  // element offset of each lane's plane; of adjacent ones, the first
  int count;             // lanes in use
  bool adjacent;         // lane l stands l elements after lane 0
  int64_t stride_h, stride_w;
};

// The planes of one block.
template <int V>
Lanes lanes_of(const lka::cpu::LanePlan& plan, int64_t block, const lka::MapView& map,
               int64_t batch, int64_t channels) {
  Lanes lanes;
  lanes.stride_h = map.stride_h;
  lanes.stride_w = map.stride_w;
  const auto offset_of = [&](int64_t plane) {
    return plane / channels * map.stride_b + plane % channels * map.stride_c;
  };
  if (plan.cross_images) {
    const int64_t first = block * V, planes = batch * channels - first;
    lanes.count = planes < V ? int(planes) : V;
    lanes.adjacent = true;
    for (int l = 0; l < lanes.count; ++l) {
      lanes.offset[l] = offset_of(first + l);
      lanes.adjacent = lanes.adjacent && lanes.offset[l] == lanes.offset[0] + l;
    }
  } else {
    const int64_t channel = block % plan.blocks_per_image * V;
    const int64_t left = channels - channel;
    const int64_t first = block / plan.blocks_per_image * map.stride_b + channel * map.stride_c;
    lanes.count = left < V ? int(left) : V;
    lanes.adjacent = map.stride_c == 1 || lanes.count == 1;
    lanes.offset[0] = first;
    if (!lanes.adjacent)
      for (int l = 1; l < lanes.count; ++l) lanes.offset[l] = first + l * map.stride_c;
  }
  // One plane of a dense map is better read along its rows than one element at a time.
  if (lanes.count == 1 && map.stride_w == 1) lanes.adjacent = false;
  return lanes;
}

// Where the vector of positions from `at` on begins: the last one of a run ends with it, so that it
// is full too and overlaps the one before.
inline int64_t last_full(int64_t at, int64_t run, int64_t full) {
  return run - at < full && run >= full ? run - full : at;
}

// Positions of which the lanes are gathered one by one before any of them is widened: a vector read
// right after its elements were written would wait for them to reach the cache.
constexpr int kGathered = 16;

// Copy rows [row_begin, row_end) of the planes into buffer rows `buffer_row` elements apart, with V
// lanes side by side; column 0 of source row row_begin goes to `buffer`.
template <class T, int V, class S>
void pack_rows(const S* data, const Lanes& lanes, int64_t row_begin, int64_t row_end,
               int64_t columns, T* buffer, int64_t buffer_row) {
  if (lanes.adjacent) {
    for (int64_t y = row_begin; y < row_end; ++y) {
      const S* from = data + lanes.offset[0] + y * lanes.stride_h;
      T* to = buffer + (y - row_begin) * buffer_row;
      if (lanes.count == V) {
        for (int64_t x = 0; x < columns; ++x, from += lanes.stride_w, to += V)
          store_aligned<V>(to, load<T, V>(from));
      } else {
        for (int64_t x = 0; x < columns; ++x, from += lanes.stride_w, to += V)
          store_aligned<V>(to, load_some<T, V, S>(from, lanes.count));
      }
    }
    return;
  }
  if (lanes.stride_w == 1) {
    // Transpose V positions × V lanes in registers. A plane whose rows follow each other is one
    // long row, so that narrow maps waste nothing.
    const bool joined = lanes.stride_h == columns;
    const int64_t run = joined ? (row_end - row_begin) * columns : columns;
    for (int64_t y = row_begin; y < row_end; y += joined ? row_end - row_begin : 1) {
      for (int64_t at = 0; at < run; at += V) {
        const int64_t p = last_full(at, run, V);
        const int positions = run - p < V ? int(run - p) : V;
        int64_t to_row = y - row_begin + p / columns, to_column = p % columns;
        Vec<T, V> square[V];
        for (int l = 0; l < V; ++l)
          square[l] =
              l < lanes.count
                  ? load_some<T, V, S>(data + lanes.offset[l] + y * lanes.stride_h + p, positions)
                  : Vec<T, V>{};
        transpose<T, V>(square);
        for (int q = 0; q < positions; ++q) {
          store_aligned<V>(buffer + to_row * buffer_row + to_column * V, square[q]);
          if (++to_column == columns) to_column = 0, ++to_row;
        }
      }
    }
    return;
  }
  alignas(64) S gathered[kGathered * V] = {};
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < columns; x += kGathered) {
      const int count = columns - x < kGathered ? int(columns - x) : kGathered;
      for (int l = 0; l < lanes.count; ++l) {
        const S* from = data + lanes.offset[l] + y * lanes.stride_h + x * lanes.stride_w;
        for (int q = 0; q < count; ++q, from += lanes.stride_w) gathered[q * V + l] = *from;
      }
      T* to = buffer + (y - row_begin) * buffer_row + x * V;
      for (int q = 0; q < count; ++q) store_aligned<V>(to + q * V, load<T, V>(gathered + q * V));
    }
}

// One row of `count` channels that stand side by side, as blocks of V lanes `buffer_block` elements
// apart. Reading in the order of memory hides some of its latency: in a trial kernel with K = 3,
// 384 channels on 56×56, 9.3 ms against 11.2 ms one block of channels after the other (Zen 4).
template <class T, int V, class S>
void pack_channels(const S* row, int64_t stride_w, int64_t count, int64_t columns, T* buffer,
                   int64_t buffer_block) {
  const int64_t full = count / V;
  const int rest = int(count % V);
  for (int64_t x = 0; x < columns; ++x, row += stride_w, buffer += V) {
    for (int64_t block = 0; block < full; ++block)
      store_aligned<V>(buffer + block * buffer_block, load<T, V>(row + block * V));
    if (rest)
      store_aligned<V>(buffer + full * buffer_block, load_some<T, V, S>(row + full * V, rest));
  }
}

// The reverse: a dense buffer [rows][columns][V] to rows [row_begin, row_end) of the planes.
template <class T, int V, class S, class Buffer>
void unpack_rows(const Buffer* buffer, const Lanes& lanes, int64_t row_begin, int64_t row_end,
                 int64_t columns, S* data) {
  const int64_t positions = (row_end - row_begin) * columns;
  if (lanes.adjacent) {
    const int count = lanes.count;
    for (int64_t y = row_begin; y < row_end; ++y) {
      S* to = data + lanes.offset[0] + y * lanes.stride_h;
      if (count == V) {
        for (int64_t x = 0; x < columns; ++x, to += lanes.stride_w, buffer += V)
          store<T, V>(to, load<T, V>(buffer));
      } else {
        for (int64_t x = 0; x < columns; ++x, to += lanes.stride_w, buffer += V)
          store_some<T, V, S>(to, load<T, V>(buffer), count);
      }
    }
    return;
  }
  if (lanes.stride_w != 1 || lanes.stride_h != columns) {
    alignas(64) S scattered[kGathered * V];
    for (int64_t y = row_begin; y < row_end; ++y)
      for (int64_t x = 0; x < columns; x += kGathered) {
        const int count = columns - x < kGathered ? int(columns - x) : kGathered;
        const Buffer* from = buffer + ((y - row_begin) * columns + x) * V;
        for (int q = 0; q < count; ++q) store<T, V>(scattered + q * V, load<T, V>(from + q * V));
        for (int l = 0; l < lanes.count; ++l) {
          S* to = data + lanes.offset[l] + y * lanes.stride_h + x * lanes.stride_w;
          for (int q = 0; q < count; ++q, to += lanes.stride_w) *to = scattered[q * V + l];
        }
      }
    return;
  }
  for (int64_t at = 0; at < positions; at += V) {
    const int64_t p = last_full(at, positions, V);
    const int count = positions - p < V ? int(positions - p) : V;
    Vec<T, V> square[V];
    for (int q = 0; q < V; ++q)
      square[q] = q < count ? load<T, V>(buffer + (p + q) * V) : Vec<T, V>{};
    transpose<T, V>(square);
    for (int l = 0; l < lanes.count; ++l)
      store_some<T, V, S>(data + lanes.offset[l] + row_begin * columns + p, square[l], count);
  }
}

// Rows [row_begin, row_end) of `count` channels that stand side by side, as far as the map goes.
template <class S>
Region channels_region(const lka::MapView& map, int64_t offset, int64_t count, int64_t row_begin,
                       int64_t row_end) {
  constexpr int64_t kSize = sizeof(S);
  if (row_begin < 0) row_begin = 0;
  if (row_end > map.height) row_end = map.height;
  const S* at = static_cast<const S*>(map.data) + offset + row_begin * map.stride_h;
  return {at,
          count * kSize,
          map.width,
          map.stride_w * kSize,
          row_end > row_begin ? row_end - row_begin : 0,
          map.stride_h * kSize};
}

// Rows [row_begin, row_end) of `count` channels that begin with a block of lanes, as far as the map
// goes. Where the lanes' planes do not stand side by side these are all: then nothing if they have
// gaps or do not stand at equal distances.
template <class S>
Region planes_region(const lka::MapView& map, const Lanes& lanes, int64_t count, int64_t row_begin,
                     int64_t row_end) {
  constexpr int64_t kSize = sizeof(S);
  if (lanes.adjacent) return channels_region<S>(map, lanes.offset[0], count, row_begin, row_end);
  if (map.stride_w != 1 || (map.height > 1 && map.stride_h != map.width)) return {};
  const int64_t step = lanes.count > 1 ? lanes.offset[1] - lanes.offset[0] : 0;
  for (int l = 1; l < lanes.count; ++l)
    if (lanes.offset[l] != lanes.offset[0] + l * step) return {};
  if (row_begin < 0) row_begin = 0;
  if (row_end > map.height) row_end = map.height;
  return {static_cast<const S*>(map.data) + lanes.offset[0] + row_begin * map.width,
          row_end > row_begin ? (row_end - row_begin) * map.width * kSize : 0,
          lanes.count,
          step * kSize,
          1,
          0};
}

}  // namespace
