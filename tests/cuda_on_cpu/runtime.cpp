// Fibers, barriers and the twins of warp instructions.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "checker.h"
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

Index thread_index, block_index, block_size;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum class State { ready, at_barrier, in_warp, finished };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  State state = State::ready;
  bool started = false;
};

// What the lanes of a warp bring to an instruction that takes all of them.
struct Warp {
  const char* instruction = nullptr;
  void* operands[kWarp];
  int arrived = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
jmp_buf scheduler;
int current = 0, num_threads = 0;
std::string mistake;
const std::function<void(char*)>* kernel;
std::vector<char> shared_memory;
char* shared_begin;

// _setjmp leaves the signal mask alone: no system call for a switch.
void leave() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void begin_fiber() {
  (*kernel)(shared_begin);
  fibers[current].state = State::finished;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  current = thread;
  thread_index.x = unsigned(thread);
  checker().thread = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, begin_fiber, 0);
  setcontext(&fiber.start);
}

int count(State state) {
  int n = 0;
  for (int i = 0; i < num_threads; ++i) n += fibers[i].state == state;
  return n;
}

void run_block() {
  while (mistake.empty()) {
    bool progress = false;
    for (int warp = 0; warp < num_threads / kWarp && mistake.empty(); ++warp) {
      // A warp goes on for as long as any of its lanes can.
      for (bool again = true; again && mistake.empty();) {
        again = false;
        for (int i = warp * kWarp; i < (warp + 1) * kWarp && mistake.empty(); ++i) {
          if (fibers[i].state != State::ready) continue;
          resume(i);
          again = progress = true;
        }
      }
    }
    if (!mistake.empty() || count(State::finished) == num_threads) return;
    const int waiting = count(State::at_barrier);
    if (waiting == num_threads) {
      for (int i = 0; i < num_threads; ++i) fibers[i].state = State::ready;
      checker().pass_barrier();
    } else if (!progress) {
      const int in_warp = count(State::in_warp);
      if (in_warp > 0)
        mistake = "a warp instruction (" + std::string([&] {
                    for (const Warp& w : warps)
                      if (w.arrived > 0) return w.instruction;
                    return "?";
                  }()) +
                  ") that not all lanes reach";
      else
        mistake = "a barrier that not all threads reach: " + std::to_string(waiting) + " of " +
                  std::to_string(num_threads) + " wait, the others have ended";
      return;
    }
  }
}

// Waits until all lanes have brought their operand; the last one runs `compute`.
template <class F>
void together(const char* instruction, void* operand, F compute) {
  Warp& warp = warps[current / kWarp];
  if (warp.arrived > 0 && warp.instruction != instruction)
    fail("lanes of a warp in different instructions: " + std::string(warp.instruction) + " and " +
         instruction);
  warp.instruction = instruction;
  warp.operands[current % kWarp] = operand;
  if (++warp.arrived < kWarp) {
    fibers[current].state = State::in_warp;
    leave();
    return;
  }
  compute(warp.operands);
  warp.arrived = 0;
  const int first = current / kWarp * kWarp;
  for (int i = first; i < first + kWarp; ++i) fibers[i].state = State::ready;
}

}  // namespace

void fail(const std::string& what) {
  mistake = what + " (block " + std::to_string(block_index.x) + ", thread " +
            std::to_string(thread_index.x) + ")";
  _longjmp(scheduler, 1);
}

std::string run(const Launch& launch, const Range* ranges, int num_ranges,
                const std::function<void(char*)>& body) {
  if (launch.threads % kWarp != 0) return "blocks are whole warps";
  num_threads = launch.threads;
  kernel = &body;
  mistake.clear();
  block_size = Index{unsigned(launch.threads), 1, 1};
  shared_memory.resize(launch.shared_bytes + 16);
  const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
  shared_begin = shared_memory.data() + (16 - address % 16) % 16;
  if (int(fibers.size()) < num_threads) fibers.resize(num_threads);
  warps.resize(num_threads / kWarp);
  for (int64_t block = 0; block < launch.blocks && mistake.empty(); ++block) {
    block_index.x = unsigned(block);
    for (int i = 0; i < num_threads; ++i) {
      fibers[i].started = false;
      fibers[i].state = State::ready;
    }
    for (Warp& warp : warps) warp.arrived = 0;
    memset(shared_begin, 0xff, launch.shared_bytes);  // NaN in every type
    checker().begin_block(ranges, num_ranges, shared_begin, launch.shared_bytes, num_threads);
    run_block();
  }
  return mistake;
}

void barrier() {
  fibers[current].state = State::at_barrier;
  leave();
}

void warp_barrier() {
  const int warp = current / kWarp;
  together("__syncwarp", nullptr, [warp](void**) { checker().pass_warp_barrier(warp); });
}

void exchange(uint32_t value, uint32_t (&all)[32]) {
  struct Operand {
    uint32_t value;
    uint32_t* all;
  } mine{value, all};
  together("shuffle", &mine, [](void** operands) {
    for (int to = 0; to < kWarp; ++to)
      for (int from = 0; from < kWarp; ++from)
        static_cast<Operand*>(operands[to])->all[from] =
            static_cast<Operand*>(operands[from])->value;
  });
}

namespace {

// Each lane's pair of elements of each matrix, from the rows that the lanes give.
template <class Pair>
void gather_matrices(const char* instruction, uint32_t (&m)[4], const uint16_t* row, Pair pair) {
  struct Operand {
    uint32_t* m;
    const uint16_t* row;
  } mine{m, row};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row that is not aligned");
  check_shared_load(row, 16);
  together(instruction, &mine, [pair](void** operands) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto row_of = [&](int r) { return static_cast<Operand*>(operands[8 * i + r])->row; };
        const auto [low, high] = pair(lane, row_of);
        static_cast<Operand*>(operands[lane])->m[i] = low | uint32_t(high) << 16;
      }
  });
}

}  // namespace

void load_matrices(uint32_t (&m)[4], const uint16_t* row) {
  gather_matrices("ldmatrix", m, row, [](int lane, auto row_of) {
    const uint16_t* at = row_of(lane / 4) + lane % 4 * 2;
    return std::pair(at[0], at[1]);
  });
}

void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row) {
  gather_matrices("ldmatrix.trans", m, row, [](int lane, auto row_of) {
    const int first = lane % 4 * 2;
    return std::pair(row_of(first)[lane / 4], row_of(first + 1)[lane / 4]);
  });
}

uint32_t transpose_matrix(uint32_t pair) {
  uint32_t all[kWarp];
  exchange(pair, all);
  const int lane = int(thread_index.x) % kWarp;
  // Row r, column lane / 4 lies in lane 4·r + lane / 8, in the half of its parity.
  const auto element = [&](int row) {
    return all[4 * row + lane / 8] >> 16 * (lane / 4 % 2) & 0xffff;
  };
  return element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
}

void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 float (*widen)(uint16_t)) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  const auto compute = [widen](void** operands) {
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& o = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, i = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const auto part = [half](uint32_t word) { return uint16_t(word >> 16 * half); };
        left[g][i + half] = widen(part(o.a[0]));
        left[g + 8][i + half] = widen(part(o.a[1]));
        left[g][i + 8 + half] = widen(part(o.a[2]));
        left[g + 8][i + 8 + half] = widen(part(o.a[3]));
        right[i + half][g] = widen(part(o.b[0]));
        right[i + 8 + half][g] = widen(part(o.b[1]));
        sum[g][i + half] = o.d[half];
        sum[g + 8][i + half] = o.d[2 + half];
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& o = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, i = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        o.d[half] = sum[g][i + half];
        o.d[2 + half] = sum[g + 8][i + half];
      }
    }
  };
  together("mma", &mine, compute);
}

float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(fraction + 1024), exponent - 25);
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0.0f) return sign;
  // Steps of the result around `size`; nearbyint rounds ties to even.
  const int exponent = std::max(std::ilogb(size), -14);
  const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
  return uint16_t(sign + ((exponent + 14) << 10) + int(steps));
}

}  // namespace cuda_on_cpu
