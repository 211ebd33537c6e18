// Two-dimensional transforms of real planes in shared memory.
//
// A transform of size first · second takes two steps (Cooley and Tukey 1965). With n = second·n1 +
// n2 and k = k1 + first·k2: transforms of `first` numbers over n1, a product with exp(-2πi·n2·k1 /
// size), transforms of `second` numbers over n2. Every step is done in place by whoever holds its
// numbers in registers, so a spectrum stands in the order of its digits (k1, k2). The inverse takes
// the same steps backwards and never needs another order.
//
// Two rows of a plane are the real and the imaginary part of one complex row, and a pair of rows
// needs the memory of one complex row. The transforms of the two at column k are
//   (Z[k] + conj Z[-k]) / 2   and   (Z[k] - conj Z[-k]) / 2i;
// whoever transforms a column takes them apart on loading, and puts them together on storing. So
// columns k and -k of the pairs hold all of column k, and those of -k, its conjugates, are never
// made. Rows n1 and n1 + 1, n1 even, of one n2 are a pair: the same thread wants both. Spectra of
// planes come without the factor 1/2.
#pragma once

#include "fft.cuh"

namespace lka::cuda {

// Quotients of numbers below 2^16 by a divisor from 2 to 2^16.
struct Divisor {
  uint32_t divisor = 2, reciprocal = 0x80000000u;  // 2^32 / divisor, rounded up
};

LKA_DEVICE int operator/(int n, const Divisor& d) {
  return int(uint64_t(uint32_t(n)) * d.reciprocal >> 32);
}

struct FftAxis {
  int32_t size = 0, first = 0, second = 0;
  Divisor by_first, by_second;
  Complex roots[16][4] = {};  // exp(-2πi·n2·j / size) at [n2][j - 1]
};

// The rows of a plane that are not zeros, or that are wanted.
struct FftRows {
  int32_t height = 0;
  Divisor by_pairs;  // a multiple of `second`, all pairs that have one of them among these
};

// Where in a row of pairs a column of the spectrum has its halves: the other one is its partner's,
// and columns 0 and size / 2 are their own partners until they are transformed.
struct alignas(8) FftColumn {
  uint16_t own, partner, other;
};

// Planes side by side in shared memory, [plane][pair of rows][position], in complex numbers, and
// after them a table of columns and the roots of rows. Position is k1·digits + k2; for k1 = 0 the
// upper half of k2 is moved down by one and its first to the end. Then 16 neighbouring columns, and
// the 16 partners of them, meet 16 banks of 8 bytes, where `digits` and `pitch` allow it.
//
// Columns have a small `second` and rows a small `first` factor: 16 neighbouring threads read
// neighbouring elements of a map, and few rows are missing from the last pairs.
struct FftGeometry {
  FftAxis y, x;
  int32_t digits = 0, pitch = 0, plane_pitch = 0;
  int32_t free_of_first = 0, free_of_last = 0;  // positions for the other half of two columns
  int32_t planes_shift = 0;                     // log2 of the planes that a block may have
  bool planes_in_lanes = false;  // neighbouring threads load and store neighbouring planes
  Divisor by_half;               // of a spectrum's columns, without the last: x.size / 2
};

template <int kRadix>
struct Radix {
  static constexpr int value = kRadix;
};

// Calls f with a factor, for each of which it is compiled.
template <class F>
LKA_DEVICE void with_small(int factor, F f) {
  switch (factor) {
    case 2: return f(Radix<2>());
    case 4: return f(Radix<4>());
    default: return f(Radix<8>());
  }
}
template <class F>
LKA_DEVICE void with_large(int factor, F f) {
  switch (factor) {
    case 4: return f(Radix<4>());
    case 8: return f(Radix<8>());
    case 12: return f(Radix<12>());
    default: return f(Radix<16>());
  }
}

// What threads of a block do to `planes` planes of it, all of them together.
class FftPlanes {
 public:
  // `table` is that of columns, which prepare() fills; all planes of the block have it in common.
  LKA_DEVICE FftPlanes(const FftGeometry& geometry, Complex* shared, FftColumn* table, int planes)
      : g(geometry), shared_(shared), table_(table), planes_(planes) {}

  // As many planes, `planes` further on.
  LKA_DEVICE FftPlanes after(int planes) const {
    return FftPlanes(g, plane(planes), table_, planes_);
  }

  // Comes first. Roots of rows are copied, as neighbouring threads need different ones.
  LKA_DEVICE void prepare() const {
    for (int c = threadIdx.x; c <= half(); c += blockDim.x) store_shared(table_ + c, column_at(c));
    for (int i = threadIdx.x; i < 4 * g.x.second; i += blockDim.x) {
      const int j = i / g.x.by_second, n2 = i - j * g.x.second;
      store_shared(row_roots() + i, g.x.roots[n2][j]);
    }
    __syncthreads();
  }

  // Transforms rows: source.row(plane, y, x, step).next() are its elements x, x + step, …,
  // zeros where there are none.
  template <class Source>
  LKA_DEVICE void transform_rows(const Source& source, const FftRows& rows) const {
    with_small(g.x.first, [&](auto radix) { begin_rows(radix, source, rows); });
    __syncthreads();
    with_large(g.x.second, [&](auto radix) { second_of_rows<false>(radix, rows); });
    __syncthreads();
  }

  LKA_DEVICE void begin_columns(const FftRows& rows) const {
    with_large(g.y.first, [&](auto radix) { begin_columns(radix, rows); });
    __syncthreads();
  }

  // f(plane, column, k1, first of the numbers, pitch apart, that a `second` transform is of) for
  // all k1 of all columns of planes 0 … planes - 1.
  template <class F>
  LKA_DEVICE void each_second_of_columns(int planes, F f) const {
    // Two of them, whose numbers are in the same pairs of rows, share what is to be found out.
    each_of_columns(planes * g.y.first / 2, [&](int c, int i) {
      const int plane = 2 * i / g.y.by_first, k1 = 2 * i - plane * g.y.first;
      const FftColumn column = load_shared(table_ + c);
      const int row = k1 / 2 * g.y.second * g.pitch;
      f(plane, c, k1, row + column.own);
      f(plane, c, k1 + 1, row + column.other);
    });
  }

  LKA_DEVICE void finish_columns(const FftRows& rows) const {
    with_large(g.y.first, [&](auto radix) { finish_columns(radix, rows); });
    __syncthreads();
  }

  // Transforms rows back: sink.row(plane, y, x, step).next(value) takes element x, then
  // x + step and so on, also those that are not wanted.
  template <class Sink>
  LKA_DEVICE void restore_rows(const Sink& sink, const FftRows& rows) const {
    with_large(g.x.second, [&](auto radix) { second_of_rows<true>(radix, rows); });
    __syncthreads();
    with_small(g.x.first, [&](auto radix) { finish_rows(radix, sink, rows); });
  }

  LKA_DEVICE Complex* plane(int index) const { return shared_ + index * g.plane_pitch; }

 private:
  LKA_DEVICE int half() const { return int(g.by_half.divisor); }

  // Where k2 stands among the numbers of one k1.
  static LKA_DEVICE int digit_position(int k1, int k2, int second) {
    if (k1 != 0 || 2 * k2 < second) return k2;
    return 2 * k2 == second ? second - 1 : k2 - 1;
  }

  LKA_DEVICE int position(int k) const {
    const int k2 = k / g.x.by_first, k1 = k - k2 * g.x.first;
    return k1 * g.digits + digit_position(k1, k2, g.x.second);
  }

  LKA_DEVICE FftColumn column_at(int c) const {
    const uint16_t own = uint16_t(position(c));
    if (c == 0) return {own, own, uint16_t(g.free_of_first)};
    if (2 * c == g.x.size) return {own, own, uint16_t(g.free_of_last)};
    const uint16_t partner = uint16_t(position(g.x.size - c));
    return {own, partner, partner};
  }

  // The first row of a pair; the other is `second` further down.
  LKA_DEVICE int first_row(int pair) const { return pair + pair / g.y.by_second * g.y.second; }

  LKA_DEVICE Complex* row_roots() const {  // [j - 1][n2]
    return reinterpret_cast<Complex*>(table_ + half() + 1);
  }

  // The powers of a root that multiply_by_powers wants.
  LKA_DEVICE void load_row_roots(Complex (&w)[4], int n2) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = load_shared(row_roots() + j * g.x.second + n2);
  }
  LKA_DEVICE void load_column_roots(Complex (&w)[4], int n2) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = g.y.roots[n2][j];
  }

  // f(plane, pair, n2) for all n2 of the pairs that have a row.
  template <class F>
  LKA_DEVICE void each_part_of_rows(const FftRows& rows, F f) const {
    const int pairs = int(rows.by_pairs.divisor);
    const int lanes = g.planes_in_lanes ? g.planes_shift : 0;
    const int items = (g.planes_in_lanes ? 1 << lanes : planes_) * pairs * g.x.second;
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      const int rest = i >> lanes;
      int plane = i & ((1 << lanes) - 1), pair = rest / g.x.by_second;
      const int n2 = rest - pair * g.x.second;
      if (!g.planes_in_lanes) {
        plane = pair / rows.by_pairs;
        pair -= plane * pairs;
      }
      if (plane < planes_ && first_row(pair) < rows.height) f(plane, pair, n2);
    }
  }

  // f(column, i) for all i < count. The last column of a spectrum comes apart: without it there are
  // as many as neighbouring threads that access shared memory together, or a multiple.
  template <class F>
  LKA_DEVICE void each_of_columns(int count, F f) const {
    const int first_of_last = count * half();
    for (int i = threadIdx.x; i < first_of_last + count; i += blockDim.x) {
      const int rest = i / g.by_half;
      const bool last = i >= first_of_last;
      f(last ? half() : i - rest * half(), last ? i - first_of_last : rest);
    }
  }

  template <class R, class Source>
  LKA_DEVICE void begin_rows(R, const Source& source, const FftRows& rows) const {
    each_part_of_rows(rows, [&](int plane, int pair, int n2) {
      const int y = first_row(pair);
      auto real = source.row(plane, y, n2, g.x.second);
      auto imaginary = source.row(plane, y + g.y.second, n2, g.x.second);
      Complex v[R::value], w[4];
#pragma unroll
      for (int n1 = 0; n1 < R::value; ++n1) v[n1] = {real.next(), imaginary.next()};
      dft(v);
      load_row_roots(w, n2);
      multiply_by_powers<false>(v, w);
      Complex* to = this->plane(plane) + pair * g.pitch + n2;
#pragma unroll
      for (int k1 = 0; k1 < R::value; ++k1) store_shared(to + k1 * g.digits, v[k1]);
    });
  }

  template <bool kInverse, class R>
  LKA_DEVICE void second_of_rows(R, const FftRows& rows) const {
    const int pairs = int(rows.by_pairs.divisor);
    for (int i = threadIdx.x; i < planes_ * pairs * g.x.first; i += blockDim.x) {
      const int rest = i / g.x.by_first, k1 = i - rest * g.x.first;
      const int plane = rest / rows.by_pairs, pair = rest - plane * pairs;
      if (first_row(pair) >= rows.height) continue;
      Complex* at = this->plane(plane) + pair * g.pitch + k1 * g.digits;
      Complex v[R::value];
#pragma unroll
      for (int j = 0; j < R::value; ++j)
        v[j] = load_shared(at + (kInverse ? digit_position(k1, j, R::value) : j));
      if (kInverse)
        inverse_dft(v);
      else
        dft(v);
#pragma unroll
      for (int j = 0; j < R::value; ++j)
        store_shared(at + (kInverse ? j : digit_position(k1, j, R::value)), v[j]);
    }
  }

  // f(column, n2, its first pair of rows) for all n2 of all columns.
  template <class F>
  LKA_DEVICE void each_part_of_columns(F f) const {
    each_of_columns(planes_ * g.y.second, [&](int c, int i) {
      const int plane = i / g.y.by_second, n2 = i - plane * g.y.second;
      f(load_shared(table_ + c), n2, this->plane(plane) + n2 * g.pitch);
    });
  }

  template <class R>
  LKA_DEVICE void begin_columns(R, const FftRows& rows) const {
    each_part_of_columns([&](const FftColumn& column, int n2, Complex* at) {
      const int pairs = g.y.second * g.pitch;  // from one n1 to the next but one
      Complex v[R::value], w[4];
#pragma unroll
      for (int m = 0; m < R::value; m += 2) {
        const bool exists = m * g.y.second + n2 < rows.height;
        const Complex* pair = at + m / 2 * pairs;
        const Complex a = exists ? load_shared(pair + column.own) : Complex{0, 0};
        const Complex b = exists ? conjugate(load_shared(pair + column.partner)) : Complex{0, 0};
        v[m] = a + b;
        v[m + 1] = times_minus_i(a - b);
      }
      dft(v);
      load_column_roots(w, n2);
      multiply_by_powers<false>(v, w);
#pragma unroll
      for (int m = 0; m < R::value; m += 2) {
        Complex* pair = at + m / 2 * pairs;
        store_shared(pair + column.own, v[m]);
        store_shared(pair + column.other, v[m + 1]);
      }
    });
  }

  template <class R>
  LKA_DEVICE void finish_columns(R, const FftRows& rows) const {
    each_part_of_columns([&](const FftColumn& column, int n2, Complex* at) {
      const int pairs = g.y.second * g.pitch;  // from one n1 to the next but one
      Complex v[R::value], w[4];
#pragma unroll
      for (int m = 0; m < R::value; m += 2) {
        const Complex* pair = at + m / 2 * pairs;
        v[m] = load_shared(pair + column.own);
        v[m + 1] = load_shared(pair + column.other);
      }
      load_column_roots(w, n2);
      multiply_by_powers<true>(v, w);
      inverse_dft(v);
#pragma unroll
      for (int m = 0; m < R::value; m += 2) {
        if (m * g.y.second + n2 >= rows.height) continue;
        Complex* pair = at + m / 2 * pairs;
        const Complex a = v[m], b = v[m + 1];
        store_shared(pair + column.own, Complex{a.re - b.im, a.im + b.re});
        store_shared(pair + column.other, Complex{a.re + b.im, b.re - a.im});
      }
    });
  }

  template <class R, class Sink>
  LKA_DEVICE void finish_rows(R, const Sink& sink, const FftRows& rows) const {
    each_part_of_rows(rows, [&](int plane, int pair, int n2) {
      const Complex* from = this->plane(plane) + pair * g.pitch + n2;
      Complex v[R::value], w[4];
#pragma unroll
      for (int k1 = 0; k1 < R::value; ++k1) v[k1] = load_shared(from + k1 * g.digits);
      load_row_roots(w, n2);
      multiply_by_powers<true>(v, w);
      inverse_dft(v);
      const int y = first_row(pair);
      auto real = sink.row(plane, y, n2, g.x.second);
      auto imaginary = sink.row(plane, y + g.y.second, n2, g.x.second);
#pragma unroll
      for (int n1 = 0; n1 < R::value; ++n1) {
        real.next(v[n1].re);
        imaginary.next(v[n1].im);
      }
    });
  }

  const FftGeometry& g;
  Complex* shared_;
  FftColumn* table_;
  int planes_;
};

}  // namespace lka::cuda
