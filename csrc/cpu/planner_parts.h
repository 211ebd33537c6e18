// What planning a convolution and planning its weight gradient have in common: lanes, buffers, and
// which kernels serve a layout.
#pragma once

#include "depthwise_planner.h"

namespace lka::cpu {

// Positions of outputs for which the source is unpacked at a time, where it is transposed in
// registers: enough that few of these squares are only partly full.
constexpr int64_t kTransposedPositions = 96;

// Of the lanes of vectors that hold so many channels.
double used_share(int64_t channels, int lanes);

// Of an element, as it is computed with and as it is stored.
int64_t arithmetic_bytes(Storage storage);
int64_t storage_bytes(Storage storage);

// Whether vectors have 64 bytes: then there are 32 of them, and masks.
bool has_wide_vectors(Storage storage);

// The channels of an image in blocks of so many, the last perhaps partly idle.
LanePlan channel_blocks(int64_t batch, int64_t channels, int lanes);

// Full vectors of kernels that read maps where they stand: the last of an image ends with its
// channels. Two halves would take longer.
bool overlapping_blocks(Storage storage, int64_t batch, int64_t channels, LanePlan& plan,
                        const DepthwiseKernels*& chosen);

// Channels of one image fill the lanes where at most a fifth of them would idle; else planes of
// different images share a vector, unless channels are adjacent in memory and fill a narrow vector,
// or half of it where a part of a vector is read by one instruction, or there is one image: then
// reading them together is worth more.
LanePlan plan_lanes(const ConvParams& p, bool channels_adjacent, const DepthwiseKernels*& chosen);

// Blocks of lanes to unpack together and outputs to unpack for at a time: as many as fit the
// buffer. `least` outputs come first, then blocks, then more outputs.
int64_t choose_chunk(SourceBuffer& buffer, int64_t most_blocks, int64_t vector_bytes, int64_t span,
                     int64_t step, int64_t result_row, int64_t outputs, int64_t least);

bool unit_steps(const ConvParams& p);

// A square of 3, 5 or 7 taps.
bool small_square(int64_t taps_y, int64_t taps_x);

// Whether planar kernels serve a convolution with this many taps (clipped) between these maps. They
// widen 16-bit types once for every vector that they store and narrow them through memory: there
// the other kernels are mostly faster on rows of at most half a vector, and with 7 taps.
bool planar_serves(const ConvParams& p, int64_t taps_y, int64_t taps_x, const MapView& source,
                   const MapView& target);

// Those whose vectors suit rows of this width.
const DepthwiseKernels* planar_kernels(Storage storage, int64_t width);

// Lanes of a planar kernel share no weights: to the rest of the plan, a block is one plane.
LanePlan one_plane_each(int64_t batch, int64_t channels);

// Rows of `columns` elements at a time, and the buffer for them and `more` rows around them.
int64_t planar_chunk(SourceBuffer& buffer, int64_t columns, int lanes, int64_t bytes, int64_t rows,
                     int64_t more);

// Lanes of transform kernels, and which kernels have as many.
LanePlan plan_fft_lanes(const ConvParams& p, bool channels_adjacent,
                        const DepthwiseKernels*& chosen);

// Whether maps are read where they stand with a stride: with few taps, or with tiles of 7 in a row.
bool in_place_serves(const ConvParams& p, const LanePlan& lanes);

// Whether columns of taps are better taken as rows, so that an element is loaded once for all taps
// of a tile: where a pixel, of which the next is a row away then, is long enough to be loaded
// ahead.
bool column_of_taps(const ConvParams& p);

// The same convolution with rows for columns and columns for rows.
ConvParams turned(ConvParams p);

}  // namespace lka::cpu
