// Kernels with one mistake each, and one with none: what the checker must and must not report.
#include <cstring>
#include <map>
#include <string>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma.cuh"

namespace {

using namespace lka::cuda;

constexpr int kThreads = 64;
constexpr size_t kSharedBytes = 1024;
// Apart from each other, so that what lies beside one is not the other.
float memory[2048];
float* const input = memory + 512;
float* const output = memory + 1536;
float* const cut_off = memory + 1024;  // two elements, fewer than a vector

float* floats(char* shared) { return reinterpret_cast<float*>(shared); }
int thread() { return int(threadIdx.x); }

// Copies by cp.async, waits, turns the order of threads around through shared memory.
void sound(char* shared) {
  cp_async<4>(floats(shared) + thread(), input + thread(), 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float other = load_shared(floats(shared) + kThreads - 1 - thread());
  __syncthreads();
  store_shared(floats(shared) + thread(), other);
  store_global(output + thread(), __shfl_xor_sync(0xffffffffu, other, 1));
}

void global_load_below(char*) { load_global(input - 1 + thread()); }
void global_load_above(char*) { load_global(input + 193 + thread()); }
void global_load_unaligned(char*) {
  load_global(reinterpret_cast<const float*>(reinterpret_cast<const char*>(input) + 2));
}
void global_store_above(char*) { store_global(output + 1 + thread(), 0.0f); }
void global_store_to_input(char*) { store_global(input, 0.0f); }
void global_load_unwritten(char*) {
  if (thread() != 5) store_global(output + thread(), 0.0f);
  __syncthreads();
  load_global(output + 5);
}
void shared_load_above(char* shared) { load_shared(floats(shared) + 256); }
void shared_store_below(char* shared) { store_shared(floats(shared) - 1, 0.0f); }
void shared_load_unaligned(char* shared) {
  store_shared(floats(shared), 0.0f);
  load_shared(reinterpret_cast<const float*>(shared + 2));
}
void shared_load_unwritten(char* shared) {
  if (thread() != 5) store_shared(floats(shared) + thread(), 0.0f);
  __syncthreads();
  load_shared(floats(shared) + 5);
}
void no_barrier(char* shared) {
  store_shared(floats(shared) + thread(), 0.0f);
  load_shared(floats(shared) + thread() / 2);
}
void no_barrier_before_reuse(char* shared) {
  store_shared(floats(shared) + thread(), 0.0f);
  __syncthreads();
  load_shared(floats(shared) + (thread() + 1) % kThreads);
  store_shared(floats(shared) + thread(), 0.0f);
}
void barrier_of_a_warp(char* shared) {
  store_shared(floats(shared) + thread(), 0.0f);
  __syncwarp();
  load_shared(floats(shared) + (thread() ^ 1));
  __syncwarp();
  store_shared(floats(shared) + (thread() ^ 1), 0.0f);
}
void barrier_of_another_warp(char* shared) {
  store_shared(floats(shared) + thread(), 0.0f);
  __syncwarp();
  load_shared(floats(shared) + thread() % 32);  // the first warp's
}
void barrier_of_a_warp_before_reuse(char* shared) {
  store_shared(floats(shared) + thread(), 0.0f);
  __syncthreads();
  if (thread() < 32) load_shared(floats(shared) + thread() + 32);
  __syncwarp();
  if (thread() >= 32) store_shared(floats(shared) + thread(), 0.0f);
}
void two_writers(char* shared) { store_shared(floats(shared), float(thread())); }
void copy_not_waited_for(char* shared) {
  cp_async<4>(floats(shared) + thread(), input + thread(), 4);
  cp_async_commit();
  __syncthreads();
  load_shared(floats(shared) + thread());
}
void copy_waited_for_too_little(char* shared) {
  for (int i = 0; i < 2; ++i) {
    cp_async<4>(floats(shared) + i * kThreads + thread(), input + thread(), 4);
    cp_async_commit();
  }
  cp_async_wait<1>();
  load_shared(floats(shared) + thread());  // has arrived
  load_shared(floats(shared) + kThreads + thread());
}
void copy_of_another_thread(char* shared) {
  cp_async<4>(floats(shared) + thread(), input + thread(), 4);
  cp_async_commit();
  cp_async_wait<0>();
  load_shared(floats(shared) + thread() / 2);
}
void copy_out_of_range(char* shared) {
  cp_async<4>(floats(shared) + thread(), input + 200 + thread(), 4);
}
void copy_of_a_part(char* shared) {
  if (thread() == 0) cp_async<16>(shared, input + 252, 4);
}
// Of 16 bytes 8 are beyond the end, though only the 8 before it are copied.
void copy_of_a_part_beyond_the_end(char* shared) {
  if (thread() == 0) cp_async<16>(shared, cut_off, 8);
}
void copy_of_nothing_out_of_range(char* shared) {
  cp_async<4>(floats(shared) + thread(), input + 100'000, 0);
}
void copy_beyond_shared(char* shared) { cp_async<16>(shared + 1024, input, 16); }
void copy_unaligned(char* shared) {
  cp_async<16>(shared, reinterpret_cast<const char*>(input) + 4, 16);
}
void barrier_of_half_the_block(char*) {
  if (thread() < 32) __syncthreads();
}
void barrier_of_some_lanes(char*) {
  if (thread() % 2) __syncthreads();
}
void shuffle_of_some_lanes(char*) {
  if (thread() != 3) __shfl_xor_sync(0xffffffffu, 0.0f, 1);
}
void different_instructions(char*) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (thread() % 2)
    mma_16x8x16<Float16>(d, a, b);
  else
    __shfl_xor_sync(0xffffffffu, 0.0f, 1);
}
void matrices_unwritten(char* shared) {
  uint32_t m[4];
  load_matrices(m, reinterpret_cast<const uint16_t*>(shared) + 8 * (thread() % 32));
}

#define LKA_KERNEL(NAME) {#NAME, NAME}
const std::map<std::string, void (*)(char*)> kernels = {
    LKA_KERNEL(sound),
    LKA_KERNEL(global_load_below),
    LKA_KERNEL(global_load_above),
    LKA_KERNEL(global_load_unaligned),
    LKA_KERNEL(global_store_above),
    LKA_KERNEL(global_store_to_input),
    LKA_KERNEL(global_load_unwritten),
    LKA_KERNEL(shared_load_above),
    LKA_KERNEL(shared_store_below),
    LKA_KERNEL(shared_load_unaligned),
    LKA_KERNEL(shared_load_unwritten),
    LKA_KERNEL(no_barrier),
    LKA_KERNEL(no_barrier_before_reuse),
    LKA_KERNEL(barrier_of_a_warp),
    LKA_KERNEL(barrier_of_another_warp),
    LKA_KERNEL(barrier_of_a_warp_before_reuse),
    LKA_KERNEL(two_writers),
    LKA_KERNEL(copy_not_waited_for),
    LKA_KERNEL(copy_waited_for_too_little),
    LKA_KERNEL(copy_of_another_thread),
    LKA_KERNEL(copy_out_of_range),
    LKA_KERNEL(copy_of_a_part),
    LKA_KERNEL(copy_of_a_part_beyond_the_end),
    LKA_KERNEL(copy_of_nothing_out_of_range),
    LKA_KERNEL(copy_beyond_shared),
    LKA_KERNEL(copy_unaligned),
    LKA_KERNEL(barrier_of_half_the_block),
    LKA_KERNEL(barrier_of_some_lanes),
    LKA_KERNEL(shuffle_of_some_lanes),
    LKA_KERNEL(different_instructions),
    LKA_KERNEL(matrices_unwritten),
};

}  // namespace

// What the checker says of a kernel.
extern "C" const char* run_kernel(const char* name) {
  static std::string said;
  for (int i = 0; i < 256; ++i) input[i] = float(i);
  char written[2 * kThreads] = {};
  const cuda_on_cpu::Range ranges[] = {{"input", input, 256 * sizeof(float), false},
                                       {"cut off", cut_off, 2 * sizeof(float), false},
                                       {"output", output, kThreads * sizeof(float), true, written}};
  said = cuda_on_cpu::run({2, kThreads, kSharedBytes}, ranges, 3, kernels.at(name));
  if (said.empty() && std::string(name) == "sound")
    for (int i = 0; i < kThreads; ++i)
      if (output[i] != float((kThreads - 1 - i) ^ 1)) said = "a wrong result";
  return said.c_str();
}

extern "C" int kernel_names(const char** names) {
  int n = 0;
  for (const auto& kernel : kernels) names[n++] = kernel.first.c_str();
  return n;
}

// One product: d += a·b, matrices by rows, 16-bit elements as bits.
extern "C" const char* multiply(int brain, const uint16_t* a, const uint16_t* b, float* d) {
  static std::string said;
  said = cuda_on_cpu::run({1, 32, 0}, nullptr, 0, [=](char*) {
    const int g = thread() / 4, i = thread() % 4 * 2;
    float sums[4];
    for (int n = 0; n < 4; ++n) sums[n] = d[(g + n / 2 * 8) * 8 + i + n % 2];
    uint32_t left[4], right[2];
    for (int n = 0; n < 4; ++n) memcpy(left + n, a + (g + n % 2 * 8) * 16 + i + n / 2 * 8, 4);
    for (int n = 0; n < 2; ++n) right[n] = pack(b[(i + 8 * n) * 8 + g], b[(i + 8 * n + 1) * 8 + g]);
    if (brain)
      mma_16x8x16<BFloat16>(sums, left, right);
    else
      mma_16x8x16<Float16>(sums, left, right);
    for (int n = 0; n < 4; ++n) d[(g + n / 2 * 8) * 8 + i + n % 2] = sums[n];
  });
  return said.c_str();
}

// Rounds to 16 bits and back.
extern "C" void round_trip(int brain, int64_t n, const float* from, uint16_t* bits, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    bits[i] = brain ? narrow<BFloat16>(from[i]) : narrow<Float16>(from[i]);
    to[i] = brain ? widen<BFloat16>(bits[i]) : widen<Float16>(bits[i]);
  }
}
