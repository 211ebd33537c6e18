// What transforms are told: plain data. Made by fft_planner.cpp.
#pragma once

#include <cstdint>

namespace lka::cpu {

// A transform of `size` = the product of the radices, each 2, 3, 4 or 5.
struct FftPlan {
  static constexpr int kMostStages = 16;
  int64_t size = 1;
  int num_stages = 0;
  int radices[kMostStages];
  // cos and -sin of every stage, [stage][q][1 … radix - 1], in the arithmetic type.
  const void* twiddles = nullptr;  // only of what is to be run
};

// The transforms of a convolution's rows (x) and columns (y).
struct FftConv {
  FftPlan y, x;
  int64_t rows_together;  // rows of a map that are unpacked at a time; even

  // Elements of a row of a spectrum with V lanes, and of a line that holds any row or column.
  int64_t spectrum_row(int64_t lanes) const { return 2 * lanes * (x.size / 2 + 1); }
  int64_t line_elements(int64_t lanes) const {
    return 2 * lanes * (x.size > y.size ? x.size : y.size);
  }
};

}  // namespace lka::cpu
