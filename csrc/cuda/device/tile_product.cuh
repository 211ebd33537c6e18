// Products of tiles in shared memory, by one warp: of the tensor cores in 16-bit types,
// multiply-adds in float32. Both leave the sums where mma_16x8x16 does.
#pragma once

#include "storage.cuh"

namespace lka::cuda {

// A tile of either operand. Element (i, k), k being summed over, is at data[i·pitch + k], or turned
// at data[k·pitch + i]. For 16-bit types rows begin at multiples of 16 bytes.
template <class Element>
struct Operand {
  const Element* data;
  int pitch;
  bool turned;

  LKA_DEVICE Operand from(int i, int k = 0) const {
    return {data + (turned ? i + k * pitch : i * pitch + k), pitch, turned};
  }
};

// Terms of a sum come in multiples of this.
template <class Storage>
constexpr int kTermsOfProduct = 16;
template <>
inline constexpr int kTermsOfProduct<Float32> = 1;

template <class Storage>
LKA_DEVICE constexpr int whole_products(int terms) {
  return (terms + kTermsOfProduct<Storage> - 1) / kTermsOfProduct<Storage> *
         kTermsOfProduct<Storage>;
}

// d += a·bᵀ for `rows` of kRows tiles of 16 rows of a, and `columns` of kColumns tiles of 8 rows of
// b, of which an even number lies in shared memory.
template <class Storage, int kRows, int kColumns>
LKA_DEVICE void multiply_tiles(float (&d)[kRows][kColumns][4],
                               const Operand<typename Stored<Storage>::Type>& a,
                               const Operand<typename Stored<Storage>::Type>& b, int terms,
                               int rows, int columns) {
  const int lane = threadIdx.x % 32;
  if constexpr (kTermsOfProduct<Storage> == 1) {
    const int a_row = a.turned ? 1 : a.pitch, a_term = a.turned ? a.pitch : 1;
    const int b_row = b.turned ? 1 : b.pitch, b_term = b.turned ? b.pitch : 1;
    const float* at_a = a.data + lane / 4 * a_row;
    const float* at_b = b.data + lane % 4 * 2 * b_row;
    for (int k = 0; k < terms; ++k, at_a += a_term, at_b += b_term) {
      float left[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        left[r][0] = load_shared(at_a + 16 * r * a_row);
        left[r][1] = load_shared(at_a + (16 * r + 8) * a_row);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c >= columns) continue;
        const float right[2] = {load_shared(at_b + 8 * c * b_row),
                                load_shared(at_b + (8 * c + 1) * b_row)};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) d[r][c][i] += left[r][i / 2] * right[i % 2];
        }
      }
    }
  } else {
    // Lane 8·n + r gives row r of matrix n. The four of a are its quarters, down first; those of b
    // are both halves of the terms of eight rows, then of the next eight.
    const int near = lane / 8 % 2 * 8, far = lane / 16 * 8, row = lane % 8;
    const uint16_t* at_a =
        a.data + (a.turned ? (far + row) * a.pitch + near : (near + row) * a.pitch + far);
    const uint16_t* at_b =
        b.data + (b.turned ? (near + row) * b.pitch + far : (far + row) * b.pitch + near);
    const int a_term = a.turned ? 16 * a.pitch : 16, b_term = b.turned ? 16 * b.pitch : 16;
    const int a_row = a.turned ? 16 : 16 * a.pitch, b_row = b.turned ? 16 : 16 * b.pitch;
    for (int k = 0; k < terms; k += 16, at_a += a_term, at_b += b_term) {
      uint32_t right[kColumns / 2][4];
#pragma unroll
      for (int c = 0; c < kColumns / 2; ++c) {
        if (2 * c >= columns) continue;
        if (b.turned)
          load_matrices_transposed(right[c], at_b + c * b_row);
        else
          load_matrices(right[c], at_b + c * b_row);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        uint32_t left[4];
        if (a.turned)
          load_matrices_transposed(left, at_a + r * a_row);
        else
          load_matrices(left, at_a + r * a_row);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c >= columns) continue;
          const uint32_t matrix[2] = {right[c / 2][c % 2 * 2], right[c / 2][c % 2 * 2 + 1]};
          mma_16x8x16<Storage>(d[r][c], left, matrix);
        }
      }
    }
  }
}

// Row and column of sum i of a lane in its tile of 16 × 8.
LKA_DEVICE int row_of_sum(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
LKA_DEVICE int column_of_sum(int i) { return threadIdx.x % 4 * 2 + i % 2; }

}  // namespace lka::cuda
