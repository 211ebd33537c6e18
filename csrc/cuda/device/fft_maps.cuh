// What transforms read and write: maps of any layout, and the taps of a kernel at the places where
// the transform wants them.
#pragma once

#include "../../conv_params.h"
#include "fft_planes.cuh"
#include "storage.cuh"

namespace lka::cuda {

// The planes of a block: `count` neighbouring images of one channel, or channels of one image.
struct FftBlock {
  int image = 0, channel = 0, count = 1;
  bool of_channels = false;

  LKA_DEVICE int channel_of(int plane) const { return of_channels ? channel + plane : channel; }
  LKA_DEVICE int64_t offset(const MapView& map, int plane, int y) const {
    const int b = of_channels ? image : image + plane;
    return b * map.stride_b + channel_of(plane) * map.stride_c + y * map.stride_h;
  }
};

// The elements of a row that one thread has: x, x + step, …
template <class Storage>
struct FftSource {
  using Type = typename Stored<Storage>::Type;
  const MapView& map;
  const FftBlock& block;

  struct Row {
    const Type* at;
    int64_t stride;
    int x, step, width;  // width 0 of a row that is not there

    LKA_DEVICE float next() {
      const float value = x < width ? Stored<Storage>::value(load_global(at)) : 0.0f;
      at += stride;
      x += step;
      return value;
    }
  };

  LKA_DEVICE Row row(int plane, int y, int x, int step) const {
    const auto* data = static_cast<const Type*>(map.data);
    return {data + block.offset(map, plane, y) + x * map.stride_w, step * map.stride_w, x, step,
            y < map.height ? int(map.width) : 0};
  }
};

template <class Storage>
struct FftSink {
  using Type = typename Stored<Storage>::Type;
  const MapView& map;
  const FftBlock& block;

  struct Row {
    Type* at;
    int64_t stride;
    int x, step, width;

    LKA_DEVICE void next(float value) {
      const Type stored = Stored<Storage>::of(value);
      if (x < width) store_global(at, stored);
      at += stride;
      x += step;
    }
  };

  LKA_DEVICE Row row(int plane, int y, int x, int step) const {
    auto* data = static_cast<Type*>(map.data);
    return {data + block.offset(map, plane, y) + x * map.stride_w, step * map.stride_w, x, step,
            y < map.height ? int(map.width) : 0};
  }
};

// Of `full` taps in one dimension, dilation apart, those that touch the map: [first, first +
// count). The first of them is element `shift` of a transform of `size`, around whose end they go.
struct FftTapAxis {
  int32_t first = 0, count = 0, full = 0;
  int32_t dilation = 1, shift = 0, size = 0;

  // The tap at element x, or -1.
  LKA_DEVICE int at(int x) const {
    const int from = x < shift ? x - shift + size : x - shift, tap = from / dilation;
    return tap < count && tap * dilation == from ? first + tap : -1;
  }
  LKA_DEVICE bool touches(int tap) const { return tap >= first && tap < first + count; }
};

// A contiguous weight (C, 1, kH, kW) or its gradient. There is little of it, so its type is not
// known when this is compiled.
struct FftTaps {
  Storage storage = Storage::float32;
  void* data = nullptr;
  FftTapAxis y, x;

  LKA_DEVICE int64_t plane(int channel) const { return int64_t(channel) * y.full * x.full; }

  LKA_DEVICE float load(int64_t i) const {
    const auto* bits = static_cast<const uint16_t*>(data) + i;
    if (storage == Storage::float32) return load_global(static_cast<const float*>(data) + i);
    return storage == Storage::float16 ? widen<Float16>(load_global(bits))
                                       : widen<BFloat16>(load_global(bits));
  }

  LKA_DEVICE void store(int64_t i, float value) const { store(data, i, value); }
  LKA_DEVICE void store(void* to, int64_t i, float value) const {
    auto* bits = static_cast<uint16_t*>(to) + i;
    if (storage == Storage::float32)
      store_global(static_cast<float*>(to) + i, value);
    else
      store_global(bits,
                   storage == Storage::float16 ? narrow<Float16>(value) : narrow<BFloat16>(value));
  }
};

// Taps as the rows of planes, which are channels: read as a source, or written as a sink.
struct FftTapPlanes {
  const FftTaps& taps;
  int channel;
  float scale;

  struct Row {
    const FftTaps& taps;
    int64_t first;  // -1 of a row without taps
    int x, step;
    float scale;

    LKA_DEVICE int next_tap() {
      const int tap = first < 0 ? -1 : taps.x.at(x);
      x += step;
      return tap;
    }
    LKA_DEVICE float next() {
      const int tap = next_tap();
      return tap < 0 ? 0.0f : taps.load(first + tap) * scale;
    }
    LKA_DEVICE void next(float value) {
      const int tap = next_tap();
      if (tap >= 0) taps.store(first + tap, value * scale);
    }
  };

  LKA_DEVICE Row row(int plane, int y, int x, int step) const {
    const int tap = taps.y.at(y);
    const int64_t first = tap < 0 ? -1 : taps.plane(channel + plane) + int64_t(tap) * taps.x.full;
    return {taps, first, x, step, scale};
  }
};

}  // namespace lka::cuda
