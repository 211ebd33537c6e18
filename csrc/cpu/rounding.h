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

// `count` values that stand `step` elements apart, side by side.
template <class S, class T>
void narrow_run(const T* values, int64_t step, int64_t count, S* to) {
  int64_t i = 0;
  if constexpr (sizeof(S) == 2)
    for (; i + 4 <= count; i += 4, values += 4 * step)
      store<float, 4, S>(to + i, Vec<float, 4>{float(values[0]), float(values[step]),
                                               float(values[2 * step]), float(values[3 * step])});
  for (; i < count; ++i, values += step) to[i] = narrow_one<S>(*values);
}

template <class T>
void store_rounded(const T* values, int64_t step, int64_t count, Storage storage, void* data,
                   int64_t index) {
  switch (storage) {
    case Storage::float64:
      return narrow_run(values, step, count, static_cast<double*>(data) + index);
    case Storage::float32:
      return narrow_run(values, step, count, static_cast<float*>(data) + index);
    case Storage::float16:
      return narrow_run(values, step, count, static_cast<float16_t*>(data) + index);
    case Storage::bfloat16:
      return narrow_run(values, step, count, static_cast<bfloat16_t*>(data) + index);
  }
}

}  // namespace lka::cpu
