// Depthwise convolution by Fourier transforms. In one dimension out[j] = sum_m w[m] in[j + shift_m]
// is a circular correlation of a size at which nothing that wraps meets an output that is kept
// (lka_kernels/fft_plan.py), so with transforms IN, W and OUT = IN·conj(W); a weight's gradient is
// IN·conj(GRAD) at the shifts.
//
// Two rows of real numbers are transformed as one row of complex ones and their spectra told apart:
// A = (Z + Z')/2 and B = (Z - Z')/2i with Z'_k = conj(Z_{-k}). The halves are left out here and
// made up for once, in `kSeparated`. Of a spectrum the columns 0 … size/2 are kept. A column is
// transformed, multiplied and transformed back while it is in the first-level cache.
#pragma once

#include "depthwise_conv2d_kernel.h"
#include "fft.h"

namespace {

using lka::cpu::FftConv;
using lka::cpu::FftPlan;

// Every spectrum of rows is twice as large as it should be.
constexpr int kSeparated = 2;

inline int64_t wrapped(int64_t shift, int64_t size) { return shift < 0 ? shift + size : shift; }

// What the transforms of one task use: two buffers that every transform goes by way of, a line for
// a row or column, and rows of the map in lanes.
template <class T, int V>
struct FftScratch {
  FftScratch(const FftConv& fft, T* at)
      : first(at),
        second(first + fft.line_elements(V)),
        line(second + fft.line_elements(V)),
        rows(line + fft.line_elements(V)) {}

  T *first, *second, *line, *rows;
};

// Rows `a` and `b` of a spectrum from the transform of a + ib.
template <class T, int V>
void separate(const T* line, int64_t size, T* a, T* b) {
  for (int64_t k = 0; k <= size / 2; ++k) {
    const T* at = line + 2 * V * k;
    const T* mirrored = line + 2 * V * (k == 0 ? 0 : size - k);
    const auto re = load_aligned<V>(at), im = load_aligned<V>(at + V);
    const auto re_m = load_aligned<V>(mirrored), im_m = load_aligned<V>(mirrored + V);
    store_aligned<V>(a + 2 * V * k, re + re_m);
    store_aligned<V>(a + 2 * V * k + V, im - im_m);
    if (b == nullptr) continue;
    store_aligned<V>(b + 2 * V * k, im + im_m);
    store_aligned<V>(b + 2 * V * k + V, re_m - re);
  }
}

// The reverse: the spectrum of a + ib, without factors.
template <class T, int V>
void join(const T* a, const T* b, int64_t size, T* line) {
  for (int64_t k = 0; k <= size / 2; ++k) {
    const auto a_re = load_aligned<V>(a + 2 * V * k), a_im = load_aligned<V>(a + 2 * V * k + V);
    Vec<T, V> b_re{}, b_im{};
    if (b != nullptr)
      b_re = load_aligned<V>(b + 2 * V * k), b_im = load_aligned<V>(b + 2 * V * k + V);
    const int64_t mirror = k == 0 ? 0 : size - k;
    // A real sequence has real ends of its spectrum; where k is its own mirror both are written.
    store_aligned<V>(line + 2 * V * mirror, a_re + b_im);
    store_aligned<V>(line + 2 * V * mirror + V, b_re - a_im);
    store_aligned<V>(line + 2 * V * k, a_re - b_im);
    store_aligned<V>(line + 2 * V * k + V, a_im + b_re);
  }
}

// The spectra of `height` rows of one block of planes, a row every `spectrum_row` elements.
template <class T, int V, class S>
void transform_rows(const FftConv& fft, const S* data, const Lanes& lanes, int64_t height,
                    int64_t width, FftScratch<T, V>& scratch, T* spectrum) {
  const int64_t row = width * V, spectrum_row = fft.spectrum_row(V);
  for (int64_t begin = 0; begin < height; begin += fft.rows_together) {
    const int64_t left = height - begin;
    const int64_t count = left < fft.rows_together ? left : fft.rows_together;
    pack_rows<T, V, S>(data, lanes, begin, begin + count, width, scratch.rows, row);
    for (int64_t y = 0; y < count; y += 2) {
      const bool pair = y + 1 < count;
      if (!pair) memset(static_cast<void*>(scratch.rows + count * row), 0, size_t(row) * sizeof(T));
      ::fft<T, V>(fft.x, Sequence<T>{scratch.rows + y * row, V, width, row},
                  in_order<T, V>(scratch.line, fft.x.size), scratch.first, scratch.second);
      T* to = spectrum + (begin + y) * spectrum_row;
      separate<T, V>(scratch.line, fft.x.size, to, pair ? to + spectrum_row : nullptr);
    }
  }
}

template <class T, int V>
inline Sequence<T> column_of(T* spectrum, const FftConv& fft, int64_t k, int64_t rows) {
  return {spectrum + 2 * V * k, fft.spectrum_row(V), rows, V};
}

// Spectra of the weights of one pattern's channels, conjugated and with every factor:
// [column][row].
template <class T, int V, class S>
void transform_weights(const ConvolvePlan& plan, int64_t pattern, const FftScratch<T, V>& scratch,
                       T* weight) {
  const FftConv& fft = plan.fft;
  const Phase &y = plan.phases_y[0], &x = plan.phases_x[0];
  const int64_t column = 2 * V * fft.y.size, columns = fft.x.size / 2 + 1;
  const int64_t row = fft.spectrum_row(V);
  const T factor = T(1) / (T(kSeparated * kSeparated) * T(fft.x.size) * T(fft.y.size));
  T* pair = scratch.rows;  // spectra of two rows
  T* taps = pair + 2 * row;
  int64_t channel[V];
  for (int l = 0; l < V; ++l) channel[l] = channel_of_lane(plan.lanes, pattern, l, plan.channels);
  pack_phase_weights<T, V, S>(plan, y, x, channel, taps);
  memset(static_cast<void*>(weight), 0, size_t(columns * column) * sizeof(T));
  const Sequence<T> line = in_order<T, V>(scratch.line, fft.x.size);
  for (int64_t m = 0; m < y.taps; m += 2) {
    const int64_t count = m + 1 < y.taps ? 2 : 1;
    memset(static_cast<void*>(scratch.line), 0, size_t(2 * V * fft.x.size) * sizeof(T));
    for (int64_t half = 0; half < count; ++half)
      for (int64_t n = 0; n < x.taps; ++n)
        store_aligned<V>(
            scratch.line + (2 * wrapped(x.origin + n * x.tap_step, fft.x.size) + half) * V,
            load_aligned<V>(taps + ((m + half) * x.taps + n) * V));
    ::fft<T, V>(fft.x, line, line, scratch.first, scratch.second);
    separate<T, V>(scratch.line, fft.x.size, pair, pair + row);
    for (int64_t half = 0; half < count; ++half) {
      const int64_t at = wrapped(y.origin + (m + half) * y.tap_step, fft.y.size);
      const Sequence<T> from = in_order<T, V>(pair + half * row, columns);
      for (int64_t k = 0; k < columns; ++k)
        put<T, V>(in_order<T, V>(weight + k * column, fft.y.size), at, get<T, V>(from, k));
    }
  }
  for (int64_t k = 0; k < columns; ++k) {
    const Sequence<T> at = in_order<T, V>(weight + k * column, fft.y.size);
    ::fft<T, V>(fft.y, at, at, scratch.first, scratch.second);
    for (int64_t i = 0; i < fft.y.size; ++i) {
      const auto w = get<T, V>(at, i);
      put<T, V>(at, i, Complex<T, V>{w.re * factor, -w.im * factor});
    }
  }
}

// The two products are functions of their own: the compiler, which may contract a multiplication
// and an addition in more than one way, then rounds the same wherever they are used.

// line[i]·weight[i], in place.
template <class T, int V>
__attribute__((noinline)) void multiply(int64_t size, const T* weight, T* line) {
  const Sequence<T> at = in_order<T, V>(line, size);
  for (int64_t i = 0; i < size; ++i) {
    const T* w = weight + 2 * V * i;
    put<T, V>(at, i, times<T, V>(get<T, V>(at, i), load_aligned<V>(w), load_aligned<V>(w + V)));
  }
}

// sums[i] += input[i]·conj(grad[i])
template <class T, int V>
__attribute__((noinline)) void add_product(int64_t size, const T* input, const T* grad, T* sums) {
  for (int64_t i = 0; i < 2 * V * size; i += 2 * V) {
    const Complex<T, V> x = {load_aligned<V>(input + i), load_aligned<V>(input + i + V)};
    const auto product = times<T, V>(x, load_aligned<V>(grad + i), -load_aligned<V>(grad + i + V));
    store_aligned<V>(sums + i, load_aligned<V>(sums + i) + product.re);
    store_aligned<V>(sums + i + V, load_aligned<V>(sums + i + V) + product.im);
  }
}

// The map of one block of planes from the spectra of its rows, plus `bias` if there is one. One
// step of `ahead` for every two rows.
template <class T, int V, class S>
void restore_rows(const FftConv& fft, const T* spectrum, const Lanes& lanes, const MapView& map,
                  const Vec<T, V>* bias, FftScratch<T, V>& scratch, Ahead& ahead) {
  const int64_t row = map.width * V, spectrum_row = fft.spectrum_row(V);
  for (int64_t first = 0; first < map.height; first += fft.rows_together) {
    const int64_t left = map.height - first;
    const int64_t count = left < fft.rows_together ? left : fft.rows_together;
    for (int64_t y = 0; y < count; y += 2) {
      const T* a = spectrum + (first + y) * spectrum_row;
      ahead.step_runs();
      join<T, V>(a, y + 1 < count ? a + spectrum_row : nullptr, fft.x.size, scratch.line);
      ::fft<T, V>(fft.x, inverted(in_order<T, V>(scratch.line, fft.x.size)),
                  inverted(Sequence<T>{scratch.rows + y * row, V, map.width, row}), scratch.first,
                  scratch.second);
    }
    if (bias != nullptr)
      for (int64_t i = 0; i < count * row; i += V)
        store_aligned<V>(scratch.rows + i, load_aligned<V>(scratch.rows + i) + *bias);
    unpack_rows<T, V, S>(scratch.rows, lanes, first, first + count, map.width,
                         static_cast<S*>(map.data));
  }
}

// Prepares to load the planes of a block ahead within `steps` steps.
template <int V, class S, class Plan>
void look_ahead(const Plan& plan, const MapView& map, int64_t block, int64_t steps,
                Prefetcher& prefetcher) {
  const Lanes lanes = lanes_of<V>(plan.lanes, block, map, plan.batch, plan.channels);
  prefetcher.begin(planes_region<S>(map, lanes, lanes.count, 0, map.height), steps);
}

template <class T, int V, class S>
void convolve_fft_as(const ConvolvePlan& plan, int64_t begin, int64_t end, void* memory) {
  const FftConv& fft = plan.fft;
  const MapView &source = plan.source, &target = plan.target;
  const int64_t spectrum_row = fft.spectrum_row(V), column = 2 * V * fft.y.size;
  const int64_t columns = fft.x.size / 2 + 1;
  T* const weights = static_cast<T*>(memory);
  T* spectrum = weights + columns * column;
  FftScratch<T, V> scratch(
      fft,
      spectrum + (source.height > target.height ? source.height : target.height) * spectrum_row);
  // All blocks of the same channels one after the other: their weights are transformed once.
  const int64_t patterns = plan.lanes.num_patterns;
  const int64_t blocks_of_pattern = (plan.lanes.num_blocks + patterns - 1) / patterns;
  const auto block_of = [&](int64_t task) {
    return task / blocks_of_pattern + task % blocks_of_pattern * patterns;
  };
  int64_t transformed = -1;
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pattern = task / blocks_of_pattern, block = block_of(task);
    if (block >= plan.lanes.num_blocks) continue;
    if (pattern != transformed) transform_weights<T, V, S>(plan, pattern, scratch, weights);
    transformed = pattern;
    const Lanes from = lanes_of<V>(plan.lanes, block, source, plan.batch, plan.channels);
    const Lanes to = lanes_of<V>(plan.lanes, block, target, plan.batch, plan.channels);
    transform_rows<T, V, S>(fft, static_cast<const S*>(source.data), from, source.height,
                            source.width, scratch, spectrum);
    // Meanwhile the next block comes into the cache.
    const int64_t next = task + 1 < end ? block_of(task + 1) : plan.lanes.num_blocks;
    if (next < plan.lanes.num_blocks)
      look_ahead<V, S>(plan, source, next, 2 * columns + (target.height + 1) / 2, ahead.first);
    const T* weight = weights;
    for (int64_t k = 0; k < columns; ++k, weight += column) {
      const Sequence<T> line = in_order<T, V>(scratch.line, fft.y.size);
      ahead.step_runs();
      ::fft<T, V>(fft.y, column_of<T, V>(spectrum, fft, k, source.height), line, scratch.first,
                  scratch.second);
      multiply<T, V>(fft.y.size, weight, scratch.line);
      ahead.step_runs();
      ::fft<T, V>(fft.y, inverted(line), inverted(column_of<T, V>(spectrum, fft, k, target.height)),
                  scratch.first, scratch.second);
    }
    Vec<T, V> bias{};
    if (plan.bias != nullptr)
      bias = load_aligned<V>(static_cast<const T*>(plan.packed_bias) + pattern * V);
    restore_rows<T, V, S>(fft, spectrum, to, target, plan.bias != nullptr ? &bias : nullptr,
                          scratch, ahead);
  }
}

// The weight's gradient and, with the plan of its convolution, the input's too: the spectrum of
// grad_output then serves both. The input may be where its gradient goes.
template <class T, int V, class S>
void gradients_fft_as(const WeightGradientPlan& plan, const ConvolvePlan* convolution,
                      int64_t begin, int64_t end, void* memory) {
  const FftConv& fft = plan.fft;
  const MapView &input = plan.input, &grad = plan.grad_output;
  const int64_t spectrum_row = fft.spectrum_row(V), column = 2 * V * fft.y.size;
  const int64_t columns = fft.x.size / 2 + 1;
  T* const weights = static_cast<T*>(memory);
  // [column][row] of the weight's gradient.
  T* sums = weights + (convolution != nullptr ? columns * column : 0);
  T* input_spectrum = sums + columns * column;
  // Its rows also take those of both gradients.
  T* grad_spectrum = input_spectrum + input.height * spectrum_row;
  int64_t rows = grad.height > plan.y.count ? grad.height : plan.y.count;
  if (convolution != nullptr && rows < input.height) rows = input.height;
  FftScratch<T, V> scratch(fft, grad_spectrum + rows * spectrum_row);
  const T factor = T(1) / (T(kSeparated * kSeparated) * T(fft.x.size) * T(fft.y.size));
  const int64_t elements = (plan.kernel_h * plan.kernel_w + 1) * V;
  const bool cross_images = plan.lanes.cross_images;
  const int64_t blocks = cross_images ? plan.lanes.num_blocks : plan.lanes.blocks_per_image;
  const int64_t units = blocks * plan.num_parts, patterns = plan.lanes.num_patterns;
  const int64_t units_of_pattern = (units + patterns - 1) / patterns;
  const auto unit_of = [&](int64_t task) {
    // All of the same channels one after the other, as in convolve_fft_as, if weights are needed.
    return convolution != nullptr ? task / units_of_pattern + task % units_of_pattern * patterns
                                  : task;
  };
  const auto first_image_of = [&](int64_t part) {
    return cross_images ? 0 : part * plan.batch / plan.num_parts;
  };
  const int64_t steps =
      2 * columns + (convolution != nullptr ? (convolution->target.height + 1) / 2 : 0);
  int64_t transformed = -1;
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t unit = unit_of(task);
    if (unit >= units) continue;
    if (convolution != nullptr) {
      const int64_t pattern = task / units_of_pattern;
      if (pattern != transformed)
        transform_weights<T, V, S>(*convolution, pattern, scratch, weights);
      transformed = pattern;
    }
    const int64_t part = unit / blocks, block = unit % blocks;
    const int64_t first_image = first_image_of(part);
    const int64_t last_image = cross_images ? 1 : first_image_of(part + 1);
    T* partial = static_cast<T*>(plan.partial) + unit * elements;
    Vec<T, V> bias_sum{};
    memset(static_cast<void*>(partial), 0, size_t(elements) * sizeof(T));
    memset(static_cast<void*>(sums), 0, size_t(columns * column) * sizeof(T));
    for (int64_t image = first_image; image < last_image; ++image) {
      const int64_t at = cross_images ? block : image * blocks + block;
      const Lanes from = lanes_of<V>(plan.lanes, at, input, plan.batch, plan.channels);
      const Lanes to = lanes_of<V>(plan.lanes, at, grad, plan.batch, plan.channels);
      transform_rows<T, V, S>(fft, static_cast<const S*>(input.data), from, input.height,
                              input.width, scratch, input_spectrum);
      transform_rows<T, V, S>(fft, static_cast<const S*>(grad.data), to, grad.height, grad.width,
                              scratch, grad_spectrum);
      // Meanwhile the same block of the next image, or the next task's, comes into the cache.
      const int64_t next_unit = task + 1 < end ? unit_of(task + 1) : units;
      int64_t next = -1;
      if (image + 1 < last_image)
        next = at + blocks;
      else if (next_unit < units)
        next = first_image_of(next_unit / blocks) * blocks + next_unit % blocks;
      if (next >= 0) {
        look_ahead<V, S>(plan, input, next, steps, ahead.first);
        look_ahead<V, S>(plan, grad, next, steps, ahead.second);
      }
      for (int64_t k = 0; k < columns; ++k) {
        ahead.step_runs();
        const Sequence<T> x = in_order<T, V>(scratch.line, fft.y.size);
        const Sequence<T> g = in_order<T, V>(scratch.rows, fft.y.size);
        ::fft<T, V>(fft.y, column_of<T, V>(input_spectrum, fft, k, input.height), x, scratch.first,
                    scratch.second);
        ::fft<T, V>(fft.y, column_of<T, V>(grad_spectrum, fft, k, grad.height), g, scratch.first,
                    scratch.second);
        ahead.step_runs();
        // The sum over a map is the first element of its spectrum.
        if (k == 0) bias_sum += get<T, V>(g, 0).re;
        add_product<T, V>(fft.y.size, x.data, g.data, sums + k * column);
        if (convolution == nullptr) continue;
        multiply<T, V>(fft.y.size, weights + k * column, g.data);
        ::fft<T, V>(fft.y, inverted(g),
                    inverted(column_of<T, V>(grad_spectrum, fft, k, input.height)), scratch.first,
                    scratch.second);
      }
      if (convolution == nullptr) continue;
      const MapView& target = convolution->target;
      const Lanes out = lanes_of<V>(plan.lanes, at, target, plan.batch, plan.channels);
      restore_rows<T, V, S>(fft, grad_spectrum, out, target, nullptr, scratch, ahead);
    }
    for (int64_t k = 0; k < columns; ++k) {
      const Sequence<T> sum = in_order<T, V>(sums + k * column, fft.y.size);
      const Sequence<T> line = in_order<T, V>(scratch.line, fft.y.size);
      ::fft<T, V>(fft.y, inverted(sum), inverted(line), scratch.first, scratch.second);
      for (int64_t m = 0; m < plan.y.count; ++m)
        put<T, V>(column_of<T, V>(grad_spectrum, fft, k, rows), m,
                  get<T, V>(line, wrapped(plan.y.origin + m * plan.y.out_step, fft.y.size)));
    }
    for (int64_t m = 0; m < plan.y.count; m += 2) {
      const T* a = grad_spectrum + m * spectrum_row;
      const Sequence<T> line = in_order<T, V>(scratch.line, fft.x.size);
      join<T, V>(a, m + 1 < plan.y.count ? a + spectrum_row : nullptr, fft.x.size, scratch.line);
      ::fft<T, V>(fft.x, inverted(line), inverted(line), scratch.first, scratch.second);
      for (int64_t half = 0; half < 2 && m + half < plan.y.count; ++half)
        for (int64_t n = 0; n < plan.x.count; ++n) {
          const auto both =
              get<T, V>(line, wrapped(plan.x.origin + n * plan.x.out_step, fft.x.size));
          const int64_t tap =
              (plan.y.first_output + m + half) * plan.kernel_w + plan.x.first_output + n;
          store_aligned<V>(partial + tap * V, (half ? both.im : both.re) * factor);
        }
    }
    store_aligned<V>(partial + plan.kernel_h * plan.kernel_w * V, bias_sum / T(kSeparated));
  }
}

// Only the bias: a thread transforms the weights that it needs.
template <class T, int V>
void pack_fft_bias(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  with_storage<T>(plan.storage, [&](auto element) {
    for (int64_t pattern = begin; pattern < end; ++pattern) {
      int64_t channel[V];
      for (int l = 0; l < V; ++l)
        channel[l] = channel_of_lane(plan.lanes, pattern, l, plan.channels);
      pack_bias<T, V, decltype(element)>(plan, pattern, channel);
    }
  });
}

template <class T, int V>
void convolve_fft(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    convolve_fft_as<T, V, decltype(element)>(plan, begin, end, scratch);
  });
}

template <class T, int V>
void weight_gradient_fft(const WeightGradientPlan& plan, int64_t begin, int64_t end,
                         void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    gradients_fft_as<T, V, decltype(element)>(plan, nullptr, begin, end, scratch);
  });
}

template <class T, int V>
void both_gradients_fft(const ConvolvePlan& convolution, const WeightGradientPlan& plan,
                        int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    gradients_fft_as<T, V, decltype(element)>(plan, &convolution, begin, end, scratch);
  });
}

}  // namespace
