// Copies from global to shared memory that need no registers and are waited for in groups (PTX ISA,
// cp.async). The scalar twins are in tests/cuda_on_cpu.
#pragma once

#include "memory.cuh"

namespace lka::cuda {

// Copies `valid` of kBytes bytes (4, 8 or 16) and fills the rest with zeros; both addresses are
// multiples of kBytes. With valid = 0 nothing is read; otherwise all kBytes must be memory that may
// be read: how much of it the copy touches is the machine's choice.
template <int kBytes>
LKA_DEVICE void cp_async(void* shared, const void* global, int valid) {
#ifdef __CUDACC__
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes),
               "r"(valid)
               : "memory");
#else
  cuda_on_cpu::cp_async(shared, global, kBytes, valid);
#endif
}

// Closes the group of copies that this thread has begun since the last one.
LKA_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_cpu::cp_async_commit();
#endif
}

// Waits until at most kGroups groups of this thread are under way.
template <int kGroups>
LKA_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  cuda_on_cpu::cp_async_wait(kGroups);
#endif
}

}  // namespace lka::cuda
