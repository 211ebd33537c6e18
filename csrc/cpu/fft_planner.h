// Sizes of the transforms of a convolution, and what they cost.
#pragma once

#include "depthwise_plan.h"

namespace lka::cpu {

// Whether there are transforms for outputs `y` and `x` of a map of height × width, and which.
// Steps of outputs must be 1.
bool plan_fft(const Phase& y, const Phase& x, int64_t height, int64_t width, FftConv& fft);

// Makes planned transforms ready to run in the arithmetic of `storage`.
void add_twiddles(FftConv& fft, Storage storage);

// Vector multiply-adds that take as long as the transforms of `rows` rows and of the columns, these
// forward and, if `both`, back.
double fft_cost(const FftConv& fft, int64_t rows, bool both);

// The same of direct sums, whose tiles leave out most of the taps that meet no element of the
// source.
double direct_cost(const Phase& y, const Phase& x, int64_t height, int64_t width);

// The same of tiles of outputs in place, which leave out all of these.
double tiles_in_place_cost(const Phase& y, const Phase& x, int64_t height, int64_t width);

// The same of the dense form, where every output meets every element of the source.
double dense_cost(const Phase& y, const Phase& x, int64_t height, int64_t width);

}  // namespace lka::cpu
