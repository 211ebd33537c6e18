// What the CPU kernels of the adapter are told: plain data, no code.
#pragma once

#include "../adapter_params.h"
#include "../conv_params.h"

namespace lka::cpu {

// Token tensors are dense, (batch, tokens, dim) or (batch, tokens, rank); T is float, or double for
// float64 storage. Packed weights are padded with zeros to whole vectors.
struct AdapterParams {
  Storage storage;
  int64_t batch, tokens, num_prefix_tokens, height, width;
  int64_t dim, rank;
  int64_t kernel_h, kernel_w, dilation;
  Activation activation;
  bool activate_before, activate_after;
  PrefixMode prefix_mode;
  double scale;

  bool dropout;
  uint64_t seed, drop_threshold;
  double keep_factor;

  // Filled by the planner for the kernels chosen.
  int64_t lanes, rank_blocks, rank_padded;  // of the bottleneck
  int64_t dim_padded, rank_rows;            // of a packed projection
  int64_t pad_top, pad_left, buffer_rows, buffer_columns;

  const void* x;         // (batch, tokens, dim) storage
  const void* residual;  // likewise, or null
  void* y;               // likewise
  void* z;               // (batch, tokens, rank) T
  void* c;               // likewise
  void* a;               // likewise: act(z), then its gradient; only where steps are taken apart

  // Packed weights, T. Projections are [rank rows][dim padded], their biases one such row or
  // column.
  const void *down, *down_bias;
  const void *up, *up_bias;      // transposed, times scale
  const void *conv, *conv_bias;  // [rank block][kernel_h·kernel_w][V], [rank padded]
};

struct AdapterGradients {
  const void* grad_output;  // (batch, tokens, dim) storage
  void* grad_x;             // likewise, or null if not needed
  bool add_grad_output;     // to grad_x: x was its own residual
  bool need_down, need_conv, need_up;
  const void* conv_flipped;  // [rank block][kernel_h·kernel_w][V]

  void* grad_c;  // (batch, tokens, rank) T; only where steps are taken apart

  // Weight gradients are summed per part of the batch: [part][part_elements] T, as
  //   down [rank rows][dim padded], up likewise, up bias [dim padded], down bias [rank padded],
  // and, unless steps are taken apart, conv [rank block][taps][V], conv bias [rank padded].
  int64_t num_parts, part_elements;
  void* parts;
};

}  // namespace lka::cpu
