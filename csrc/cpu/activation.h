// Activations and their derivatives on vectors.
//
// float: polynomials, below one rounding error of the result's scale. double: the C library.
#pragma once

#include <cmath>

#include "adapter_params.h"
#include "simd.h"

namespace {

using lka::Activation;

template <int V>
inline Vec<float, V> exponential(Vec<float, V> x) {
  // exp(x) = 2^n · exp(r), r = x - n·ln 2 in [-0.35, 0.35]; a Taylor polynomial of degree 7 for r.
  x = x < -87.0f ? splat<float, V>(-87.0f) : x;
  x = x > 88.0f ? splat<float, V>(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const Vec<float, V> n = (x * 1.44269504f + magic) - magic;
  const Vec<float, V> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec<float, V> p = splat<float, V>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const auto exponent = __builtin_convertvector(n, Vec<int32_t, V>) + 127;
  return p * (Vec<float, V>)(exponent << 23);
}

template <int V>
inline Vec<double, V> exponential(Vec<double, V> x) {
  for (int i = 0; i < V; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The normal distribution function Φ(x) and density φ(x).
template <class T, int V>
struct Normal {
  Vec<T, V> distribution, density;
};

template <bool kDensity, int V>
inline Normal<float, V> normal(Vec<float, V> x) {
  // Φ(-t) = exp(-t²/2)·R(t) for t >= 0, where R (half of erfcx(t/√2)) is smooth: a polynomial in
  // s = (t - 3)/(t + 3), fitted for least relative error on [0, 13.5] (6.7e-9 before rounding).
  const Vec<float, V> t = x < 0 ? -x : x;
  const Vec<float, V> s = (t - 3.0f) / (t + 3.0f);
  Vec<float, V> p = splat<float, V>(5.416041077e-05f);
  p = p * s + 1.160536874e-04f;
  p = p * s + -3.399124124e-04f;
  p = p * s + -9.841949956e-04f;
  p = p * s + 2.904700454e-03f;
  p = p * s + 6.132186029e-03f;
  p = p * s + -4.621331327e-02f;
  p = p * s + 1.232250215e-01f;
  p = p * s + -2.064026180e-01f;
  p = p * s + 1.215139477e-01f;
  const Vec<float, V> bell = exponential<V>(t * t * -0.5f);
  const Vec<float, V> tail = bell * p;
  return {x < 0 ? tail : 1.0f - tail, bell * 0.398942280f};
}

template <bool kDensity, int V>
inline Normal<double, V> normal(Vec<double, V> x) {
  Normal<double, V> n{};
  for (int i = 0; i < V; ++i) {
    n.distribution[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    // Asked for, as the compiler must not leave out a call that may set errno.
    if (kDensity) n.density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
  return n;
}

// The logistic function and its derivative, both without cancellation for large |x|.
template <class T, int V>
struct Logistic {
  Vec<T, V> value, slope;
};

template <class T, int V>
inline Logistic<T, V> logistic(Vec<T, V> x) {
  const Vec<T, V> e = exponential<V>(x < 0 ? x : -x);
  const Vec<T, V> larger = T(1) / (T(1) + e);
  return {x < 0 ? e * larger : larger, e * larger * larger};
}

// √(2/π)·(x + 0.044715·x³), the argument of the tanh form of gelu.
template <class T, int V>
inline Vec<T, V> tanh_argument(Vec<T, V> x) {
  return T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
}

// act(x) and, if asked for, act'(x).
template <class T, int V>
struct Activated {
  Vec<T, V> value, slope;
};

template <class T, int V, Activation kActivation, bool kSlope>
inline Activated<T, V> activate(Vec<T, V> x) {
  if constexpr (kActivation == Activation::gelu) {
    const Normal<T, V> n = normal<kSlope, V>(x);
    return {x * n.distribution, n.distribution + x * n.density};
  }
  if constexpr (kActivation == Activation::gelu_tanh) {
    // (1 + tanh u)/2 = logistic(2u)
    const Logistic<T, V> s = logistic<T, V>(T(2) * tanh_argument<T, V>(x));
    const Vec<T, V> inner = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * x * x);
    return {x * s.value, s.value + T(2) * x * s.slope * inner};
  }
  if constexpr (kActivation == Activation::relu)
    return {x <= 0 ? Vec<T, V>{} : x, x <= 0 ? Vec<T, V>{} : splat<T, V>(T(1))};
  if constexpr (kActivation == Activation::silu) {
    const Logistic<T, V> s = logistic<T, V>(x);
    return {x * s.value, s.value + x * s.slope};
  }
  return {x, splat<T, V>(T(1))};
}

template <class T, int V, Activation kActivation, bool kValue, bool kSlope>
void map_activation(const T* x, const T* factor, T* value, T* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += V) {
    const int some = count - i < V ? int(count - i) : V;
    auto result = activate<T, V, kActivation, kSlope>(load_some<T, V, T>(x + i, some));
    if (factor) {
      const Vec<T, V> f = load_some<T, V, T>(factor + i, some);
      result.value *= f;
      result.slope *= f;
    }
    if (kValue) store_some<T, V, T>(value + i, result.value, some);
    if (kSlope) store_some<T, V, T>(slope + i, result.slope, some);
  }
}

template <class T, int V, Activation kActivation>
void map_activation(const T* x, const T* factor, T* value, T* slope, int64_t count) {
  if (value && slope)
    map_activation<T, V, kActivation, true, true>(x, factor, value, slope, count);
  else if (value)
    map_activation<T, V, kActivation, true, false>(x, factor, value, slope, count);
  else if (slope)
    map_activation<T, V, kActivation, false, true>(x, factor, value, slope, count);
}

// value = act(x)·factor and slope = act'(x)·factor, each unless null. `factor` may be null, and a
// result may be written over x or factor.
template <class T, int V>
void map_activation(Activation activation, const T* x, const T* factor, T* value, T* slope,
                    int64_t count) {
  switch (activation) {
    case Activation::gelu:
      return map_activation<T, V, Activation::gelu>(x, factor, value, slope, count);
    case Activation::gelu_tanh:
      return map_activation<T, V, Activation::gelu_tanh>(x, factor, value, slope, count);
    case Activation::relu:
      return map_activation<T, V, Activation::relu>(x, factor, value, slope, count);
    case Activation::silu:
      return map_activation<T, V, Activation::silu>(x, factor, value, slope, count);
    case Activation::none:
      return map_activation<T, V, Activation::none>(x, factor, value, slope, count);
  }
}

}  // namespace
