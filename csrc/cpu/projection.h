// The adapter's two narrow matrix products, for one tile of tokens in cache.
//
// rank is small (4 to 256) and dim large, so each product is vectorised along the side whose
// weights are contiguous and every token value is broadcast.
#pragma once

#include "simd.h"

namespace {

constexpr int kTileTokens = 12;

template <class S>
constexpr int64_t kLine = 64 / sizeof(S);

// Start loading the cache line of column `c` of each of the `kTokens` tokens from `tokens` on:
// those of the next tile, while this one is multiplied (prefetch.h says why not all at once).
template <int kTokens, int kForWriting, class S>
inline void prefetch_column(const S* tokens, int64_t dim, int64_t c) {
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) __builtin_prefetch(tokens + t * dim + c, kForWriting);
}

// out[t][0:V] = start[0:V] + sum over c of x[t][c]·weight[c][0:V], one block of the bottleneck.
template <class T, int V, int kTokens>
void project_in_tile(const T* x, int64_t dim, const T* weight, const T* start, T* out,
                     int64_t out_stride) {
  Vec<T, V> sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = start ? load_aligned<V>(start) : Vec<T, V>{};
  for (int64_t line = 0; line < dim; line += kLine<T>) {
    prefetch_column<kTokens, 0>(x + kTokens * dim, dim, line);
    const int64_t end = line + kLine<T> < dim ? line + kLine<T> : dim;
    for (int64_t c = line; c < end; ++c) {
      const Vec<T, V> w = load_aligned<V>(weight + c * V);
      for (int t = 0; t < kTokens; ++t) sum[t] += splat<T, V>(x[t * dim + c]) * w;
    }
  }
  for (int t = 0; t < kTokens; ++t) store<T, V>(out + t * out_stride, sum[t]);
}

template <class T, int V, int kTokens = kTileTokens>
void project_in(const T* x, int64_t tokens, int64_t dim, const T* weight, const T* start, T* out,
                int64_t out_stride) {
  if constexpr (kTokens > 0) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * dim, out += kTokens * out_stride)
      project_in_tile<T, V, kTokens>(x, dim, weight, start, out, out_stride);
    if (tokens > 0) project_in<T, V, kTokens / 2>(x, tokens, dim, weight, start, out, out_stride);
  }
}

// gradient[c][0:V] += sum over t of x[t][c]·g[t][0:V].
template <class T, int V, int kTokens>
void outer_tile(const T* x, int64_t dim, const T* g, int64_t g_stride, T* gradient) {
  Vec<T, V> values[kTokens];
  for (int t = 0; t < kTokens; ++t) values[t] = load<T, V>(g + t * g_stride);
  for (int64_t line = 0; line < dim; line += kLine<T>) {
    prefetch_column<kTokens, 0>(x + kTokens * dim, dim, line);
    const int64_t end = line + kLine<T> < dim ? line + kLine<T> : dim;
    for (int64_t c = line; c < end; ++c) {
      Vec<T, V> sum = splat<T, V>(x[c]) * values[0];
      for (int t = 1; t < kTokens; ++t) sum += splat<T, V>(x[t * dim + c]) * values[t];
      store_aligned<V>(gradient + c * V, load_aligned<V>(gradient + c * V) + sum);
    }
  }
}

template <class T, int V, int kTokens = kTileTokens>
void outer(const T* x, int64_t tokens, int64_t dim, const T* g, int64_t g_stride, T* gradient) {
  if constexpr (kTokens > 0) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * dim, g += kTokens * g_stride)
      outer_tile<T, V, kTokens>(x, dim, g, g_stride, gradient);
    if (tokens > 0) outer<T, V, kTokens / 2>(x, tokens, dim, g, g_stride, gradient);
  }
}

// total[0:count] += sum over t of rows[t][0:count]; each tile is summed on its own first.
template <class T, int V>
void add_column_sums(const T* rows, int64_t tokens, int64_t stride, int64_t count, T* total) {
  for (int64_t k = 0; k < count; k += V) {
    const int some = count - k < V ? int(count - k) : V;
    Vec<T, V> sum{};
    for (int64_t t = 0; t < tokens; ++t) sum += load_some<T, V, T>(rows + t * stride + k, some);
    store_some<T, V, T>(total + k, load_some<T, V, T>(total + k, some) + sum, some);
  }
}

// y[t][c] = residual[t][c] + start[c] + sum over k of e[t][k]·weight[k][c], into storage S.
template <class T, int V, int kTokens, class S>
void project_out_tile(const T* e, int64_t e_stride, int64_t rank, int64_t dim, int64_t dim_padded,
                      const T* weight, const T* start, const S* residual, S* y) {
  constexpr int kVectors = 3;
  for (int64_t c = 0; c < dim; c += kVectors * V) {
    for (int64_t line = c; line < c + kVectors * V; line += kLine<S>) {
      prefetch_column<kTokens, 1>(y + kTokens * dim, dim, line);
      if (residual) prefetch_column<kTokens, 0>(residual + kTokens * dim, dim, line);
    }
    Vec<T, V> sum[kTokens][kVectors];
    // Weights are padded to whole vectors; of the three, those beyond the end are skipped.
    const int vectors = dim_padded - c >= kVectors * V ? kVectors : int((dim_padded - c) / V);
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T, V> first =
          start && v < vectors ? load_aligned<V>(start + c + v * V) : Vec<T, V>{};
      for (int t = 0; t < kTokens; ++t) sum[t][v] = first;
    }
    if (vectors == kVectors) {
      for (int64_t k = 0; k < rank; ++k)
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T, V> w = load_aligned<V>(weight + k * dim_padded + c + v * V);
          for (int t = 0; t < kTokens; ++t) sum[t][v] += splat<T, V>(e[t * e_stride + k]) * w;
        }
    } else {
      for (int64_t k = 0; k < rank; ++k)
        for (int v = 0; v < vectors; ++v) {
          const Vec<T, V> w = load_aligned<V>(weight + k * dim_padded + c + v * V);
          for (int t = 0; t < kTokens; ++t) sum[t][v] += splat<T, V>(e[t * e_stride + k]) * w;
        }
    }
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = t * dim + c + v * V;
        const int64_t left = dim - (c + v * V);
        const int count = left < V ? int(left) : V;
        if (residual) sum[t][v] += load_some<T, V, S>(residual + at, count);
        store_some<T, V, S>(y + at, sum[t][v], count);
      }
  }
}

template <class T, int V, class S, int kTokens = 4>
void project_out(const T* e, int64_t e_stride, int64_t tokens, int64_t rank, int64_t dim,
                 int64_t dim_padded, const T* weight, const T* start, const S* residual, S* y) {
  if constexpr (kTokens > 0) {
    for (; tokens >= kTokens; tokens -= kTokens) {
      project_out_tile<T, V, kTokens, S>(e, e_stride, rank, dim, dim_padded, weight, start,
                                         residual, y);
      e += kTokens * e_stride;
      y += kTokens * dim;
      if (residual) residual += kTokens * dim;
    }
    if (tokens > 0)
      project_out<T, V, S, kTokens / 2>(e, e_stride, tokens, rank, dim, dim_padded, weight, start,
                                        residual, y);
  }
}

}  // namespace
