// Philox 4×32-10, the dropout stream of lka_kernels/philox.py: Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace {

// factor[i] = the dropout factor (0 or keep_factor) of element first + i, i = 0 … count - 1.
template <class T>
void dropout_factors(uint64_t seed, uint64_t threshold, T keep_factor, int64_t first, int64_t count,
                     T* factor) {
  constexpr int kGroups = 16;  // counters side by side: the loops below become vector code
  const uint64_t first_group = uint64_t(first) / 4;
  const uint64_t end_group = (uint64_t(first + count) + 3) / 4;
  for (uint64_t group = first_group; group < end_group; group += kGroups) {
    uint32_t c0[kGroups], c1[kGroups], c2[kGroups] = {}, c3[kGroups] = {};
    for (int i = 0; i < kGroups; ++i) {
      c0[i] = uint32_t(group + i);
      c1[i] = uint32_t((group + i) >> 32);
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kGroups; ++i) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0[i];
        const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2[i];
        c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
        c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
        c1[i] = uint32_t(p1);
        c3[i] = uint32_t(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t* words[4] = {c0, c1, c2, c3};
    for (int i = 0; i < kGroups; ++i)
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t at = int64_t((group + i) * 4 + lane) - first;
        if (at >= 0 && at < count) factor[at] = words[lane][i] >= threshold ? keep_factor : T(0);
      }
  }
}

}  // namespace
