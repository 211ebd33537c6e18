// Loads and stores of tensor-core kernels. On a GPU they are plain accesses; compiled for the CPU
// (tests/cuda_on_cpu) each one is checked, which a bare dereference could not be.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LKA_DEVICE __device__ __forceinline__
#else
#include "cuda_on_cpu.h"
#define LKA_DEVICE inline
#endif

namespace lka::cuda {

// 16 bytes that move in one instruction.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

template <class T>
LKA_DEVICE T load_global(const T* from) {
#ifndef __CUDACC__
  cuda_on_cpu::check_global_load(from, sizeof(T));
#endif
  return *from;
}

template <class T>
LKA_DEVICE void store_global(T* to, T value) {
#ifndef __CUDACC__
  cuda_on_cpu::check_global_store(to, sizeof(T));
#endif
  *to = value;
}

template <class T>
LKA_DEVICE T load_shared(const T* from) {
#ifndef __CUDACC__
  cuda_on_cpu::check_shared_load(from, sizeof(T));
#endif
  return *from;
}

template <class T>
LKA_DEVICE void store_shared(T* to, T value) {
#ifndef __CUDACC__
  cuda_on_cpu::check_shared_store(to, sizeof(T));
#endif
  *to = value;
}

}  // namespace lka::cuda
