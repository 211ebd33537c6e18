// How elements of maps are stored, and what they are in arithmetic: float32.
#pragma once

#include "mma.cuh"

namespace lka::cuda {

struct Float32 {};

template <class Storage>
struct Stored {
  using Type = uint16_t;
  static LKA_DEVICE Type of(float value) { return narrow<Storage>(value); }
  static LKA_DEVICE float value(Type bits) { return widen<Storage>(bits); }
};
template <>
struct Stored<Float32> {
  using Type = float;
  static LKA_DEVICE Type of(float value) { return value; }
  static LKA_DEVICE float value(Type bits) { return bits; }
};

}  // namespace lka::cuda
