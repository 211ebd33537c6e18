// What the CPU kernels of depthwise convolution are told: plain data, no code, so that every
// instruction set can include it safely. Made by depthwise_plan.cpp.
#pragma once

#include "../conv_params.h"

namespace lka::cpu {

// One dimension of one phase of the output: outputs first_output, first_output + output_stride, …
// Output j sums taps m = 0 … taps - 1 of source element origin + j·out_step + m·tap_step, with
// kernel element first_kernel_index + m·kernel_index_step.
struct Phase {
  int64_t first_output, output_stride, count;
  int64_t taps, origin, out_step, tap_step;
  int64_t first_kernel_index, kernel_index_step;
};

// Which planes share a vector. Channels of one image where they fill the lanes; otherwise planes
// are numbered b·C + c and V consecutive ones share a vector, across images.
struct LanePlan {
  int lanes;  // V
  bool cross_images;
  int64_t blocks_per_image;  // if not cross_images
  int64_t num_blocks;
  int64_t num_patterns;  // distinct sequences of channels over the lanes of a block
};

// Forward or backward-input. A task is one block of planes and one band of output rows.
struct ConvolvePlan {
  Storage storage;
  int64_t batch, channels, kernel_h, kernel_w;
  MapView source, target;
  LanePlan lanes;
  const Phase* phases_y;
  const Phase* phases_x;
  int64_t num_phases_y, num_phases_x;
  int64_t origin_y, origin_x;           // smallest origins: where the source buffer begins
  int64_t buffer_rows, buffer_columns;  // of the source buffer for one band
  int64_t band, num_bands;              // outputs j of a phase per band
  bool blocks_share_lines;              // channels are adjacent in memory: changes the task order
  bool direct_store;                    // kernels may write the target themselves
  const void* weight;                   // (C, kH, kW) dense
  const void* bias;                     // (C,) or null
  void* packed_weight;                  // [pattern][phase y][phase x][tap y][tap x][V]
  void* packed_bias;                    // [pattern][V]
  int64_t packed_taps;                  // taps of one pattern over all phases
  int64_t scratch_elements;             // per thread
};

// Backward-weight. A task is one block of lanes over one part of the images.
struct WeightGradientPlan {
  Storage storage;
  int64_t batch, channels, kernel_h, kernel_w;
  MapView input, grad_output;
  LanePlan lanes;
  Phase y, x;  // outputs are kernel elements, taps are positions of grad_output
  int64_t buffer_columns;
  int64_t band, num_bands;  // rows of grad_output at a time
  int64_t num_parts;        // parts of the batch (1 if cross_images)
  void* partial;            // [part][block][kH·kW + 1][V]; the last is the bias's gradient
  int64_t scratch_elements;
};

}  // namespace lka::cpu
