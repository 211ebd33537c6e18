// How tensors keep their elements, and how arithmetic in float32 sees them.
#pragma once

#include "mma.cuh"

namespace lka::cuda {

struct Float32 {};

template <class Storage>
struct Stored {
  using Type = uint16_t;
  static LKA_DEVICE Type of(float sum) { return narrow<Storage>(sum); }
  static LKA_DEVICE float value(Type stored) { return widen<Storage>(stored); }
};
template <>
struct Stored<Float32> {
  using Type = float;
  static LKA_DEVICE Type of(float sum) { return sum; }
  static LKA_DEVICE float value(Type stored) { return stored; }
};

}  // namespace lka::cuda
