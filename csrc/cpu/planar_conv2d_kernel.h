// Depthwise convolution of planes whose rows are contiguous, for one instruction set: lanes hold
// neighbouring columns of one plane, so that nothing is transposed.
//
// For square kernels of 3, 5 or 7 taps at stride and dilation 1; forward and for the input of 1
// too. Larger ones gain more from the lanes of depthwise_conv2d_kernel.h, which share the source
// among more taps.
#pragma once

#include "depthwise_plan.h"
#include "prefetch.h"
#include "simd.h"
#include "storage_dispatch.h"

namespace {

using lka::MapView;
using lka::cpu::ConvolvePlan;
using lka::cpu::Phase;
using lka::cpu::SourceBuffer;
using lka::cpu::WeightGradientPlan;

// The rows of a plane, which may lie far apart.
template <class S>
Region plane_region(const MapView& map, const S* plane) {
  constexpr int64_t kSize = sizeof(S);
  if (map.stride_h == map.width) return {plane, map.height * map.width * kSize, 1, 0, 1, 0};
  return {plane, map.width * kSize, 1, 0, map.height, map.stride_h * kSize};
}

template <class S>
int64_t lines_per_step(const MapView& map, int64_t steps) {
  return (plane_region<S>(map, nullptr).lines() + steps - 1) / steps;
}

// Planes numbered b·C + c, one after the other: a division for every small plane would tell.
template <class S>
class Plane {
 public:
  Plane(const MapView& map, int64_t channels, int64_t index)
      : channels_(channels),
        stride_c_(map.stride_c),
        next_image_(map.stride_b - channels * map.stride_c),
        channel_(index % channels),
        data_(static_cast<S*>(map.data) + index / channels * map.stride_b +
              channel_ * map.stride_c) {}

  S* data() const { return data_; }
  int64_t channel() const { return channel_; }
  void advance() {
    data_ += stride_c_;
    if (++channel_ == channels_) channel_ = 0, data_ += next_image_;
  }

 private:
  const int64_t channels_, stride_c_, next_image_;
  int64_t channel_;
  S* data_;
};

// Rows of one plane, widened, with zeros to the left and right: element (origin_y + row, origin_x +
// column) of the source is column `column` of buffer row `row`.
template <class T, int V>
class PlaneRows {
 public:
  PlaneRows(const SourceBuffer& plan, T* memory) : pitch_(plan.columns), rows_(memory) {
    memset(static_cast<void*>(memory), 0, size_t(plan.rows * plan.columns) * sizeof(T));
  }

  int64_t pitch() const { return pitch_; }
  const T* row(int64_t index) const { return rows_ + index * pitch_; }

  // Fill `count` rows from source row origin_y on. Rows outside the source are cleared if
  // `clear_dead`, else left as they are.
  template <class S>
  void fill(const S* plane, const MapView& map, int64_t origin_y, int64_t origin_x, int64_t count,
            bool clear_dead) {
    const int64_t first = origin_x > 0 ? origin_x : 0;  // padding can exceed the kernel
    const int64_t left = first - origin_x;
    const int64_t fit = pitch_ - V - left;  // a narrow row is written as one full vector
    const int64_t columns = map.width - first < fit ? map.width - first : fit;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t y = origin_y + row;
      T* to = rows_ + row * pitch_;
      if (y < 0 || y >= map.height || columns <= 0) {
        if (clear_dead) memset(static_cast<void*>(to), 0, size_t(pitch_) * sizeof(T));
        continue;
      }
      const S* from = plane + y * map.stride_h + first;
      to += left;
      if (columns < V) {
        store<T, V>(to, load_some<T, V, S>(from, int(columns)));
        continue;
      }
      for (int64_t x = 0; x < columns; x += V) {
        const int64_t at = x < columns - V ? x : columns - V;
        store<T, V>(to + at, load<T, V>(from + at));
      }
    }
  }

 private:
  const int64_t pitch_;
  T* const rows_;
};

// Where tiles find their source: row(index) is the source at the first tap of the first output of
// a row, pitch() leads to the next row, and load() takes what a vector of outputs meets at a tap.
// Argument is how convolve_plane takes one: two numbers by value, many masks by reference.
template <class T, int V>
struct PaddedRows {
  using Argument = PaddedRows;
  static constexpr int kMostVectors = 2;
  const T* first;
  int64_t stride;

  int64_t pitch() const { return stride; }
  const T* row(int64_t index) const { return first + index * stride; }
  Vec<T, V> load(const T* at, int tap) const { return ::load<T, V>(at + tap); }
};

#if defined(LKA_AVX512)
// The same of rows of outputs that fit a vector, read where they stand: zeros are what a mask
// leaves out. A row that has only just been copied would be read across the edges of those stores,
// and such loads wait until the stores have left for the cache.
template <class T, int V, int K>
struct RowsInPlace {
  using Argument = const RowsInPlace&;
  static constexpr int kMostVectors = 1;
  const int64_t stride_h;
  const T* first = nullptr;
  uint32_t mask[K];

  explicit RowsInPlace(const ConvolvePlan& plan) : stride_h(plan.source.stride_h) {
    for (int n = 0; n < K; ++n) {
      mask[n] = 0;
      for (int lane = 0; lane < V; ++lane) {
        const int64_t column = plan.origin_x + n + lane;
        mask[n] |= uint32_t(column >= 0 && column < plan.source.width) << lane;
      }
    }
  }

  // Row 0 and column 0 are element (y, x) of the plane, which may lie outside of it.
  template <class S>
  void begin(const S* plane, int64_t y, int64_t x) {
    first = reinterpret_cast<const T*>(plane) + y * stride_h + x;
  }
  int64_t pitch() const { return stride_h; }
  const T* row(int64_t index) const { return first + index * stride_h; }
  Vec<T, V> load(const T* at, int tap) const { return load_masked<T, V, T>(at + tap, mask[tap]); }
};
#endif

// Outputs of one tile: kRows rows of kVectors vectors that begin at columns `start`. `first` is the
// source row of the first; of the kRows + K - 1 rows from there, those in [live_begin, live_end)
// are read. Weights stand column by column: tap (m, n) is weight[n·K + m]. The first out_count
// lanes of every vector are stored. Inlined, as so many arguments cost more than a row of taps.
template <class T, int V, int K, int kRows, int kVectors, class Source>
__attribute__((always_inline)) inline void planar_tile(const Source& source, const T* first,
                                                       const int64_t* start, int64_t live_begin,
                                                       int64_t live_end, const T* weight, T bias,
                                                       T* out, int64_t out_row,
                                                       const int64_t* out_start, int out_count) {
  Vec<T, V> sum[kRows][kVectors];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kUnroll
    for (int x = 0; x < kVectors; ++x) sum[r][x] = splat<T, V>(bias);
#pragma GCC unroll kUnroll
  for (int y = 0; y < kRows + K - 1; ++y) {
    if (y < live_begin || y >= live_end) continue;
    const T* row = first + y * source.pitch();
    // All taps of all rows at once would push the sums out of registers. Where a tap serves two
    // vectors, it is better kept.
    if constexpr (kVectors == 1) keep_in_register(weight);
#pragma GCC unroll kUnroll
    for (int n = 0; n < K; ++n) {
      Vec<T, V> value[kVectors];
#pragma GCC unroll kUnroll
      for (int x = 0; x < kVectors; ++x) value[x] = source.load(row + start[x], n);
#pragma GCC unroll kUnroll
      for (int r = 0; r < kRows; ++r) {
        const int m = y - r;
        if (m < 0 || m >= K) continue;
        const Vec<T, V> tap = splat<T, V>(weight[n * K + m]);
#pragma GCC unroll kUnroll
        for (int x = 0; x < kVectors; ++x) sum[r][x] += tap * value[x];
      }
    }
  }
#pragma GCC unroll kUnroll
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kUnroll
    for (int x = 0; x < kVectors; ++x)
      store_some<T, V, T>(out + r * out_row + out_start[x], sum[r][x], out_count);
}

// The heights of tiles: the taller, the more outputs use each vector of the source.
constexpr int kTallTile = 7, kLowTile = 4;
static_assert(kLowTile == lka::cpu::kFewestPlanarRows, "the planner relies on it");

template <int R, int N>
struct TileShape {
  static constexpr int kRows = R, kVectors = N;
};

// Outputs of `rows` rows from `first` on (relative to the source's row origin_y). Not inlined, as
// the tiles need all the registers that the loop over the planes would take.
template <class T, int V, int K, class S, class Source>
__attribute__((noinline)) void convolve_plane(const ConvolvePlan& plan,
                                              typename Source::Argument source, int64_t first,
                                              int64_t rows, const T* weight, T bias, S* target,
                                              Ahead& ahead) {
  const int64_t width = plan.target.width, stride = plan.target.stride_h;
  const int64_t in_height = plan.source.height;
  const bool tall =
      width <= V && rows >= kTallTile &&
      (rows + kTallTile - 1) / kTallTile * kTallTile <= (rows + kLowTile - 1) / kLowTile * kLowTile;
  const int64_t height = tall ? kTallTile : kLowTile;
  const bool direct = sizeof(S) == sizeof(T);  // else outputs are narrowed on the way
  const int lanes = width < V ? int(width) : V;
  for (int64_t i = 0; i < rows; i += height) {
    // The last tile overlaps the one before and computes the same again.
    const int64_t row = i < rows - height ? i : rows - height;
    const int64_t begin_y = first + row + plan.origin_y;
    const int64_t live_begin = -begin_y, live_end = in_height - begin_y;
    for (int64_t j = 0; j < width;) {
      ahead.step();
      const int vectors = width - j > V ? 2 : 1;
      int64_t start[2], buffer_start[2] = {0, V};
      for (int x = 0; x < 2; ++x) {
        start[x] = j + x * V;
        if (width >= V && start[x] > width - V) start[x] = width - V;
      }
      alignas(64) T buffer[kTallTile * 2 * V];
      T* out = buffer;
      int64_t out_row = 2 * V;
      const int64_t* out_start = buffer_start;
      if (direct) {
        out = reinterpret_cast<T*>(target) + (first + row) * stride;
        out_row = stride;
        out_start = start;
      }
      const T* from = source.row(row);
      const auto tile = [&](auto shape) __attribute__((always_inline)) {
        planar_tile<T, V, K, decltype(shape)::kRows, decltype(shape)::kVectors>(
            source, from, start, live_begin, live_end, weight, bias, out, out_row, out_start,
            direct ? lanes : V);
      };
      if (tall)
        tile(TileShape<kTallTile, 1>{});
      else if (Source::kMostVectors == 1 || vectors == 1)
        tile(TileShape<kLowTile, 1>{});
      else
        tile(TileShape<kLowTile, Source::kMostVectors>{});
      if (!direct) {
        for (int64_t r = 0; r < height; ++r)
          for (int x = 0; x < vectors; ++x)
            store_some<T, V, S>(target + (first + row + r) * stride + start[x],
                                load_aligned<V>(buffer + (r * 2 + x) * V), lanes);
      }
      j += vectors * V;
    }
  }
}

template <class T, int V, int K, class S>
void convolve_planes(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  PlaneRows<T, V> rows(plan.buffer, static_cast<T*>(scratch));
#if defined(LKA_AVX512)
  constexpr bool kInPlace = sizeof(S) == sizeof(T) && kHasMasks<S, V>;
  RowsInPlace<T, V, K> in_place(plan);
#endif
  const MapView &in = plan.source, &out = plan.target;
  const int64_t num_bands = plan.num_bands;
  const int64_t num_chunks = (plan.band + plan.chunk - 1) / plan.chunk;
  int64_t band = begin % num_bands;
  Plane<S> source(in, plan.channels, begin / num_bands);
  Plane<S> target(out, plan.channels, begin / num_bands);
  // While a plane is computed, the next one is loaded; of bands, the next is near anyway.
  const int64_t tiles =
      (out.height + kLowTile - 1) / kLowTile * ((out.width + 2 * V - 1) / (2 * V));
  const int64_t read_lines = lines_per_step<S>(in, tiles);
  const int64_t write_lines = lines_per_step<S>(out, tiles);
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    S *from = source.data(), *to = target.data();
    const T* weight = static_cast<const T*>(plan.packed_weight) + source.channel() * K * K;
    const T bias = plan.bias ? static_cast<const T*>(plan.packed_bias)[source.channel()] : T(0);
    int64_t first = 0, last = out.height;
    if (num_bands > 1) {
      first = band * out.height / num_bands;
      last = (band + 1) * out.height / num_bands;
    }
    if (++band == num_bands) {
      band = 0;
      source.advance();
      target.advance();
      if (task + 1 < end) {
        ahead.first.begin_at_rate(plane_region<S>(in, source.data()), read_lines);
        ahead.second.begin_at_rate(plane_region<S>(out, target.data()), write_lines, true);
      }
    }
#if defined(LKA_AVX512)
    if constexpr (kInPlace) {
      if (out.width <= V) {
        in_place.begin(from, first + plan.origin_y, plan.origin_x);
        convolve_plane<T, V, K, S, RowsInPlace<T, V, K>>(plan, in_place, first, last - first,
                                                         weight, bias, to, ahead);
        continue;
      }
    }
#endif
    int64_t row = first;
    for (int64_t chunk = 1; chunk <= num_chunks; ++chunk) {
      const int64_t row_end =
          chunk == num_chunks ? last : first + chunk * (last - first) / num_chunks;
      rows.template fill<S>(from, in, row + plan.origin_y, plan.origin_x, row_end - row + K - 1,
                            false);
      convolve_plane<T, V, K, S, PaddedRows<T, V>>(plan, {rows.row(0), rows.pitch()}, row,
                                                   row_end - row, weight, bias, to, ahead);
      row = row_end;
    }
  }
}

// Taps [kFirst, kFirst + kTaps) of every kernel column, from the `rows` rows and `count` columns of
// grad_output that begin at `grad`, which is its column `column`; added to total[m·K + n].
template <class T, int V, int K, int kFirst, int kTaps, class S>
void add_planar_gradient(const PlaneRows<T, V>& input, const S* grad, int64_t grad_row,
                         int64_t rows, int64_t column, int count, Vec<T, V>* total, Vec<T, V>& bias,
                         Ahead& ahead) {
  Vec<T, V> sum[kTaps][K] = {};
  Vec<T, V> grad_sum{};
  Vec<T, V> recent[kTaps] = {};  // rows of grad_output that the input row in hand meets
  const T* x = input.row(kFirst) + column;
  const int64_t pitch = input.pitch();
  for (int64_t y = 0; y < rows + kTaps - 1; y += kTaps) {
    ahead.step();
#pragma GCC unroll kUnroll
    for (int k = 0; k < kTaps; ++k) {
      recent[k] = y + k < rows ? load_some<T, V, S>(grad + (y + k) * grad_row, count) : Vec<T, V>{};
      if constexpr (kFirst == 0) grad_sum += recent[k];
#pragma GCC unroll kUnroll
      for (int n = 0; n < K; ++n) {
        const Vec<T, V> value = load<T, V>(x + (y + k) * pitch + n);
#pragma GCC unroll kUnroll
        for (int m = 0; m < kTaps; ++m) sum[m][n] += recent[(k - m + kTaps) % kTaps] * value;
      }
    }
  }
  bias += grad_sum;
  for (int m = 0; m < kTaps; ++m)
    for (int n = 0; n < K; ++n) total[(kFirst + m) * K + n] += sum[m][n];
}

// As many kernel rows at a time as the registers hold accumulators for.
#if defined(__SANITIZE_ADDRESS__)  // see correlate.h
constexpr int kGradientRegisters = 12;
#elif LKA_VECTOR_BYTES == 64
constexpr int kGradientRegisters = 32;
#else
constexpr int kGradientRegisters = 16;
#endif

template <class T, int V, int K, class S, int kFirst = 0>
void add_planar_gradients(const PlaneRows<T, V>& input, const S* grad, int64_t grad_row,
                          int64_t rows, int64_t column, int count, Vec<T, V>* total,
                          Vec<T, V>& bias, Ahead& ahead) {
  if constexpr (kFirst < K) {
    constexpr int kMost = kGradientRegisters / (K + 1), kLeft = K - kFirst;
    constexpr int kPasses = (kLeft + kMost - 1) / kMost;
    constexpr int kTaps = (kLeft + kPasses - 1) / kPasses;
    add_planar_gradient<T, V, K, kFirst, kTaps, S>(input, grad, grad_row, rows, column, count,
                                                   total, bias, ahead);
    add_planar_gradients<T, V, K, S, kFirst + kTaps>(input, grad, grad_row, rows, column, count,
                                                     total, bias, ahead);
  }
}

template <class T, int V>
T sum_of_lanes(Vec<T, V> v) {
  T sum = 0;
  for (int l = 0; l < V; ++l) sum += v[l];
  return sum;
}

// One plane of the input against one of grad_output, added to total[K·K + 1]; the last is the sum
// of grad_output.
template <class T, int V, int K, class S>
void add_plane_gradient(const WeightGradientPlan& plan, PlaneRows<T, V>& rows, const S* x,
                        const S* grad_output, Vec<T, V>* total, Ahead& ahead) {
  const MapView& grad = plan.grad_output;
  const int64_t num_chunks = (grad.height + plan.chunk - 1) / plan.chunk;
  int64_t row = 0;
  for (int64_t chunk = 1; chunk <= num_chunks; ++chunk) {
    const int64_t row_end = chunk == num_chunks ? grad.height : chunk * grad.height / num_chunks;
    // Input rows beyond the last that counts meet zeros in place of grad_output, as do columns: an
    // infinity near the edge of a map makes NaN of more taps than it belongs to.
    rows.template fill<S>(x, plan.input, row + plan.y.origin, plan.x.origin,
                          row_end - row + 2 * (K - 1), num_chunks > 1);
    for (int64_t column = 0; column < grad.width; column += V) {
      const int64_t left = grad.width - column;
      add_planar_gradients<T, V, K, S>(rows, grad_output + row * grad.stride_h + column,
                                       grad.stride_h, row_end - row, column,
                                       left < V ? int(left) : V, total, total[K * K], ahead);
    }
    row = row_end;
  }
}

template <class T, int V, int K, class S>
void planar_weight_gradients(const WeightGradientPlan& plan, int64_t begin, int64_t end,
                             void* scratch) {
  PlaneRows<T, V> rows(plan.buffer, static_cast<T*>(scratch));
  constexpr int64_t kElements = K * K + 1;
  auto* totals = reinterpret_cast<Vec<T, V>*>(static_cast<T*>(scratch) +
                                              plan.buffer.rows * plan.buffer.columns);
  const MapView &in = plan.input, &grad = plan.grad_output;
  const int64_t elements = plan.kernel_h * plan.kernel_w + 1;
  const int64_t steps = (grad.width + V - 1) / V * ((grad.height + K - 1) / K);
  const int64_t input_lines = lines_per_step<S>(in, steps);
  const int64_t grad_lines = lines_per_step<S>(grad, steps);
  const auto plane_of = [](const MapView& map, int64_t image, int64_t channel) {
    return static_cast<const S*>(map.data) + image * map.stride_b + channel * map.stride_c;
  };
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / plan.num_groups, group = task % plan.num_groups;
    const int64_t first_image = part * plan.batch / plan.num_parts;
    const int64_t last_image = (part + 1) * plan.batch / plan.num_parts;
    const int64_t group_end = (group + 1) * plan.channels / plan.num_groups;
    // Some channels of an image together, as they stand side by side in memory.
    for (int64_t first = group * plan.channels / plan.num_groups; first < group_end;
         first += plan.channels_together) {
      const int64_t last =
          first + plan.channels_together < group_end ? first + plan.channels_together : group_end;
      for (int64_t i = 0; i < (last - first) * kElements; ++i) totals[i] = Vec<T, V>{};
      for (int64_t image = first_image; image < last_image; ++image)
        for (int64_t channel = first; channel < last; ++channel) {
          const bool same = channel + 1 < last;  // image
          if (same || image + 1 < last_image) {
            const int64_t next_image = same ? image : image + 1;
            const int64_t next_channel = same ? channel + 1 : first;
            ahead.first.begin_at_rate(plane_region<S>(in, plane_of(in, next_image, next_channel)),
                                      input_lines);
            ahead.second.begin_at_rate(
                plane_region<S>(grad, plane_of(grad, next_image, next_channel)), grad_lines);
          }
          add_plane_gradient<T, V, K, S>(plan, rows, plane_of(in, image, channel),
                                         plane_of(grad, image, channel),
                                         totals + (channel - first) * kElements, ahead);
        }
      for (int64_t channel = first; channel < last; ++channel) {
        const Vec<T, V>* total = totals + (channel - first) * kElements;
        T* partial = static_cast<T*>(plan.partial) + (part * plan.channels + channel) * elements;
        memset(static_cast<void*>(partial), 0, size_t(elements) * sizeof(T));
        for (int m = 0; m < K; ++m)
          for (int n = 0; n < K; ++n)
            partial[(plan.y.first_output + m) * plan.kernel_w + plan.x.first_output + n] =
                sum_of_lanes<T, V>(total[m * K + n]);
        partial[elements - 1] = sum_of_lanes<T, V>(total[K * K]);
      }
    }
  }
}

// Weights of channels [begin, end), column by column.
template <class T, class S>
void pack_planar_weights_as(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  const S* weight = static_cast<const S*>(plan.weight);
  const Phase &y = plan.phases_y[0], &x = plan.phases_x[0];
  for (int64_t channel = begin; channel < end; ++channel) {
    const S* from = weight + channel * plan.kernel_h * plan.kernel_w;
    T* to = static_cast<T*>(plan.packed_weight) + channel * plan.packed_taps;
    for (int64_t n = 0; n < x.taps; ++n)
      for (int64_t m = 0; m < y.taps; ++m)
        *to++ =
            load_one<T>(from + (y.first_kernel_index + m * y.kernel_index_step) * plan.kernel_w +
                        x.first_kernel_index + n * x.kernel_index_step);
    if (plan.bias)
      static_cast<T*>(plan.packed_bias)[channel] =
          load_one<T>(static_cast<const S*>(plan.bias) + channel);
  }
}

template <class T, int V>
void pack_planar_weights(const ConvolvePlan& plan, int64_t begin, int64_t end) {
  with_storage<T>(plan.storage, [&](auto element) {
    pack_planar_weights_as<T, decltype(element)>(plan, begin, end);
  });
}

template <class T, int V>
void planar_convolve(const ConvolvePlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    using S = decltype(element);
    switch (plan.phases_y[0].taps) {
      case 1: return convolve_planes<T, V, 1, S>(plan, begin, end, scratch);
      case 3: return convolve_planes<T, V, 3, S>(plan, begin, end, scratch);
      case 5: return convolve_planes<T, V, 5, S>(plan, begin, end, scratch);
      default: return convolve_planes<T, V, 7, S>(plan, begin, end, scratch);
    }
  });
}

template <class T, int V>
void planar_weight_gradient(const WeightGradientPlan& plan, int64_t begin, int64_t end,
                            void* scratch) {
  with_storage<T>(plan.storage, [&](auto element) {
    using S = decltype(element);
    switch (plan.y.count) {
      case 3: return planar_weight_gradients<T, V, 3, S>(plan, begin, end, scratch);
      case 5: return planar_weight_gradients<T, V, 5, S>(plan, begin, end, scratch);
      default: return planar_weight_gradients<T, V, 7, S>(plan, begin, end, scratch);
    }
  });
}

}  // namespace
