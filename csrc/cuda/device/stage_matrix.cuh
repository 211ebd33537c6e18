// Matrices between global and shared memory.
#pragma once

#include "cp_async.cuh"

namespace lka::cuda {

// A matrix in global memory. Vectors of `vector` neighbouring columns are one access: address and
// row stride divide by it, and where it is more than 1, the column stride is 1. The last vector of
// a row may hold more than its columns, but only what lies in the same row of the tensor.
template <class Element>
struct MatrixView {
  Element* data;
  int64_t row_stride, column_stride;
  int rows, columns;
  int vector;
};

// Elements between rows in shared memory: an odd multiple of 16 bytes, so that eight rows meet no
// bank twice.
template <class Element>
LKA_DEVICE constexpr int pitch_for(int columns) {
  constexpr int kRun = 16 / sizeof(Element);
  return (columns + kRun - 1) / kRun / 2 * 2 * kRun + kRun;
}

namespace detail {

template <int kBytes>
struct alignas(kBytes) Bytes {
  uint16_t words[kBytes / 2];
};

// Calls f(row, column) for the first of every kVector columns of rows × columns, neighbouring
// threads having neighbouring columns.
template <int kVector, class F>
LKA_DEVICE void for_each_vector(int rows, int columns, F f) {
  const int vectors = (columns + kVector - 1) / kVector;
  int shift = 0;  // a power of two, so that nothing is divided
  while (1 << shift < vectors) ++shift;
  for (int i = threadIdx.x; i < rows << shift; i += blockDim.x) {
    const int vector = i & ((1 << shift) - 1);
    if (vector < vectors) f(i >> shift, vector * kVector);
  }
}

template <int kVector, class Element>
LKA_DEVICE void stage_vectors(const MatrixView<const Element>& from, int full_rows,
                              int full_columns, Element* to, int pitch) {
  for_each_vector<kVector>(full_rows, full_columns, [&](int row, int column) {
    const int left = row < from.rows ? from.columns - column : 0;
    const int valid = left < 0 ? 0 : left < kVector ? left : kVector;
    const Element* element =
        valid == 0 ? from.data : from.data + row * from.row_stride + column * from.column_stride;
    Element* at = to + row * pitch + column;
    constexpr int kBytes = kVector * int(sizeof(Element));
    if constexpr (kBytes == 2)
      store_shared(at, valid == 0 ? Element() : load_global(element));
    else
      cp_async<kBytes>(at, element, valid * int(sizeof(Element)));
  });
}

template <int kVector, class Element>
LKA_DEVICE void store_vectors(const Element* from, int pitch, const MatrixView<Element>& to) {
  for_each_vector<kVector>(to.rows, to.columns, [&](int row, int column) {
    Element* element = to.data + row * to.row_stride + column * to.column_stride;
    const Element* at = from + row * pitch + column;
    if (to.columns - column >= kVector) {
      using Vector = Bytes<kVector * sizeof(Element)>;
      store_global(reinterpret_cast<Vector*>(element),
                   load_shared(reinterpret_cast<const Vector*>(at)));
    } else {
      for (int i = 0; i < to.columns - column; ++i) store_global(element + i, load_shared(at + i));
    }
  });
}

}  // namespace detail

// Copies a matrix and zeros around it, up to full_rows × full_columns; the latter is a multiple of
// the vector. Copies may be under way when this returns.
template <class Element>
LKA_DEVICE void stage_matrix(const MatrixView<const Element>& from, int full_rows, int full_columns,
                             Element* to, int pitch) {
  if constexpr (sizeof(Element) == 2)
    if (from.vector == 8) return detail::stage_vectors<8>(from, full_rows, full_columns, to, pitch);
  if (from.vector == 4) return detail::stage_vectors<4>(from, full_rows, full_columns, to, pitch);
  if (from.vector == 2) return detail::stage_vectors<2>(from, full_rows, full_columns, to, pitch);
  detail::stage_vectors<1>(from, full_rows, full_columns, to, pitch);
}

// The other way.
template <class Element>
LKA_DEVICE void store_matrix(const Element* from, int pitch, const MatrixView<Element>& to) {
  if constexpr (sizeof(Element) == 2)
    if (to.vector == 8) return detail::store_vectors<8>(from, pitch, to);
  if (to.vector == 4) return detail::store_vectors<4>(from, pitch, to);
  if (to.vector == 2) return detail::store_vectors<2>(from, pitch, to);
  detail::store_vectors<1>(from, pitch, to);
}

}  // namespace lka::cuda
