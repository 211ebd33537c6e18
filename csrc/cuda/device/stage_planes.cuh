// Whole planes of small maps into shared memory: a row of positions for every image.
#pragma once

#include "stage_rows.cuh"

namespace lka::cuda {

// How the positions of a plane are numbered: k = y · pitch + x. Where a plane has no gaps and
// pitch is its width, `vector` positions are one access; else they come one by one.
struct PlaneAccess {
  MapView view;
  int32_t pitch = 0, positions = 0;  // of a row; of a plane, a multiple of 16: zeros beyond the map
  int32_t vector = 0;                // 8, 4 or 2; 1: any strides
};

// A number known when the code is compiled.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

namespace detail {

template <int kVector>
LKA_DEVICE void stage_plane_vectors(const PlaneAccess& map, int64_t plane, int height, int images,
                                    int live, int thread, int threads, uint16_t* to,
                                    int image_pitch) {
  const auto* source = static_cast<const uint16_t*>(map.view.data);
  const int lane = thread % kWarp, warps = threads / kWarp;
  const int width = int(map.view.width);
  const int64_t stride_b = map.view.stride_b;
  for (int k = kVector * lane; k < map.positions; k += kVector * kWarp) {
    int64_t offset = k;
    int valid = width * height - k;
    if constexpr (kVector == 1) {
      const int y = k / map.pitch, x = k - y * map.pitch;
      offset = y * map.view.stride_h + x * map.view.stride_w;
      valid = y < height && x < width;
    }
    valid = valid < 0 ? 0 : valid < kVector ? valid : kVector;
    for (int image = thread / kWarp; image < images; image += warps) {
      uint16_t* at = to + image * image_pitch + k;
      const bool exists = valid > 0 && image < live;
      const uint16_t* element = exists ? source + (plane + image * stride_b + offset) : source;
      if constexpr (kVector == 1)
        store_shared(at, exists ? load_global(element) : uint16_t(0));
      else
        cp_async<kVector * 2>(at, element, exists ? 2 * valid : 0);
    }
  }
}

}  // namespace detail

// The first `height` rows of planes of `images` images from `plane` on, of which `live` exist, by
// `threads` threads; the others are zeros. Copies may be under way when this returns.
LKA_DEVICE void stage_planes(const PlaneAccess& map, int64_t plane, int height, int images,
                             int live, int thread, int threads, uint16_t* to, int image_pitch) {
  const auto stage = [&](auto vector) {
    detail::stage_plane_vectors<decltype(vector)::value>(map, plane, height, images, live, thread,
                                                         threads, to, image_pitch);
  };
  if (map.vector == 8) return stage(Constant<8>());
  if (map.vector == 4) return stage(Constant<4>());
  if (map.vector == 2) return stage(Constant<2>());
  stage(Constant<1>());
}

}  // namespace lka::cuda
