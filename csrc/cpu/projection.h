// The adapter's narrow matrix products, for one tile of tokens in cache.
//
// rank is small (4 to 256) and dim large. All weights are [rank][dim padded to whole vectors]: the
// lanes are neighbouring channels, so that tokens are read by whole vectors, in the order of
// memory. With the bottleneck in the lanes instead, every channel of a tile's tokens is broadcast,
// and such reads, a multiple of 64 bytes apart, fall into one bank of the first-level cache: half
// the arithmetic at r = 8 (Zen 4).
#pragma once

#include "simd.h"

namespace {

// Registers for sums: tokens × ranks, ranks × vectors, tokens × vectors.
#if defined(LKA_AVX512)
constexpr int kMostRanks = 8;
#else
constexpr int kMostRanks = 4;
#endif
constexpr int kTokensIn = 3, kTokensOut = 4, kVectors = 3;

// Rows of the packed weights come in such groups, zeros at the end.
constexpr int kRankGroup = 4;

// How many bytes ahead tokens are loaded, in the order of memory whatever the order of use: a
// processor recognises one ascending stream, not a line of each of three tokens in turn (192
// channels, Zen 4: 21 against 10 GB/s). Into the second-level cache, as the first is full of
// weights. So are lines that will be written: asked for as such they would come into the first
// (residual + product into cold memory, 192 channels: 0.34 ms against 0.49).
constexpr int64_t kAhead = 12 * 1024;

inline void load_ahead(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kAhead, 0, 2);
}

template <class V, int... J>
inline auto add_neighbours(V v, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(v, v, (2 * J)...) + __builtin_shufflevector(v, v, (2 * J + 1)...);
}

// The sums of N groups of neighbouring lanes.
template <class T, int V, int N>
inline Vec<T, N> sum_groups(Vec<T, V> v) {
  if constexpr (V == N)
    return v;
  else
    return sum_groups<T, V / 2, N>(add_neighbours(v, std::make_integer_sequence<int, V / 2>{}));
}

// out[t][k] = start[t][k] + sum over c of x[t][c]·weight[k][c] for kTokens tokens and kRanks ranks,
// of which the first `ranks` are stored. c runs over whole vectors, or over one of `dim` channels.
template <class T, int V, int kTokens, int kRanks, bool kWhole>
inline void project_in_tile(const T* x, int64_t x_row, int64_t dim, const T* weight,
                            int64_t weight_row, const T* start, int64_t start_row, int ranks,
                            T* out, int64_t out_row) {
  Vec<T, V> sum[kTokens][kRanks];
#pragma GCC unroll kUnroll
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k) sum[t][k] = Vec<T, V>{};
  for (int64_t c = 0; c < dim; c += V) {
    Vec<T, V> tokens[kTokens];
#pragma GCC unroll kUnroll
    for (int t = 0; t < kTokens; ++t) {
      load_ahead(x + c * kTokens + t * V);
      const T* at = x + t * x_row + c;
      tokens[t] = kWhole ? load<T, V>(at) : load_some<T, V, T>(at, int(dim));
      keep_in_register(tokens[t]);
    }
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k) {
      Vec<T, V> w = load_aligned<V>(weight + k * weight_row + c);
      keep_in_register(w);
#pragma GCC unroll kUnroll
      for (int t = 0; t < kTokens; ++t) sum[t][k] += tokens[t] * w;
    }
  }
#pragma GCC unroll kUnroll
  for (int t = 0; t < kTokens; ++t) {
    Vec<T, V> sums[kRanks];
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k) sums[k] = sum[t][k];
    auto total = sum_groups<T, V, kRanks>(fold<T, V, kRanks>(sums));
    if (start) total += load_some<T, kRanks, T>(start + t * start_row, ranks);
    store_some<T, kRanks, T>(out + t * out_row, total, ranks);
  }
}

template <class T, int V, int kTokens, int kRanks>
inline void project_in_tokens(const T* x, int64_t dim, const T* weight, int64_t weight_row,
                              const T* start, int ranks, T* out, int64_t out_row) {
  const int64_t whole = dim / V * V;
  project_in_tile<T, V, kTokens, kRanks, true>(x, dim, whole, weight, weight_row, start, 0, ranks,
                                               out, out_row);
  if (whole < dim)
    project_in_tile<T, V, kTokens, kRanks, false>(x + whole, dim, dim - whole, weight + whole,
                                                  weight_row, out, out_row, ranks, out, out_row);
}

// out[t][k] = start[k] + sum over c of x[t][c]·weight[k][c]. The weights of one group of ranks stay
// in the first-level cache for all tokens.
template <class T, int V>
void project_in(const T* x, int64_t tokens, int64_t dim, const T* weight, int64_t weight_row,
                const T* start, int64_t rank, T* out, int64_t out_row) {
  constexpr int kMany = kMostRanks < V ? kMostRanks : V;
  constexpr int kFew = kRankGroup < V ? kRankGroup : V;
  int64_t k = 0;
  const auto project = [&](auto many) {
    constexpr int kRanks = decltype(many)::value;
    const int ranks = rank - k < kRanks ? int(rank - k) : kRanks;
    const auto some = [&](auto many_tokens, int64_t t) {
      project_in_tokens<T, V, decltype(many_tokens)::value, kRanks>(
          x + t * dim, dim, weight + k * weight_row, weight_row, start ? start + k : nullptr, ranks,
          out + t * out_row + k, out_row);
    };
    int64_t t = 0;
    for (; tokens - t >= kTokensIn; t += kTokensIn) some(Constant<kTokensIn>{}, t);
    for (; t < tokens; ++t) some(Constant<1>{}, t);
    k += kRanks;
  };
  while (rank - k > kFew) project(Constant<kMany>{});
  while (rank - k > 0) project(Constant<kFew>{});
}

// gradient[k][0:kColumns·V] += sum over t of g[t][k]·x[t][0:kColumns·V] for kRanks ranks and, where
// wanted, column_sums += sum over t of x[t]; `fresh`: =. Of a single vector only `count` channels
// exist.
template <class T, int V, int kRanks, int kColumns, bool kSums>
inline void outer_tile(const T* x, int64_t tokens, int64_t dim, const T* g, int64_t g_row,
                       T* gradient, int64_t gradient_row, T* column_sums, bool fresh, int count,
                       const T* ahead, int64_t ahead_step) {
  Vec<T, V> sum[kRanks][kColumns], column[kColumns];
#pragma GCC unroll kUnroll
  for (int v = 0; v < kColumns; ++v) {
    column[v] = Vec<T, V>{};
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k)
      sum[k][v] = fresh ? Vec<T, V>{} : load_aligned<V>(gradient + k * gradient_row + v * V);
  }
  for (int64_t t = 0; t < tokens; ++t, x += dim, g += g_row, ahead += ahead_step) {
    Vec<T, V> channels[kColumns];
#pragma GCC unroll kUnroll
    for (int v = 0; v < kColumns; ++v) {
      __builtin_prefetch(ahead + v * V, 0, 2);
      channels[v] = kColumns > 1 ? load<T, V>(x + v * V) : load_some<T, V, T>(x + v * V, count);
      keep_in_register(channels[v]);
      if (kSums) column[v] += channels[v];
    }
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k) {
      Vec<T, V> factor = splat<T, V>(g[k]);
      keep_in_register(factor);
#pragma GCC unroll kUnroll
      for (int v = 0; v < kColumns; ++v) sum[k][v] += channels[v] * factor;
    }
  }
#pragma GCC unroll kUnroll
  for (int v = 0; v < kColumns; ++v) {
#pragma GCC unroll kUnroll
    for (int k = 0; k < kRanks; ++k)
      store_aligned<V>(gradient + k * gradient_row + v * V, sum[k][v]);
    if (kSums) {
      const Vec<T, V> before = fresh ? Vec<T, V>{} : load_aligned<V>(column_sums + v * V);
      store_aligned<V>(column_sums + v * V, before + column[v]);
    }
  }
}

template <class T, int V, int kRanks, bool kSums>
void outer_ranks(const T* x, int64_t tokens, int64_t dim, const T* g, int64_t g_row, T* gradient,
                 int64_t gradient_row, T* column_sums, bool fresh, const T* ahead,
                 int64_t ahead_step) {
  int64_t c = 0;
  const auto columns = [&](auto many) {
    constexpr int kColumns = decltype(many)::value;
    const int64_t last = dim - c - (kColumns - 1) * V;
    outer_tile<T, V, kRanks, kColumns, kSums>(
        x + c, tokens, dim, g, g_row, gradient + c, gradient_row, kSums ? column_sums + c : nullptr,
        fresh, last < V ? int(last) : V, ahead, ahead_step * kColumns);
    c += kColumns * V;
    ahead += tokens * ahead_step * kColumns;
  };
  while (c + kVectors * V <= dim) columns(Constant<kVectors>{});
  while (c < dim) columns(Constant<1>{});
}

// gradient[k][c] += sum over t of g[t][k]·x[t][c] and, unless null, column_sums[c] += sum over t of
// x[t][c], while the tokens after these are loaded; `fresh`: = in place of +=. Rows up to the next
// multiple of kRankGroup are written, the last ones with whatever follows in g, also behind the
// last token.
template <class T, int V>
void outer(const T* x, int64_t tokens, int64_t dim, const T* g, int64_t g_row, int64_t rank,
           T* gradient, int64_t gradient_row, T* column_sums, bool fresh) {
  const T* ahead = x + tokens * dim;
  int64_t ahead_step = V;
  const auto ranks = [&](auto many, auto sums, int64_t k) {
    outer_ranks<T, V, decltype(many)::value, decltype(sums)::value != 0>(
        x, tokens, dim, g + k, g_row, gradient + k * gradient_row, gradient_row, column_sums, fresh,
        ahead, ahead_step);
    ahead = x;  // once is enough
    ahead_step = 0;
  };
  const auto group = [&](auto many, int64_t k) {
    if (k == 0 && column_sums)
      ranks(many, Constant<1>{}, k);
    else
      ranks(many, Constant<0>{}, k);
  };
  int64_t k = 0;
  for (; rank - k > kRankGroup; k += kMostRanks) group(Constant<kMostRanks>{}, k);
  for (; rank - k > 0; k += kRankGroup) group(Constant<kRankGroup>{}, k);
}

// total[0:count] += sum over t of rows[t][0:count]; each tile is summed on its own first.
template <class T, int V>
void add_column_sums(const T* rows, int64_t tokens, int64_t row, int64_t count, T* total) {
  for (int64_t k = 0; k < count; k += V) {
    const int some = count - k < V ? int(count - k) : V;
    Vec<T, V> sum{};
    for (int64_t t = 0; t < tokens; ++t) sum += load_some<T, V, T>(rows + t * row + k, some);
    store_some<T, V, T>(total + k, load_some<T, V, T>(total + k, some) + sum, some);
  }
}

// y[t][c] = residual[t][c] + start[c] + sum over k of e[t][k]·weight[k][c] for kColumns vectors. Of
// a single one only `count` channels exist.
template <class T, int V, int kTokens, int kColumns, class S>
inline void project_out_tile(const T* e, int64_t e_row, int64_t rank, int64_t dim, const T* weight,
                             int64_t weight_row, const T* start, const S* residual, S* y,
                             int count) {
  Vec<T, V> sum[kTokens][kColumns];
#pragma GCC unroll kUnroll
  for (int v = 0; v < kColumns; ++v) {
    const Vec<T, V> first = start ? load_aligned<V>(start + v * V) : Vec<T, V>{};
#pragma GCC unroll kUnroll
    for (int t = 0; t < kTokens; ++t) sum[t][v] = first;
  }
  const T* row = weight;
  for (int64_t k = 0; k < rank; ++k, row += weight_row) {
    Vec<T, V> w[kColumns];
#pragma GCC unroll kUnroll
    for (int v = 0; v < kColumns; ++v) {
      w[v] = load_aligned<V>(row + v * V);
      keep_in_register(w[v]);
    }
#pragma GCC unroll kUnroll
    for (int t = 0; t < kTokens; ++t) {
      Vec<T, V> factor = splat<T, V>(e[t * e_row + k]);
      keep_in_register(factor);
#pragma GCC unroll kUnroll
      for (int v = 0; v < kColumns; ++v) sum[t][v] += factor * w[v];
    }
  }
#pragma GCC unroll kUnroll
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll kUnroll
    for (int v = 0; v < kColumns; ++v) {
      const int64_t at = t * dim + v * V;
      const int some = kColumns > 1 ? V : count;
      if (residual) sum[t][v] += load_some<T, V, S>(residual + at, some);
      store_some<T, V, S>(y + at, sum[t][v], some);
    }
}

template <class T, int V, int kTokens, class S>
void project_out_tokens(const T* e, int64_t e_row, int64_t rank, int64_t dim, const T* weight,
                        int64_t weight_row, const T* start, const S* residual, S* y) {
  const char* residual_line = reinterpret_cast<const char*>(residual);
  const char* y_line = reinterpret_cast<const char*>(y);
  int64_t c = 0;
  const auto columns = [&](auto many) {
    constexpr int kColumns = decltype(many)::value;
    constexpr int64_t kBytes = kTokens * kColumns * V * sizeof(S);
    for (int64_t byte = 0; byte < kBytes; byte += 64) {
      if (residual) load_ahead(residual_line + byte);
      load_ahead(y_line + byte);
    }
    if (residual) residual_line += kBytes;
    y_line += kBytes;
    const int64_t last = dim - c - (kColumns - 1) * V;
    project_out_tile<T, V, kTokens, kColumns, S>(
        e, e_row, rank, dim, weight + c, weight_row, start ? start + c : nullptr,
        residual ? residual + c : nullptr, y + c, last < V ? int(last) : V);
    c += kColumns * V;
  };
  while (c + kVectors * V <= dim) columns(Constant<kVectors>{});
  while (c < dim) columns(Constant<1>{});
}

// y[t][c] = residual[t][c] + start[c] + sum over k of e[t][k]·weight[k][c], into storage S.
template <class T, int V, class S>
void project_out(const T* e, int64_t e_row, int64_t tokens, int64_t rank, int64_t dim,
                 const T* weight, int64_t weight_row, const T* start, const S* residual, S* y) {
  const auto some = [&](auto many) {
    constexpr int kTokens = decltype(many)::value;
    project_out_tokens<T, V, kTokens, S>(e, e_row, rank, dim, weight, weight_row, start, residual,
                                         y);
    e += kTokens * e_row;
    y += kTokens * dim;
    if (residual) residual += kTokens * dim;
    tokens -= kTokens;
  };
  while (tokens >= kTokensOut) some(Constant<kTokensOut>{});
  while (tokens > 0) some(Constant<1>{});
}

}  // namespace
