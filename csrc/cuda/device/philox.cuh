// The dropout stream of lka_kernels/philox.py: Philox 4×32-10 (Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "memory.cuh"

namespace lka::cuda {

struct DropoutParams {
  const int64_t* seed = nullptr;  // on the device, so that a captured graph draws anew; null: none
  uint64_t threshold = 0;         // an element is dropped if its word is below
  float keep_factor = 1;
};

// Factors of neighbouring elements: element i is word i % 4 of counter i / 4.
class DropoutStream {
 public:
  LKA_DEVICE DropoutStream(const DropoutParams& params, int64_t first) : p(params), next_(first) {
    if (p.seed == nullptr) return;
    seed_ = uint64_t(load_global(p.seed));
    if ((next_ & 3) != 0) draw();
  }
  // Of one element alone.
  static LKA_DEVICE float factor(const DropoutParams& params, int64_t element) {
    if (params.seed == nullptr) return 1.0f;
    DropoutStream stream(params, element & ~int64_t(3));
    stream.next_ = element;
    stream.draw();
    return stream.drawn(int(element & 3));
  }

  LKA_DEVICE float next() {
    if (p.seed == nullptr) return 1.0f;
    const int lane = int(next_ & 3);
    if (lane == 0) draw();
    const float factor = drawn(lane);
    ++next_;
    return factor;
  }

 private:
  LKA_DEVICE float drawn(int lane) const {
    const uint32_t word = lane < 2 ? (lane == 0 ? w0_ : w1_) : (lane == 2 ? w2_ : w3_);
    return word >= p.threshold ? p.keep_factor : 0.0f;
  }

  LKA_DEVICE void draw() {
    const uint64_t counter = uint64_t(next_) >> 2;
    w0_ = uint32_t(counter);
    w1_ = uint32_t(counter >> 32);
    w2_ = w3_ = 0;
    uint32_t k0 = uint32_t(seed_), k1 = uint32_t(seed_ >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * w0_, b = uint64_t(0xCD9E8D57u) * w2_;
      w0_ = uint32_t(b >> 32) ^ w1_ ^ k0;
      w1_ = uint32_t(b);
      w2_ = uint32_t(a >> 32) ^ w3_ ^ k1;
      w3_ = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  const DropoutParams& p;
  int64_t next_;
  uint64_t seed_ = 0;
  uint32_t w0_ = 0, w1_ = 0, w2_ = 0, w3_ = 0;
};

}  // namespace lka::cuda
