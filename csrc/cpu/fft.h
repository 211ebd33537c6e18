// Complex Fourier transforms of V sequences side by side, one in each lane, so that no lane ever
// meets another: sizes 2^a·3^b·5^c, in stages of radix 4, 2, 3 and 5 that leave the result in order
// (Stockham's algorithm; Van Loan, "Computational Frameworks for the Fast Fourier Transform",
// 1992, 1.7). Element i of a sequence is two vectors, real and imaginary part.
#pragma once

#include "fft_plan.h"
#include "simd.h"

namespace {

template <class T, int V>
struct Complex {
  Vec<T, V> re, im;
};

template <class T, int V>
inline Complex<T, V> operator+(Complex<T, V> a, Complex<T, V> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T, int V>
inline Complex<T, V> operator-(Complex<T, V> a, Complex<T, V> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T, int V>
inline Complex<T, V> times(Complex<T, V> a, Vec<T, V> re, Vec<T, V> im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}
template <class T, int V>
inline Complex<T, V> times_minus_i(Complex<T, V> a) {
  return {a.im, -a.re};
}

// The transform, with exp(-2πi/R), of R values in registers.
template <class T, int V>
inline void butterfly(Complex<T, V> (&x)[2]) {
  const auto a = x[0], b = x[1];
  x[0] = a + b;
  x[1] = a - b;
}
template <class T, int V>
inline void butterfly(Complex<T, V> (&x)[3]) {
  const T half_root_3 = T(0.86602540378443864676), half = T(0.5);
  const auto sum = x[1] + x[2], difference = times_minus_i(x[1] - x[2]);
  const Complex<T, V> middle = {x[0].re - half * sum.re, x[0].im - half * sum.im};
  const Complex<T, V> side = {half_root_3 * difference.re, half_root_3 * difference.im};
  x[0] = x[0] + sum;
  x[1] = middle + side;
  x[2] = middle - side;
}
template <class T, int V>
inline void butterfly(Complex<T, V> (&x)[4]) {
  const auto a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_minus_i(x[1] - x[3]);
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
}
template <class T, int V>
inline void butterfly(Complex<T, V> (&x)[5]) {
  const T c1 = T(0.30901699437494742410), c2 = T(-0.80901699437494742410);
  const T s1 = T(0.95105651629515357212), s2 = T(0.58778525229247312917);
  const auto a = x[1] + x[4], b = x[2] + x[3];
  const auto p = times_minus_i(x[1] - x[4]), q = times_minus_i(x[2] - x[3]);
  const auto first = x[0];
  const Complex<T, V> m1 = {first.re + c1 * a.re + c2 * b.re, first.im + c1 * a.im + c2 * b.im};
  const Complex<T, V> m2 = {first.re + c2 * a.re + c1 * b.re, first.im + c2 * a.im + c1 * b.im};
  const Complex<T, V> n1 = {s1 * p.re + s2 * q.re, s1 * p.im + s2 * q.im};
  const Complex<T, V> n2 = {s2 * p.re - s1 * q.re, s2 * p.im - s1 * q.im};
  x[0] = first + a + b;
  x[1] = m1 + n1;
  x[2] = m2 + n2;
  x[3] = m2 - n2;
  x[4] = m1 - n1;
}

// Where a transform reads or writes: element i at data + i·step, `count` of them; the others read
// as zero and are not written. The imaginary part stands `imaginary` elements after the real one:
// to exchange the two on both sides of a transform inverts it.
template <class T>
struct Sequence {
  T* data;
  int64_t step, count, imaginary;
};

template <class T, int V>
inline Sequence<T> in_order(T* data, int64_t n) {
  return {data, 2 * V, n, V};
}
template <class T>
inline Sequence<T> inverted(Sequence<T> s) {
  return {s.data + s.imaginary, s.step, s.count, -s.imaginary};
}

template <class T, int V>
inline Complex<T, V> get(const Sequence<T>& s, int64_t i) {
  const T* at = s.data + i * s.step;
  return {load_aligned<V>(at), load_aligned<V>(at + s.imaginary)};
}
template <class T, int V>
inline void put(const Sequence<T>& s, int64_t i, Complex<T, V> value) {
  T* at = s.data + i * s.step;
  store_aligned<V>(at, value.re);
  store_aligned<V>(at + s.imaginary, value.im);
}

// One stage: `n` elements are left to transform in each of `s` interleaved groups.
template <class T, int V, int R, bool kClipLoads, bool kClipStores>
void fft_stage(const Sequence<T>& from, const Sequence<T>& to, int64_t n, int64_t s,
               const T* twiddles) {
  const int64_t m = n / R;
  for (int64_t q = 0; q < m; ++q, twiddles += 2 * (R - 1))
    for (int64_t k = 0; k < s; ++k) {
      Complex<T, V> x[R];
#pragma GCC unroll kUnroll
      for (int j = 0; j < R; ++j) {
        const int64_t i = k + s * (q + m * j);
        if (!kClipLoads || i < from.count)
          x[j] = get<T, V>(from, i);
        else
          x[j] = Complex<T, V>{};
      }
      butterfly<T, V>(x);
      if (q > 0) {
#pragma GCC unroll kUnroll
        for (int j = 1; j < R; ++j)
          x[j] =
              times<T, V>(x[j], splat<T, V>(twiddles[2 * j - 2]), splat<T, V>(twiddles[2 * j - 1]));
      }
#pragma GCC unroll kUnroll
      for (int j = 0; j < R; ++j) {
        const int64_t i = k + s * (R * q + j);
        if (!kClipStores || i < to.count) put<T, V>(to, i, x[j]);
      }
    }
}

template <class T, int V, bool kClipLoads, bool kClipStores>
void fft_stage_of(int radix, const Sequence<T>& from, const Sequence<T>& to, int64_t n, int64_t s,
                  const T* twiddles) {
  switch (radix) {
    case 2: return fft_stage<T, V, 2, kClipLoads, kClipStores>(from, to, n, s, twiddles);
    case 3: return fft_stage<T, V, 3, kClipLoads, kClipStores>(from, to, n, s, twiddles);
    case 4: return fft_stage<T, V, 4, kClipLoads, kClipStores>(from, to, n, s, twiddles);
    default: return fft_stage<T, V, 5, kClipLoads, kClipStores>(from, to, n, s, twiddles);
  }
}

// The transform of `from` into `to`, by way of two buffers of 2·size·V elements each. `to` may be
// `from`, and either may be `first` where there is more than one stage.
template <class T, int V>
__attribute__((noinline)) void fft(const lka::cpu::FftPlan& plan, const Sequence<T>& from,
                                   const Sequence<T>& to, T* first, T* second) {
  const T* twiddles = static_cast<const T*>(plan.twiddles);
  const int last = plan.num_stages - 1;
  int64_t n = plan.size, s = 1;
  Sequence<T> source = from;
  for (int stage = 0; stage <= last; ++stage) {
    const int radix = plan.radices[stage];
    const Sequence<T> target =
        stage == last ? to : in_order<T, V>(stage % 2 ? first : second, plan.size);
    if (stage == 0)
      fft_stage_of<T, V, true, true>(radix, source, target, n, s, twiddles);
    else if (stage == last)
      fft_stage_of<T, V, false, true>(radix, source, target, n, s, twiddles);
    else
      fft_stage_of<T, V, false, false>(radix, source, target, n, s, twiddles);
    twiddles += 2 * (radix - 1) * (n / radix);
    n /= radix;
    s *= radix;
    source = target;
  }
}

}  // namespace
