// CUDA device code on a CPU: what it needs of the language, one fiber for each thread, a block
// barrier, warp shuffles, scalar twins of the instructions in csrc/cuda/device/{mma,cp_async}.cuh,
// and a checker of memory accesses. Blocks run one after another, threads one at a time: this
// proves indices and arithmetic and finds missing barriers, not speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define __device__
#define __host__
#define __forceinline__ inline

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Memory that a kernel may touch. Everything else is out of range.
struct Range {
  const char* name;
  const void* begin;
  size_t bytes;
  bool writable;
  // Of every two bytes, whether a kernel has written them: no other may be read. Null: all are
  // given.
  char* written = nullptr;
};

struct Launch {
  int64_t blocks = 1;
  int threads = 32;
  size_t shared_bytes = 0;
};

// Runs kernel(shared) for every thread of every block. The first mistake ends the launch; the
// result says what it was, and is empty if there was none.
std::string run(const Launch& launch, const Range* ranges, int num_ranges,
                const std::function<void(char*)>& kernel);

extern Index thread_index, block_index, block_size;

void barrier();
void warp_barrier();
// Gathers 4 bytes of every lane of the warp.
void exchange(uint32_t value, uint32_t (&all)[32]);

void check_global_load(const void* at, size_t bytes);
void check_global_store(const void* at, size_t bytes);
void check_shared_load(const void* at, size_t bytes);
void check_shared_store(const void* at, size_t bytes);

void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int groups);
void load_matrices(uint32_t (&m)[4], const uint16_t* row);
void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row);
uint32_t transpose_matrix(uint32_t pair);
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 float (*widen)(uint16_t));

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  uint32_t bits, all[32];
  __builtin_memcpy(&bits, &value, 4);
  exchange(bits, all);
  __builtin_memcpy(&value, &all[(thread_index.x % 32) ^ mask], 4);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline void __syncwarp() { cuda_on_cpu::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle_xor(value, mask);
}
