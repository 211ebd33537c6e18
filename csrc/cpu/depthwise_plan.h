// What the CPU kernels of depthwise convolution are told: plain data, no code, so that every
// instruction set can include it safely. Made by depthwise_planner.cpp.
#pragma once

#include "../conv_params.h"
#include "fft_plan.h"

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
  // The last block of an image ends with its channels and begins with some of the one before.
  bool last_overlaps = false;
};

// How a kernel keeps the rows of its source: unpacked into vectors, with zeros to the left and
// right, as many at a time as the outputs in hand need. Rows that lie outside the source are one
// shared row of zeros.
struct SourceBuffer {
  int64_t columns;    // of a row, zeros included
  int64_t blocks;     // blocks of lanes in a row, [block][column][V]
  int64_t ring_rows;  // rows kept at a time
  int64_t rows;       // rows of one band

  // Elements of `size` bytes that it takes: the ring, a row of zeros, a table of pointers to rows.
  int64_t elements(int64_t lanes, int64_t size) const {
    return (ring_rows + 1) * blocks * columns * lanes +
           table_size() * int64_t(sizeof(void*)) / size;
  }
  int64_t table_size() const { return (rows + 7) / 8 * 8; }
};

// Planar kernels compute tiles of at least this many rows.
constexpr int64_t kFewestPlanarRows = 4;
// Positions of a flat plane: bits of a mask. With a stride, columns of both maps: two rows a
// vector.
constexpr int64_t kMostFlatPositions = 64, kMostSpreadColumns = 16;
// Rows of grad_output that weight gradients in place take together where rows have one tap and all
// steps are one: a row of the input, read once, meets them all, each with another kernel row.
constexpr int64_t kGradRows = 4;

// Forward or backward-input. A task is one band of output rows of buffer.blocks blocks of planes;
// of planar kernels, of one plane; of the dense form, of one block, and in place, of all blocks of
// an image, both without source rows in a buffer; by row tiles, of all blocks too.
struct ConvolvePlan {
  Storage storage;
  int64_t batch, channels, kernel_h, kernel_w;
  MapView source, target;
  LanePlan lanes;
  const Phase* phases_y;
  const Phase* phases_x;
  int64_t num_phases_y, num_phases_x;
  // Source rows in units of the buffer: rows, or pairs of rows of which the first begins at source
  // row pair_shift, 0 or -1. Phases and origins are in these units.
  bool paired = false;
  int64_t pair_shift = 0;
  int64_t source_height;
  Phase unpaired_y;  // what the phases of pairs are made of, and of row tiles that of rows
  int64_t origin_y, origin_x;  // smallest origins: where the source buffer begins
  int64_t tap_rows;            // kernel rows of all phases
  int64_t span_y;              // source rows that one output of every phase reads
  // In place: the distance between neighbouring source rows or columns that any output reads.
  int64_t rows_apart, columns_apart;
  int64_t band, num_bands;  // outputs j of a phase per band, at most
  int64_t chunk;            // outputs j of a phase for which the source is unpacked at a time
  SourceBuffer buffer;
  int64_t groups_per_image;  // groups of buffer.blocks blocks; 0 where blocks go one by one
  FftConv fft;               // of the transform kernels
  bool dense = false;        // the kernel covers the map from every position
  bool in_place = false;     // the source is read where it stands
  bool row_tiles = false;    // the same for tiles of some columns, by single rows or pairs
  bool direct_store;         // kernels may write the target themselves
  const void* weight;        // (C, kH, kW) dense
  const void* bias;          // (C,) or null
  // [pattern][phase y][phase x][tap y][tap x][V]; planar: [channel][tap x][tap y]
  void* packed_weight;
  void* packed_bias;         // [pattern][V]
  int64_t packed_taps;       // taps of one pattern over all phases; paired: and unpaired_y
  int64_t scratch_elements;  // per thread
};

// Backward-weight. A task is one group of blocks of lanes over one part of the images.
struct WeightGradientPlan {
  Storage storage;
  int64_t batch, channels, kernel_h, kernel_w;
  MapView input, grad_output;
  LanePlan lanes;
  Phase y, x;           // outputs are kernel elements, taps are positions of grad_output
  int64_t chunk;        // rows of grad_output at a time
  SourceBuffer buffer;  // of the input
  int64_t num_parts;  // parts of the rows of all images (1 if cross_images), planar: of the images
  int64_t part_rows = 1;  // in place: parts begin where a multiple of so many rows of an image does
  int64_t num_groups;     // groups of blocks
  FftConv fft;            // of the transform kernels
  bool in_place = false;
  int64_t channels_together = 0;  // planar: whose sums are kept at a time
  void* partial;                  // [part][block][kH·kW + 1][V]; the last is the bias's gradient
  int64_t scratch_elements;
};

}  // namespace lka::cpu
