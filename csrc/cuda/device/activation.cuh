// Activations and their derivatives in float32.
#pragma once

#include "../../adapter_params.h"
#include "memory.cuh"

#ifndef __CUDACC__
#include <cmath>
#endif

namespace lka::cuda {

LKA_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 2·√(2/π)·(x + 0.044715·x³): (1 + tanh u)/2 = sigmoid(2u) does not cancel where u is far below 0.
LKA_DEVICE float twice_tanh_argument(float x) {
  return 1.5957691216057308f * (x + 0.044715f * x * x * x);
}

LKA_DEVICE float normal_distribution(float x) {
  return 0.5f * (1.0f + erff(x * 0.7071067811865476f));
}

LKA_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return x * normal_distribution(x);
    case Activation::gelu_tanh: return x * sigmoid(twice_tanh_argument(x));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // keeps a NaN
    case Activation::silu: return x * sigmoid(x);
    case Activation::none: break;
  }
  return x;
}

LKA_DEVICE float slope(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return normal_distribution(x) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float s = sigmoid(twice_tanh_argument(x));
      return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    }
    case Activation::relu: return x > 0.0f ? 1.0f : 0.0f;
    case Activation::silu: {
      const float s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::none: break;
  }
  return 1.0f;
}

// Every value becomes f(activation, value): which it is is asked for once, and the arithmetic of
// several values overlaps.
template <int kCount, class F>
LKA_DEVICE void for_all(Activation activation, float (&x)[kCount], F f) {
  const auto each = [&](Activation one) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = f(one, x[i]);
  };
  switch (activation) {
    case Activation::gelu: return each(Activation::gelu);
    case Activation::gelu_tanh: return each(Activation::gelu_tanh);
    case Activation::relu: return each(Activation::relu);
    case Activation::silu: return each(Activation::silu);
    case Activation::none: return each(Activation::none);
  }
}
template <int kCount>
LKA_DEVICE void activate_all(Activation activation, float (&x)[kCount]) {
  for_all(activation, x, [](Activation one, float value) { return activate(one, value); });
}
template <int kCount>
LKA_DEVICE void slope_all(Activation activation, float (&x)[kCount]) {
  for_all(activation, x, [](Activation one, float value) { return slope(one, value); });
}

}  // namespace lka::cuda
