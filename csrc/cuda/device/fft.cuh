// Discrete Fourier transforms of a few complex numbers in registers.
#pragma once

#include "memory.cuh"

namespace lka::cuda {

struct alignas(8) Complex {
  float re, im;
};

LKA_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
LKA_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
LKA_DEVICE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
LKA_DEVICE Complex conjugate(Complex a) { return {a.re, -a.im}; }
LKA_DEVICE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }

// a·exp(-2πi·power/16), `power` known once loops are unrolled.
LKA_DEVICE Complex times_root_16(Complex a, int power) {
  constexpr float kHalf = 0.70710678f;                     // cos π/4
  constexpr float kCos = 0.92387953f, kSin = 0.38268343f;  // of π/8
  switch (power) {
    case 0: return a;
    case 1: return a * Complex{kCos, -kSin};
    case 2: return {kHalf * (a.re + a.im), kHalf * (a.im - a.re)};
    case 3: return a * Complex{kSin, -kCos};
    case 4: return times_minus_i(a);
    case 6: return {kHalf * (a.im - a.re), -kHalf * (a.re + a.im)};
    default: return a * Complex{-kCos, kSin};  // 9
  }
}

// v[k] = Σ v[n]·exp(-2πi·nk/kRadix), in natural order.
template <int kRadix>
LKA_DEVICE void dft(Complex (&v)[kRadix]);

template <>
LKA_DEVICE void dft<2>(Complex (&v)[2]) {
  const Complex a = v[0];
  v[0] = a + v[1];
  v[1] = a - v[1];
}

template <>
LKA_DEVICE void dft<3>(Complex (&v)[3]) {
  constexpr float kSin = 0.86602540f;  // of π/3
  const Complex sum = v[1] + v[2], difference = times_minus_i(v[1] - v[2]);
  const Complex middle = {v[0].re - 0.5f * sum.re, v[0].im - 0.5f * sum.im};
  v[0] = v[0] + sum;
  v[1] = {middle.re + kSin * difference.re, middle.im + kSin * difference.im};
  v[2] = {middle.re - kSin * difference.re, middle.im - kSin * difference.im};
}

template <>
LKA_DEVICE void dft<4>(Complex (&v)[4]) {
  const Complex a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3];
  const Complex d = times_minus_i(v[1] - v[3]);
  v[0] = a + c;
  v[1] = b + d;
  v[2] = a - c;
  v[3] = b - d;
}

namespace detail {

// n = n1·kP + n2 and k = k1 + 4·k2, for kP of 2 and 4.
template <int kP>
LKA_DEVICE void dft_of_fours(Complex (&v)[4 * kP]) {
  Complex parts[kP][4];
#pragma unroll
  for (int n2 = 0; n2 < kP; ++n2) {
#pragma unroll
    for (int n1 = 0; n1 < 4; ++n1) parts[n2][n1] = v[n1 * kP + n2];
    dft<4>(parts[n2]);
  }
#pragma unroll
  for (int k1 = 0; k1 < 4; ++k1) {
    Complex across[kP];
#pragma unroll
    for (int n2 = 0; n2 < kP; ++n2) across[n2] = times_root_16(parts[n2][k1], n2 * k1 * (4 / kP));
    dft<kP>(across);
#pragma unroll
    for (int k2 = 0; k2 < kP; ++k2) v[k1 + 4 * k2] = across[k2];
  }
}

}  // namespace detail

template <>
LKA_DEVICE void dft<8>(Complex (&v)[8]) {
  detail::dft_of_fours<2>(v);
}
// Factors without a common divisor need no twiddles (Good 1958): n = 3·n1 + 4·n2 modulo 12, and k
// is k1 modulo 4, k2 modulo 3.
template <>
LKA_DEVICE void dft<12>(Complex (&v)[12]) {
  Complex parts[3][4];
#pragma unroll
  for (int n2 = 0; n2 < 3; ++n2) {
#pragma unroll
    for (int n1 = 0; n1 < 4; ++n1) parts[n2][n1] = v[(3 * n1 + 4 * n2) % 12];
    dft<4>(parts[n2]);
  }
#pragma unroll
  for (int k1 = 0; k1 < 4; ++k1) {
    Complex across[3] = {parts[0][k1], parts[1][k1], parts[2][k1]};
    dft<3>(across);
#pragma unroll
    for (int k2 = 0; k2 < 3; ++k2) v[(9 * k1 + 4 * k2) % 12] = across[k2];
  }
}
template <>
LKA_DEVICE void dft<16>(Complex (&v)[16]) {
  detail::dft_of_fours<4>(v);
}

// The inverse without its factor 1 / kRadix: real and imaginary parts change places before and
// after, which costs nothing in registers.
template <int kRadix>
LKA_DEVICE void inverse_dft(Complex (&v)[kRadix]) {
#pragma unroll
  for (int i = 0; i < kRadix; ++i) v[i] = {v[i].im, v[i].re};
  dft<kRadix>(v);
#pragma unroll
  for (int i = 0; i < kRadix; ++i) v[i] = {v[i].im, v[i].re};
}

// v[k]·w^k, or by the conjugate, given the first four powers of w: a table of all would be loaded
// from shared memory, which is what transforms wait for.
template <bool kConjugate, int kRadix>
LKA_DEVICE void multiply_by_powers(Complex (&v)[kRadix], const Complex (&w)[4]) {
  Complex power[4] = {w[3], w[0], w[1], w[2]};
#pragma unroll
  for (int k = 1; k < kRadix; ++k) {
    if (k > 4) power[k % 4] = power[k % 4] * w[3];
    v[k] = v[k] * (kConjugate ? conjugate(power[k % 4]) : power[k % 4]);
  }
}

}  // namespace lka::cuda
