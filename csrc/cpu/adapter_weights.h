// The adapter's weights as its kernels read them, and gradients from the kernels' order into that
// of the parameters.
#pragma once

#include <algorithm>

#include "../stable.h"
#include "adapter_params.h"
#include "rounding.h"

namespace lka::cpu {

// Elements that a thread should have at least.
constexpr int64_t kPackGrain = 16 * 1024;

// Lays packed arrays one after the other, each on a cache line of its own.
template <class T>
class Packer {
 public:
  explicit Packer(void* data) : next_(static_cast<T*>(data)) {}

  // What the arrays of one call need at most.
  static int64_t elements(const AdapterParams& p) {
    return 2 * p.rank_rows * p.dim_padded + p.rank_padded * p.kernel_h * p.kernel_w + p.rank +
           p.rank_padded + p.dim_padded + 6 * 64 / int64_t(sizeof(T));
  }

  // [rank rows][dim padded] of factor·from[k·rank_step + c·channel_step].
  template <class S>
  const T* projection(const AdapterParams& p, const S* from, int64_t rank_step,
                      int64_t channel_step, T factor) {
    constexpr int64_t kBlock = 64;  // columns of a task: their cache lines serve all ranks
    T* out = take(p.rank_rows * p.dim_padded);
    torch::stable::parallel_for(
        0, (p.dim_padded + kBlock - 1) / kBlock, 1 + kPackGrain / (p.rank * kBlock),
        [&](int64_t begin, int64_t end) {
          const int64_t first = begin * kBlock, last = std::min(end * kBlock, p.dim_padded);
          for (int64_t block = first; block < last; block += kBlock) {
            const int64_t end_out = std::min(block + kBlock, last);
            const int64_t end_in = std::max(block, std::min(end_out, p.dim));
            for (int64_t k = 0; k < p.rank_rows; ++k) {
              T* row = out + k * p.dim_padded;
              const int64_t filled = k < p.rank ? end_in : block;
              for (int64_t c = block; c < filled; ++c)
                row[c] = factor * widen_one<T>(from[k * rank_step + c * channel_step]);
              std::fill(row + filled, row + end_out, T(0));
            }
          }
        });
    return out;
  }

  // [rank block][taps][lanes] of (rank, taps), each kernel from its last tap on if `flipped`.
  template <class S>
  const T* taps(const AdapterParams& p, const S* from, bool flipped) {
    constexpr int64_t kBlock = 64;
    const int64_t taps = p.kernel_h * p.kernel_w, blocks = (taps + kBlock - 1) / kBlock;
    T* out = take(p.rank_padded * taps);
    torch::stable::parallel_for(
        0, p.rank_blocks * blocks, 1 + kPackGrain / (p.lanes * kBlock),
        [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t first_rank = task / blocks * p.lanes, first = task % blocks * kBlock;
            const int64_t last = std::min(first + kBlock, taps);
            for (int64_t l = 0; l < p.lanes; ++l) {
              const int64_t k = first_rank + l;
              T* to = out + first_rank * taps + l;
              for (int64_t i = first; i < last; ++i)
                to[i * p.lanes] =
                    k < p.rank ? widen_one<T>(from[k * taps + (flipped ? taps - 1 - i : i)]) : T(0);
            }
          }
        });
    return out;
  }

  // `padded` elements of factor·from, zeros at the end.
  template <class S>
  const T* vector(const S* from, int64_t count, int64_t padded, T factor) {
    T* out = take(padded);
    for (int64_t i = 0; i < padded; ++i) out[i] = i < count ? factor * widen_one<T>(from[i]) : T(0);
    return out;
  }

 private:
  T* take(int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    T* piece = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    return piece;
  }
  T* next_;
};

// Sums, part after part, what `parts` hold of `rows` rows of `columns` elements `row` apart, times
// factor, into element (r, c) of `out` at r·row_step + c·column_step.
template <class T, class S>
void sum_parts(const AdapterGradients& g, int64_t offset, int64_t rows, int64_t columns,
               int64_t row, T factor, S* out, int64_t row_step, int64_t column_step) {
  constexpr int64_t kBlock = 256;
  const T* parts = static_cast<const T*>(g.parts) + offset;
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  torch::stable::parallel_for(
      0, rows * blocks, 1 + kPackGrain / (kBlock * g.num_parts), [&](int64_t begin, int64_t end) {
        T sums[kBlock];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t r = task % rows, first = task / rows * kBlock;
          const int64_t count = std::min(kBlock, columns - first);
          std::fill(sums, sums + count, T(0));
          for (int64_t part = 0; part < g.num_parts; ++part) {
            const T* from = parts + part * g.part_elements + r * row + first;
            for (int64_t i = 0; i < count; ++i) sums[i] += from[i];
          }
          S* to = out + r * row_step + first * column_step;
          for (int64_t i = 0; i < count; ++i)
            to[i * column_step] = narrow_one<S>(T(sums[i] * factor));
        }
      });
}

}  // namespace lka::cpu
