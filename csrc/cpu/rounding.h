// Single elements of any storage type, for the launchers; kernels use simd.h on whole vectors.
#pragma once

#include "../conv_params.h"
#include "simd.h"

namespace lka::cpu {

inline double load_rounded(Storage storage, const void* data, int64_t index) {
  switch (storage) {
    case Storage::float64: return static_cast<const double*>(data)[index];
    case Storage::float32: return static_cast<const float*>(data)[index];
    case Storage::float16: return half_to_float(static_cast<const uint16_t*>(data)[index]);
    case Storage::bfloat16: break;
  }
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void store_rounded(T value, Storage storage, void* data, int64_t index) {
  switch (storage) {
    case Storage::float64: static_cast<double*>(data)[index] = double(value); break;
    case Storage::float32: static_cast<float*>(data)[index] = float(value); break;
    case Storage::float16:
      static_cast<float16_t*>(data)[index].bits = float_to_half(float(value));
      break;
    case Storage::bfloat16: {
      bfloat16_t out[4];
      store<float, 4>(out, Vec<float, 4>{float(value), 0, 0, 0});
      static_cast<bfloat16_t*>(data)[index] = out[0];
    }
  }
}

}  // namespace lka::cpu
