// Products of the tensor cores and the 16-bit types that they take (PTX ISA, mma.sync and ldmatrix,
// compute capability 8.0 and up). The scalar twins are in tests/cuda_on_cpu.
#pragma once

#include "memory.cuh"

namespace lka::cuda {

struct Float16 {};
struct BFloat16 {};

template <class Storage>
LKA_DEVICE float widen(uint16_t bits);
template <class Storage>
LKA_DEVICE uint16_t narrow(float value);
// Two neighbours, the first in the lower half.
template <class Storage>
LKA_DEVICE uint32_t narrow_pair(float low, float high);

// d += a·b for a 16×16 and b 16×8. With g = lane / 4 and i = lane % 4 · 2 a lane holds
//   a: (g, i..), (g + 8, i..), (g, i + 8..), (g + 8, i + 8..), two neighbouring columns each,
//   b: (i.., g), (i + 8.., g), two neighbouring rows each,
//   d: (g, i), (g, i + 1), (g + 8, i), (g + 8, i + 1).
template <class Storage>
LKA_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// The same of 8 terms: the first half of what a lane holds of a and b.
template <class Storage>
LKA_DEVICE void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

#ifdef __CUDACC__

template <>
LKA_DEVICE float widen<Float16>(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
template <>
LKA_DEVICE float widen<BFloat16>(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}
template <>
LKA_DEVICE uint16_t narrow<Float16>(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <>
LKA_DEVICE uint16_t narrow<BFloat16>(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

template <>
LKA_DEVICE uint32_t narrow_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
LKA_DEVICE uint32_t narrow_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#define LKA_MMA(TYPE)                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
               "{%0, %1, %2, %3};"                                    \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
LKA_DEVICE void mma_16x8x16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  LKA_MMA("f16");
}
template <>
LKA_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  LKA_MMA("bf16");
}
#undef LKA_MMA

#define LKA_MMA(TYPE)                                                     \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE      \
               ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])           \
               : "r"(a[0]), "r"(a[1]), "r"(b))
template <>
LKA_DEVICE void mma_16x8x8<Float16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  LKA_MMA("f16");
}
template <>
LKA_DEVICE void mma_16x8x8<BFloat16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  LKA_MMA("bf16");
}
#undef LKA_MMA

#else

template <>
inline float widen<Float16>(uint16_t bits) {
  return cuda_on_cpu::half_to_float(bits);
}
template <>
inline float widen<BFloat16>(uint16_t bits) {
  return cuda_on_cpu::bfloat_to_float(bits);
}
template <>
inline uint16_t narrow<Float16>(float value) {
  return cuda_on_cpu::float_to_half(value);
}
template <>
inline uint16_t narrow<BFloat16>(float value) {
  return cuda_on_cpu::float_to_bfloat(value);
}
template <class Storage>
inline uint32_t narrow_pair(float low, float high) {
  return narrow<Storage>(low) | uint32_t(narrow<Storage>(high)) << 16;
}
template <class Storage>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_on_cpu::mma_16x8x16(d, a, b, widen<Storage>);
}
template <class Storage>
inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma_16x8x16<Storage>(d, {a[0], a[1], 0, 0}, {b, 0});
}

#endif

// Where an element lies in shared memory: 32 bits on a GPU, so that constants are added within the
// instruction that loads.
#ifdef __CUDACC__
struct SharedAddress {
  uint32_t bytes;

  LKA_DEVICE SharedAddress after(int elements) const { return {bytes + 2 * uint32_t(elements)}; }
};
LKA_DEVICE SharedAddress shared_address(const uint16_t* element) {
  return {uint32_t(__cvta_generic_to_shared(element))};
}
#else
struct SharedAddress {
  const uint16_t* element;

  SharedAddress after(int elements) const { return {element + elements}; }
};
inline SharedAddress shared_address(const uint16_t* element) { return {element}; }
#endif

// Two neighbours.
LKA_DEVICE uint32_t load_pair(SharedAddress from) {
#ifdef __CUDACC__
  uint32_t pair;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(from.bytes) : "memory");
  return pair;
#else
  return load_shared(reinterpret_cast<const uint32_t*>(from.element));
#endif
}

// Four 8×8 matrices from shared memory: lane 8·n + r gives the address of row r of matrix n, 16
// bytes, and receives of each matrix its row lane / 4, columns lane % 4 · 2 and the next.
LKA_DEVICE void load_matrices(uint32_t (&m)[4], SharedAddress row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row.bytes)
               : "memory");
#else
  cuda_on_cpu::load_matrices(m, row.element);
#endif
}
LKA_DEVICE void load_matrices(uint32_t (&m)[4], const uint16_t* row) {
  load_matrices(m, shared_address(row));
}

// The same, but of each matrix the lane receives column lane / 4, rows lane % 4 · 2 and the next.
LKA_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row) {
#ifdef __CUDACC__
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
#else
  cuda_on_cpu::load_matrices_transposed(m, row);
#endif
}

// An 8×8 matrix in registers, transposed: a lane gives row lane / 4, columns lane % 4 · 2 and the
// next, and receives column lane / 4, those rows (PTX ISA, movmatrix).
LKA_DEVICE uint32_t transpose_matrix(uint32_t pair) {
#ifdef __CUDACC__
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#else
  return cuda_on_cpu::transpose_matrix(pair);
#endif
}

LKA_DEVICE uint32_t pack(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

}  // namespace lka::cuda
