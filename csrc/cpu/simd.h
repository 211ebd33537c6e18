// A thin SIMD type over the compiler's vector extensions: one source for every width.
//
// Everything here lives in an anonymous namespace: each instruction set compiles its own copy, and
// the linker must never merge an AVX-512 copy into code that runs on an older machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(LKA_F16C)
#include <immintrin.h>
#endif

namespace {

// How far kernels unroll the loops that keep sums in registers. Not under AddressSanitizer, whose
// checks in every unrolled line take minutes to compile.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kUnroll = 1;
#else
constexpr int kUnroll = 16;
#endif

// Storage of 16-bit types; arithmetic happens in float.
struct bfloat16_t {
  uint16_t bits;
};
struct float16_t {
  uint16_t bits;
};

template <class T, int V>
struct VectorOf {
  typedef T type __attribute__((vector_size(V * sizeof(T)), may_alias));
  typedef T unaligned __attribute__((vector_size(V * sizeof(T)), may_alias, aligned(sizeof(T))));
};
template <class T, int V>
using Vec = typename VectorOf<T, V>::type;
template <class T, int V>
using UnalignedVec = typename VectorOf<T, V>::unaligned;

// The integer type as wide as T, for bit tricks.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

template <class T, int V>
inline Vec<T, V> splat(T value) {
  return Vec<T, V>{} + value;
}

template <int V, class T>
inline Vec<T, V> load_aligned(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}

template <int V, class T>
inline void store_aligned(T* p, Vec<T, V> v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  uint32_t magnitude = bits & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    magnitude = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    memcpy(&value, &magnitude, 4);
  } else {  // scaling by 2^112 rebiases normal numbers and normalises subnormal ones
    magnitude <<= 13;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
  }
  uint32_t out;
  memcpy(&out, &value, 4);
  out |= sign;
  memcpy(&value, &out, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to at least 65536
  if (bits < 0x38800000u) {                        // subnormal: let the adder round
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1);  // round to nearest even
  return sign | uint16_t((bits - 0x38000000u) >> 13);
}

// Load V elements of storage type S and widen them to T.
template <class T, int V>
inline Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const UnalignedVec<T, V>*>(p);
}

template <class T, int V>
inline Vec<T, V> load(const bfloat16_t* p) {
  typedef uint16_t narrow __attribute__((vector_size(V * 2), may_alias, aligned(2)));
  const auto wide = __builtin_convertvector(*reinterpret_cast<const narrow*>(p), Vec<uint32_t, V>);
  return (Vec<T, V>)(wide << 16);
}

template <class T, int V>
inline Vec<T, V> load(const float16_t* p) {
#if defined(LKA_AVX512)
  if constexpr (V == 16)
    return (Vec<T, V>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
#if defined(LKA_F16C)
  if constexpr (V == 8)
    return (Vec<T, V>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  Vec<T, V> out;
  for (int i = 0; i < V; ++i) out[i] = half_to_float(p[i].bits);
  return out;
}

// Narrow V elements of T to storage type S (round to nearest even) and store them.
template <class T, int V>
inline void store(T* p, Vec<T, V> v) {
  *reinterpret_cast<UnalignedVec<T, V>*>(p) = v;
}

template <class T, int V>
inline void store(bfloat16_t* p, Vec<T, V> v) {
  typedef uint16_t narrow __attribute__((vector_size(V * 2), may_alias, aligned(2)));
  const auto bits = (Vec<uint32_t, V>)v;
  const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const auto out = is_nan ? (bits >> 16 | 0x40u) : rounded;
  *reinterpret_cast<narrow*>(p) = __builtin_convertvector(out, narrow);
}

template <class T, int V>
inline void store(float16_t* p, Vec<T, V> v) {
#if defined(LKA_AVX512)
  if constexpr (V == 16) {
    const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
    return;
  }
#endif
#if defined(LKA_F16C)
  if constexpr (V == 8) {
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
    return;
  }
#endif
  for (int i = 0; i < V; ++i) p[i].bits = float_to_half(v[i]);
}

#if defined(LKA_AVX512)
// Elements of 4, 8 or 2 bytes where the mask has a bit, by one instruction; others are not touched.
template <class T, int V, class S>
inline Vec<T, V> load_masked(const S* p, uint32_t mask) {
  constexpr int kBytes = V * sizeof(S);
  if constexpr (sizeof(S) == 4 && kBytes == 64)
    return (Vec<T, V>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  else if constexpr (sizeof(S) == 4 && kBytes == 32)
    return (Vec<T, V>)_mm256_maskz_loadu_ps(__mmask8(mask), p);
  else if constexpr (sizeof(S) == 8 && kBytes == 64)
    return (Vec<T, V>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  else if constexpr (sizeof(S) == 8 && kBytes == 32)
    return (Vec<T, V>)_mm256_maskz_loadu_pd(__mmask8(mask), p);
  S padded[V];
  if constexpr (kBytes == 32)
    _mm256_storeu_si256((__m256i*)padded, _mm256_maskz_loadu_epi16(__mmask16(mask), p));
  else
    _mm_storeu_si128((__m128i*)padded, _mm_maskz_loadu_epi16(__mmask8(mask), p));
  return load<T, V>(padded);
}

template <class T, int V, class S>
inline void store_masked(S* p, Vec<T, V> v, uint32_t mask) {
  constexpr int kBytes = V * sizeof(S);
  if constexpr (sizeof(S) == 4 && kBytes == 64)
    return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  else if constexpr (sizeof(S) == 4 && kBytes == 32)
    return _mm256_mask_storeu_ps(p, __mmask8(mask), (__m256)v);
  else if constexpr (sizeof(S) == 8 && kBytes == 64)
    return _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  else if constexpr (sizeof(S) == 8 && kBytes == 32)
    return _mm256_mask_storeu_pd(p, __mmask8(mask), (__m256d)v);
  S padded[V];
  store<T, V>(padded, v);
  if constexpr (kBytes == 32)
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_loadu_si256((const __m256i*)padded));
  else
    _mm_mask_storeu_epi16(p, __mmask8(mask), _mm_loadu_si128((const __m128i*)padded));
}

template <class S, int V>
constexpr bool kHasMasks =
    V * sizeof(S) == 64 || V * sizeof(S) == 32 || (sizeof(S) == 2 && V * sizeof(S) == 16);
#endif

// The first `count` elements only; the rest of the vector is zero.
template <class T, int V, class S>
inline Vec<T, V> load_some(const S* p, int count) {
  if (count >= V) return load<T, V>(p);
#if defined(LKA_AVX512)
  if constexpr (kHasMasks<S, V>) return load_masked<T, V, S>(p, (uint32_t(1) << count) - 1);
#endif
  S padded[V] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return load<T, V>(padded);
}

template <class T, int V, class S>
inline void store_some(S* p, Vec<T, V> v, int count) {
  if (count >= V) return store<T, V>(p, v);
#if defined(LKA_AVX512)
  if constexpr (kHasMasks<S, V>) return store_masked<T, V, S>(p, v, (uint32_t(1) << count) - 1);
#endif
  S padded[V];
  store<T, V>(padded, v);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}

template <class T, class S>
inline T load_one(const S* p) {
  return load_some<T, 4, S>(p, 1)[0];
}

// Swap blocks of D columns between rows I and I + D; all D in turn transpose the square.
template <int D, bool kUpper, class V, int... J>
inline V exchange(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  if constexpr (kUpper)
    return __builtin_shufflevector(a, b, ((J & D) ? n + J - D : J)...);
  else
    return __builtin_shufflevector(a, b, ((J & D) ? n + J : J + D)...);
}

template <class T, int V, int D = V / 2>
inline void transpose(Vec<T, V> (&rows)[V]) {
  if constexpr (D >= 1) {
    using Lanes = std::make_integer_sequence<int, V>;
    for (int i = 0; i < V; ++i) {
      if (i & D) continue;
      const auto a = rows[i], b = rows[i + D];
      rows[i] = exchange<D, true>(a, b, Lanes{});
      rows[i + D] = exchange<D, false>(a, b, Lanes{});
    }
    transpose<T, V, D / 2>(rows);
  }
}

}  // namespace
