// 16 tokens × 32 channels in a warp's registers, as the tensor cores take and give them, without a
// way through shared memory.
//
// Lane 4·g + q has channels 8·q to 8·q + 7 of tokens g and g + 8, 16 bytes each: whole sectors of
// neighbouring channels. A product sums over the channels in any order, if both operands take the
// same, and gives columns in any order, if whoever reads them knows which. So that each word of a
// lane, two neighbouring channels, is what an operand wants there:
//   - summed over channels, product s of two takes words 2·s and 2·s + 1 of every lane;
//   - column n of product j of four is channel 8·(n / 2) + 2·j + n % 2, so that word j of a lane,
//     which has columns 2·q and 2·q + 1, is of its own channels.
#pragma once

#include "mma.cuh"

namespace lka::cuda {

struct TokenFragment {
  static constexpr int kTokens = 16, kChannels = 32;

  Vector16 low, high;  // of tokens g and g + 8

  // The left operand of product s of 2: a row is a token, summed over 16 channels.
  LKA_DEVICE void as_rows(int s, uint32_t (&a)[4]) const {
    a[0] = low.words[2 * s];
    a[1] = high.words[2 * s];
    a[2] = low.words[2 * s + 1];
    a[3] = high.words[2 * s + 1];
  }

  // The right operand of product j of 4: a column is a channel, summed over the 16 tokens.
  LKA_DEVICE void as_columns(int j, uint32_t (&b)[2]) const {
    b[0] = transpose_matrix(low.words[j]);
    b[1] = transpose_matrix(high.words[j]);
  }
};

// Column g of product j, of the 32.
LKA_DEVICE int channel_of_column(int g, int j) { return g / 2 * 8 + 2 * j + g % 2; }

// Words 2·s and 2·s + 1 of a row of weights, of the lane's channels: the right operand of product s
// over channels, row g being column g.
LKA_DEVICE void as_terms(const Vector16& row, int s, uint32_t (&b)[2]) {
  b[0] = row.words[2 * s];
  b[1] = row.words[2 * s + 1];
}

LKA_DEVICE Vector16 load_vector(const void* from) {
  return load_global(static_cast<const Vector16*>(from));
}
LKA_DEVICE Vector16 load_vector_if(bool exists, const void* from) {
  return exists ? load_vector(from) : Vector16{};
}

}  // namespace lka::cuda
