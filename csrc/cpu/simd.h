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
constexpr int kUnroll = 1, kUnrollColumns = 1;
#else
constexpr int kUnroll = 16, kUnrollColumns = 32;
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

// A number as a type, for generic lambdas.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// call(Constant<0>) or call(Constant<1>).
template <class Call>
__attribute__((always_inline)) inline void with_flag(bool flag, const Call& call) {
  if (flag)
    call(Constant<1>{});
  else
    call(Constant<0>{});
}

// Minus zero, not plus: that would make 0 of -0, and so be an addition at run time.
template <class T, int V>
inline Vec<T, V> splat(T value) {
  return value - Vec<T, V>{};
}

template <int V, class T>
inline Vec<T, V> load_aligned(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}

template <int V, class T>
inline void store_aligned(T* p, Vec<T, V> v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}

// Have a vector loaded once: the compiler would rather read memory again for every use.
template <class V>
__attribute__((always_inline)) inline void keep_in_register(V& v) {
#if defined(LKA_F16C)  // every vector fits a register
  asm("" : "+v"(v));
#endif
}
// Have a pointer advanced by additions: the compiler would rather keep every multiple of a step
// that a loop needs, and has no registers for them.
template <class T>
__attribute__((always_inline)) inline void keep_in_register(T*& p) {
  asm("" : "+r"(p));
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

// V elements of a 16-bit type, widened and narrowed (round to nearest even).
template <int V>
using Bits16 = Vec<uint16_t, V>;

template <int V>
inline Vec<uint32_t, V> zero_extend(Bits16<V> bits) {
#if defined(LKA_AVX512)  // GCC 12 would convert two halves
  if constexpr (V == 16) return (Vec<uint32_t, V>)_mm512_cvtepu16_epi32((__m256i)bits);
#endif
  return __builtin_convertvector(bits, Vec<uint32_t, V>);
}

template <int V>
inline Vec<float, V> widen(Bits16<V> bits, bfloat16_t) {
  return (Vec<float, V>)(zero_extend<V>(bits) << 16);
}

template <int V>
inline Vec<float, V> widen(Bits16<V> bits, float16_t) {
#if defined(LKA_AVX512)
  if constexpr (V == 16) return (Vec<float, V>)_mm512_cvtph_ps((__m256i)bits);
#endif
#if defined(LKA_F16C)
  if constexpr (V == 8) return (Vec<float, V>)_mm256_cvtph_ps((__m128i)bits);
#endif
  Vec<float, V> out;
  for (int i = 0; i < V; ++i) out[i] = half_to_float(bits[i]);
  return out;
}

// Results below the smallest normal number, 1.2e-38, become zero where the processor's instruction
// is used, as they do in oneDNN.
template <int V>
inline Bits16<V> narrow(Vec<float, V> v, bfloat16_t) {
#if defined(LKA_AVX512_BF16)
  if constexpr (V == 16) return (Bits16<V>)_mm512_cvtneps_pbh((__m512)v);
  if constexpr (V == 8) return (Bits16<V>)_mm256_cvtneps_pbh((__m256)v);
#endif
  const auto bits = (Vec<uint32_t, V>)v;
  const auto rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const auto out = v != v ? bits | 0x400000u : rounded;
  return __builtin_convertvector(out >> 16, Bits16<V>);
}

template <int V>
inline Bits16<V> narrow(Vec<float, V> v, float16_t) {
#if defined(LKA_AVX512)
  if constexpr (V == 16)
    return (Bits16<V>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
#if defined(LKA_F16C)
  if constexpr (V == 8)
    return (Bits16<V>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  Bits16<V> out;
  for (int i = 0; i < V; ++i) out[i] = float_to_half(v[i]);
  return out;
}

// Half of a vector's lanes, from `kFirst` on, and two halves side by side.
template <class E, int V, int kFirst, int... J>
inline Vec<E, V / 2> half_of(Vec<E, V> v, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(v, v, (kFirst + J)...);
}
template <class E, int V, int... J>
inline Vec<E, V> join(Vec<E, V / 2> low, Vec<E, V / 2> high, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(low, high, J...);
}

// The first `count` elements, fewer than V, where there are no masks: in pieces of halves, quarters
// and so on. A vector put together in memory would wait for its elements to reach the cache.
template <class E, int V>
inline Vec<E, V> load_pieces(const E* p, int count) {
  if constexpr (V == 2) {
    return Vec<E, V>{count > 0 ? p[0] : E(0), E(0)};
  } else {
    constexpr int kHalf = V / 2;
    using Half = Vec<E, kHalf>;
    const bool more = count >= kHalf;
    const Half low = more ? Half(*reinterpret_cast<const UnalignedVec<E, kHalf>*>(p))
                          : load_pieces<E, kHalf>(p, count);
    const Half high = more ? load_pieces<E, kHalf>(p + kHalf, count - kHalf) : Half{};
    return join<E, V>(low, high, std::make_integer_sequence<int, V>{});
  }
}
template <class E, int V>
inline void store_pieces(E* p, Vec<E, V> v, int count) {
  if constexpr (V == 2) {
    if (count > 0) p[0] = v[0];
  } else {
    constexpr int kHalf = V / 2;
    const std::make_integer_sequence<int, kHalf> lanes;
    if (count < kHalf) return store_pieces<E, kHalf>(p, half_of<E, V, 0>(v, lanes), count);
    *reinterpret_cast<UnalignedVec<E, kHalf>*>(p) = half_of<E, V, 0>(v, lanes);
    store_pieces<E, kHalf>(p + kHalf, half_of<E, V, kHalf>(v, lanes), count - kHalf);
  }
}

// The first `count` elements of a 16-bit type; the rest is zero.
template <int V>
inline Bits16<V> load_bits(const void* p, int count = V) {
  if (count >= V) return *reinterpret_cast<const UnalignedVec<uint16_t, V>*>(p);
#if defined(LKA_AVX512)
  const uint32_t mask = (uint32_t(1) << count) - 1;
  if constexpr (V == 16) return (Bits16<V>)_mm256_maskz_loadu_epi16(__mmask16(mask), p);
  if constexpr (V == 8) return (Bits16<V>)_mm_maskz_loadu_epi16(__mmask8(mask), p);
#endif
  return load_pieces<uint16_t, V>(static_cast<const uint16_t*>(p), count);
}

// Load V elements of storage type S and widen them to T.
template <class T, int V, class S>
inline Vec<T, V> load(const S* p) {
  if constexpr (sizeof(S) == 2)
    return widen<V>(load_bits<V>(p), S{});
  else
    return *reinterpret_cast<const UnalignedVec<T, V>*>(p);
}

// Narrow V elements of T to storage type S and store them.
template <class T, int V, class S>
inline void store(S* p, Vec<T, V> v) {
  if constexpr (sizeof(S) == 2)
    *reinterpret_cast<UnalignedVec<uint16_t, V>*>(p) = narrow<V>(v, S{});
  else
    *reinterpret_cast<UnalignedVec<T, V>*>(p) = v;
}

#if defined(LKA_AVX512)
// Elements where the mask has a bit, by one instruction; others are not touched.
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
  else if constexpr (kBytes == 32)
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)narrow<V>(v, S{}));
  else
    _mm_mask_storeu_epi16(p, __mmask8(mask), (__m128i)narrow<V>(v, S{}));
}

template <class S, int V>
constexpr bool kHasMasks =
    V * sizeof(S) == 64 || V * sizeof(S) == 32 || (sizeof(S) == 2 && V * sizeof(S) == 16);
#endif

// The first `count` elements only; the rest of the vector is zero.
template <class T, int V, class S>
inline Vec<T, V> load_some(const S* p, int count) {
  if constexpr (sizeof(S) == 2) {
    return widen<V>(load_bits<V>(p, count), S{});
  } else {
    if (count >= V) return load<T, V>(p);
#if defined(LKA_AVX512)
    if constexpr (kHasMasks<S, V>) return load_masked<T, V, S>(p, (uint32_t(1) << count) - 1);
#endif
    return load_pieces<S, V>(p, count);
  }
}

template <class T, int V, class S>
inline void store_some(S* p, Vec<T, V> v, int count) {
  if (count >= V) return store<T, V>(p, v);
#if defined(LKA_AVX512)
  if constexpr (kHasMasks<S, V>) return store_masked<T, V, S>(p, v, (uint32_t(1) << count) - 1);
#endif
  if constexpr (sizeof(S) == 2)
    store_pieces<uint16_t, V>(reinterpret_cast<uint16_t*>(p), narrow<V>(v, S{}), count);
  else
    store_pieces<S, V>(p, v, count);
}

template <class T, class S>
inline T load_one(const S* p) {
  if constexpr (sizeof(S) > 2)
    return *p;
  else
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

// Half as many partial sums of a and of b, those of a in the lanes J without bit D.
template <int D, class V, int... J>
inline V fold_pair(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  return __builtin_shufflevector(a, b, ((J & D) ? n + J - D : J)...) +
         __builtin_shufflevector(a, b, ((J & D) ? n + J : J + D)...);
}

// V/N partial sums of each of N vectors kStep apart, side by side; N is a power of two.
template <class T, int V, int N, int kStep = 1>
inline Vec<T, V> fold(const Vec<T, V>* vectors) {
  if constexpr (N == 1)
    return vectors[0];
  else
    return fold_pair<V / N>(fold<T, V, N / 2, 2 * kStep>(vectors),
                            fold<T, V, N / 2, 2 * kStep>(vectors + kStep),
                            std::make_integer_sequence<int, V>{});
}

}  // namespace
