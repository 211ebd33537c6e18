// Single elements of any storage type, for the launchers; kernels use simd.h on whole vectors.
#pragma once

#include "../conv_params.h"
#include "simd.h"

namespace lka::cpu {

template <class T>
T widen_one(float value) {
  return T(value);
}
template <class T>
T widen_one(double value) {
  return T(value);
}
template <class T>
T widen_one(float16_t value) {
  return T(half_to_float(value.bits));
}
template <class T>
T widen_one(bfloat16_t value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return T(wide);
}

template <class S, class T>
S narrow_one(T value) {
  if constexpr (sizeof(S) >= 4)
    return S(value);
  else
    return S{narrow<4>(Vec<float, 4>{float(value), 0, 0, 0}, S{})[0]};
}

template <class T>
void store_rounded(T value, Storage storage, void* data, int64_t index) {
  switch (storage) {
    case Storage::float64: static_cast<double*>(data)[index] = double(value); break;
    case Storage::float32: static_cast<float*>(data)[index] = float(value); break;
    case Storage::float16:
      static_cast<float16_t*>(data)[index] = narrow_one<float16_t>(value);
      break;
    case Storage::bfloat16:
      static_cast<bfloat16_t*>(data)[index] = narrow_one<bfloat16_t>(value);
      break;
  }
}

}  // namespace lka::cpu
