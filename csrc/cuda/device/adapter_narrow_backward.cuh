// The projections of the fused adapter backward for ranks of at most 16: the same gradients as in
// adapter_backward.cuh, for 16-bit elements and tensors that come in fragments of 16 tokens × 32
// channels (token_fragments.cuh).
//
// The tokens of all images are one sequence, in tiles of 16; an image has no fewer, so that a tile
// is of at most two. A warp keeps its channels and goes from tile to tile, one tile ahead with its
// loads: what the tensor cores add up for the gradients of the weights stays in registers until the
// last tile. A block has `channel_warps` warps for channels side by side, and `token_warps` such
// rows of warps, each with a run of tiles; what they have is a group of partial sums.
//
// A product has tokens as its terms or columns, channels or ranks as its rows, so that loaded words
// are operands as they are: a word of two tokens of a rank is one of either.
#pragma once

#include "activation.cuh"
#include "adapter_params.cuh"
#include "storage.cuh"
#include "token_fragments.cuh"

namespace lka::cuda {

// kTiles times 8 channels of the rank. Places in tensors are computed in 32 bits.
template <class Storage, int kTiles>
class AdapterNarrowBackwardBlock {
 public:
  static constexpr int kTokens = TokenFragment::kTokens, kChannels = TokenFragment::kChannels;

 protected:
  using Element = uint16_t;
  // Of a rank-r tensor: words n are channel 8·n + g, tokens 2·q and 2·q + 8, each with the next.
  using Pairs = uint32_t[kTiles][2];

  LKA_DEVICE AdapterNarrowBackwardBlock(const AdapterParams& params, char* shared)
      : p(params), shared_(shared) {
    const unsigned warp = threadIdx.x / 32, channel_warps = p.channel_warps;
    lane_ = threadIdx.x % 32;
    g_ = lane_ / 4;
    q_ = lane_ % 4;
    token_warp_ = int(warp / channel_warps);
    channel_warp_ = int(warp % channel_warps);
  }

  struct Token {
    uint32_t image, token;
  };
  // A tile of the sequence from token `first` on, and what of it a lane has: tokens g and g + 8,
  // and the first of each pair.
  struct Tile {
    int first;
    Token rows[2], pairs[2];
  };

  LKA_DEVICE Token later(Token t, int tokens) const {
    t.token += tokens;
    if (t.token >= uint32_t(p.tokens)) {
      t.token -= p.tokens;
      ++t.image;
    }
    return t;
  }

  // The first tile of this warp's run; tokens from end_ on are not of the run.
  LKA_DEVICE Tile first_tile(int group) {
    const int tokens = p.batch * p.tokens, run = p.tiles_of_group * kTokens;
    Tile tile;
    tile.first = (group * p.token_warps + token_warp_) * run;
    end_ = tile.first + run < tokens ? tile.first + run : tokens;
    const unsigned first = tile.first, size = p.tokens;
    const Token token = {first / size, first % size};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.rows[half] = later(token, g_ + 8 * half);
      tile.pairs[half] = later(token, token_of_pair(half));
    }
    return tile;
  }

  LKA_DEVICE Tile next_tile(Tile tile) const {
    tile.first += kTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.rows[half] = later(tile.rows[half], kTokens);
      tile.pairs[half] = later(tile.pairs[half], kTokens);
    }
    return tile;
  }

  LKA_DEVICE bool exists(const Tile& tile, int i) const { return tile.first + i < end_; }

  // Channels from `channel` on.
  static LKA_DEVICE Element* row_of(const TokenTensor& tensor, const Token& t, int channel) {
    const uint32_t at = t.image * uint32_t(tensor.stride_b) + t.token * uint32_t(tensor.stride_t);
    return static_cast<Element*>(tensor.data) + (at + uint32_t(channel));
  }

  // The lane's channels, `channel` and seven more; of unit i 32·i further on. Zero beyond the run
  // and the channels, and for tokens of an image below `from`.
  template <int kUnits>
  LKA_DEVICE void load_rows(const TokenTensor& tensor, const Tile& tile, int from, int channel,
                            TokenFragment (&to)[kUnits]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Token& t = tile.rows[half];
      const bool loads = exists(tile, g_ + 8 * half) && t.token >= uint32_t(from);
      const Element* row = row_of(tensor, t, channel);
#pragma unroll
      for (int i = 0; i < kUnits; ++i)
        (half == 0 ? to[i].low : to[i].high) = load_vector_if(
            loads && (i == 0 || channel + i * kChannels < p.channels), row + i * kChannels);
    }
  }

  LKA_DEVICE uint32_t place_of(const Token& t, int rank) const {
    return t.image * uint32_t(p.rank * p.tokens) + uint32_t(rank * p.tokens) + t.token;
  }

  // Calls f(n, half) for the words of Pairs.
  template <class F>
  static LKA_DEVICE void for_each_pair(F f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(n, half);
  }
  LKA_DEVICE int rank_of_pair(int n) const { return 8 * n + g_; }
  LKA_DEVICE int token_of_pair(int half) const { return 2 * q_ + 8 * half; }

  LKA_DEVICE void load_pairs(const void* tensor, const Tile& tile, Pairs& pairs) const {
    const auto* data = static_cast<const Element*>(tensor);
    for_each_pair([&](int n, int half) {
      const int rank = rank_of_pair(n), i = token_of_pair(half);
      const Element* low = data + place_of(tile.pairs[half], rank);
      const bool loads = rank < p.rank && exists(tile, i);
      if (p.rank_vector > 1) {  // both are of one image
        pairs[n][half] = loads ? load_global(reinterpret_cast<const uint32_t*>(low)) : 0;
      } else {
        const Element* high = data + place_of(later(tile.pairs[half], 1), rank);
        pairs[n][half] = pack(loads ? load_global(low) : Element(),
                              loads && exists(tile, i + 1) ? load_global(high) : Element());
      }
    });
  }

  LKA_DEVICE void store_pair(void* tensor, const Tile& tile, int n, int half, uint32_t pair) const {
    auto* data = static_cast<Element*>(tensor);
    const int rank = rank_of_pair(n), i = token_of_pair(half);
    if (rank >= p.rank || !exists(tile, i)) return;
    Element* low = data + place_of(tile.pairs[half], rank);
    if (p.rank_vector > 1) return store_global(reinterpret_cast<uint32_t*>(low), pair);
    store_global(low, Element(pair));
    if (exists(tile, i + 1))
      store_global(data + place_of(later(tile.pairs[half], 1), rank), Element(pair >> 16));
  }

  static LKA_DEVICE float widen_low(uint32_t pair) { return widen<Storage>(uint16_t(pair)); }
  static LKA_DEVICE float widen_high(uint32_t pair) { return widen<Storage>(uint16_t(pair >> 16)); }

  // Rows of half h of a fragment, 16 channels, with tokens as terms: row g is its channel
  // channel_of_column(g, 2·h), row g + 8 channel_of_column(g, 2·h + 1).
  static LKA_DEVICE void turn(const TokenFragment& rows, int h, uint32_t (&a)[4]) {
    a[0] = transpose_matrix(rows.low.words[2 * h]);
    a[1] = transpose_matrix(rows.low.words[2 * h + 1]);
    a[2] = transpose_matrix(rows.high.words[2 * h]);
    a[3] = transpose_matrix(rows.high.words[2 * h + 1]);
  }
  // Sums of turned rows · pairs: sum i of half h and of ranks n is of these.
  LKA_DEVICE int channel_of_sum(int h, int i) const { return channel_of_column(g_, 2 * h + i / 2); }
  LKA_DEVICE int rank_of_sum(int n, int i) const { return 8 * n + 2 * q_ + i % 2; }

  // Adds up what rows of warps have, in their order, for the first of them, which returns true.
  // for_each(f) calls f(i, sum) for the kSums sums of a lane. All threads of the block call this;
  // `memory` is free after the barrier.
  template <int kSums, class ForEach>
  LKA_DEVICE bool join_token_warps(ForEach for_each, float* memory) const {
    if (p.token_warps == 1) return true;
    const int step = 32 * p.channel_warps;
    float* parts = memory + channel_warp_ * 32 + lane_;
    __syncthreads();
    if (token_warp_ > 0)
      for_each([&](int i, float& sum) {
        store_shared(parts + ((token_warp_ - 1) * kSums + i) * step, sum);
      });
    __syncthreads();
    if (token_warp_ > 0) return false;
#pragma unroll 1
    for (int part = 0; part < p.token_warps - 1; ++part)
      for_each([&](int i, float& sum) { sum += load_shared(parts + (part * kSums + i) * step); });
    return true;
  }

  const AdapterParams& p;
  char* shared_;
  int lane_, g_, q_;
  int channel_warp_, token_warp_;
  int end_ = 0;  // of the tokens of this warp
};

// grad_c, and partial sums of the gradients of the up-projection. A warp has kUnits · 32 channels,
// and a block all of them: what its warps have of grad_c meets in shared memory, one barrier a
// tile, where one warp after the other finishes a tile while the others begin the next.
template <class Storage, int kUnits, int kTiles>
class AdapterNarrowUpBackwardBlock : AdapterNarrowBackwardBlock<Storage, kTiles> {
  using Base = AdapterNarrowBackwardBlock<Storage, kTiles>;
  using Base::p;
  using typename Base::Element;
  using typename Base::Pairs;
  using typename Base::Tile;

 public:
  using Base::kChannels;
  // Sums of a lane, of the weight's gradient and of the bias's.
  static constexpr int kWeightSums = kUnits * 2 * kTiles * 4, kSums = kWeightSums + 4;

  LKA_DEVICE AdapterNarrowUpBackwardBlock(const AdapterParams& params, char* shared)
      : Base(params, shared) {
    activates_ = p.behind != Activation::none || p.dropout.seed != nullptr;
    channel_ = this->channel_warp_ * kUnits * kChannels;
  }

  LKA_DEVICE void run() {
    const int run = p.tiles_of_group * Base::kTokens;
    // Of the first row of warps, which has the most tiles: all meet at its barriers.
    const int left = p.batch * p.tokens - int(blockIdx.x) * p.token_warps * run;
    const int tiles = ((left < run ? left : run) + Base::kTokens - 1) / Base::kTokens;
    Loaded even, odd;
    load(this->first_tile(blockIdx.x), even);
    if (p.grad_c != nullptr) stage_weight();
    __syncthreads();
    for (int i = 0; i < tiles; i += 2) {
      run_tile<0>(even, kAhead ? odd : even);
      if (i + 1 < tiles) run_tile<1>(kAhead ? odd : even, even);
    }
    if (p.up_partials != nullptr) store_partials();
  }

 private:
  // Registers for two tiles; else a fragment is loaded where the last one was, when that is used.
  static constexpr bool kAhead = kUnits <= 2;

  struct Loaded {
    Tile tile;
    TokenFragment rows[kUnits];
    Pairs c;
  };

  LKA_DEVICE void load(const Tile& tile, Loaded& to) const {
    to.tile = tile;
    // In this mode prefix tokens have no gradient here.
    const int from = p.prefix_mode == PrefixMode::zero ? p.prefix : 0;
    this->load_rows(p.grad_output, tile, from, channel_ + 8 * this->q_, to.rows);
    if (p.up_partials != nullptr || activates_) this->load_pairs(p.c, tile, to.c);
  }

  template <int kBuffer>
  LKA_DEVICE void run_tile(Loaded& now, Loaded& next) {
    const bool finishes = this->channel_warp_ == finisher_;
    const Tile tile = now.tile, following = this->next_tile(tile);
    if (p.grad_c != nullptr) multiply_channels(now, kBuffer);
    if constexpr (kAhead) load(following, next);
    if (activates_) activate_c(tile, now.c, kBuffer);
    __syncthreads();
    if (p.up_partials != nullptr) multiply_tokens(now, kBuffer);
    if constexpr (!kAhead) load(following, next);
    if (p.grad_c != nullptr && finishes) store_grad_c(tile, kBuffer);
    finisher_ = finisher_ + 1 == p.channel_warps ? 0 : finisher_ + 1;
  }

  // What a lane has of the weight in product s of two of a unit: ranks as rows, channels as terms.
  LKA_DEVICE Vector16* weight(int unit, int s) const {
    return reinterpret_cast<Vector16*>(this->shared_ + p.at_weight) + (unit * 2 + s) * 32 +
           this->lane_;
  }

  // Words of two ranks of a channel are turned into words of two channels of a rank.
  LKA_DEVICE void stage_weight() const {
    const int units = p.channels / kChannels;
#pragma unroll 2  // loads under way together
    for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
      uint32_t words[4][2] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int channel = unit * kChannels + channel_of_column(this->g_, j);
          const int rank = 8 * n + 2 * this->q_;
          const auto* from = static_cast<const Element*>(p.up_weight) + channel * p.rank + rank;
          if (rank < p.rank) words[j][n] = load_global(reinterpret_cast<const uint32_t*>(from));
        }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) words[j][n] = transpose_matrix(words[j][n]);
#pragma unroll
      for (int s = 0; s < 2; ++s)
        store_shared(weight(unit, s), Vector16{{words[2 * s][0], words[2 * s][1],
                                                words[2 * s + 1][0], words[2 * s + 1][1]}});
    }
  }

  struct alignas(16) Sums {
    float of[2][2];  // of both pairs of tokens
  };
  struct alignas(8) Factors {
    float low, high;
  };

  // A lane's place for what it has of ranks n of a tile, of one of the block's warps.
  LKA_DEVICE Sums* parts(int buffer, int channel_warp, int n) const {
    const int warp = (buffer * p.token_warps + this->token_warp_) * p.channel_warps + channel_warp;
    return reinterpret_cast<Sums*>(this->shared_ + p.at_stages) + (warp * kTiles + n) * 32 +
           this->lane_;
  }
  // And for what every warp of a row reads: e as Pairs, and what grad_c is multiplied by.
  LKA_DEVICE int pair_of_row(int buffer, int n, int half) const {
    return (((buffer * p.token_warps + this->token_warp_) * kTiles + n) * 2 + half) * 32 +
           this->lane_;
  }
  LKA_DEVICE uint32_t* e(int buffer, int n, int half) const {
    return reinterpret_cast<uint32_t*>(this->shared_ + p.at_rank) + pair_of_row(buffer, n, half);
  }
  LKA_DEVICE Factors* factors(int buffer, int n, int half) const {
    return reinterpret_cast<Factors*>(this->shared_ + p.at_added) + pair_of_row(buffer, n, half);
  }

  // This warp's part of grad_c.
  LKA_DEVICE void multiply_channels(const Loaded& now, int buffer) const {
    float sums[2][4] = {};  // of tokens g and g + 8 as columns
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      if (unit > 0 && channel_ + unit * kChannels >= p.channels) continue;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const Vector16 ranks = load_shared(weight(channel_ / kChannels + unit, s));
        const uint32_t a[4] = {ranks.words[0], ranks.words[1], ranks.words[2], ranks.words[3]};
        uint32_t b[2];
        as_terms(now.rows[unit].low, s, b);
        mma_16x8x16<Storage>(sums[0], a, b);
        as_terms(now.rows[unit].high, s, b);
        mma_16x8x16<Storage>(sums[1], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      store_shared(
          parts(buffer, this->channel_warp_, n),
          Sums{{{sums[0][2 * n], sums[0][2 * n + 1]}, {sums[1][2 * n], sums[1][2 * n + 1]}}});
  }

  // e = dropout(act(c)), and what grad_c is multiplied by, before the barrier: of one word of Pairs
  // by the warp that finishes the tile, of the next by the next.
  LKA_DEVICE void activate_c(const Tile& tile, const Pairs& c, int buffer) const {
    int turn = this->channel_warp_ - finisher_;
    if (turn < 0) turn += p.channel_warps;
#pragma unroll 1  // so that activations and the random stream are in the code twice only
    for (int i = turn; i < 2 * kTiles; i += p.channel_warps) {
      const int n = i / 2, half = i % 2;
      uint32_t pair = 0;  // by masks: an index would put the words in local memory
      Base::for_each_pair([&](int m, int h) { pair |= c[m][h] & -uint32_t(2 * m + h == i); });
      const float value[2] = {Base::widen_low(pair), Base::widen_high(pair)};
      float activated[2], factor[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t token = tile.first + this->token_of_pair(half) + k;
        factor[k] = DropoutStream::factor(p.dropout, token * p.rank + this->rank_of_pair(n));
        activated[k] = activate(p.behind, value[k]) * factor[k];
        factor[k] *= slope(p.behind, value[k]) * p.scale;
      }
      store_shared(e(buffer, n, half), narrow_pair<Storage>(activated[0], activated[1]));
      store_shared(factors(buffer, n, half), Factors{factor[0], factor[1]});
    }
  }

  // Gradients += grad_output · e, and · ones for the bias.
  LKA_DEVICE void multiply_tokens(const Loaded& now, int buffer) {
    Pairs terms;
    Base::for_each_pair([&](int n, int half) {
      terms[n][half] = activates_ ? load_shared(e(buffer, n, half)) : now.c[n][half];
    });
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t rows[4];
        Base::turn(now.rows[unit], h, rows);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          mma_16x8x16<Storage>(weight_sums_[unit][h][n], rows, terms[n]);
        // A column for each half of a unit, so that all have the sums of a single product:
        // separate ones do not fit the registers. The price is 0 · infinity = NaN where
        // grad_output is not finite: in row g of the other halves too.
        const uint32_t one = this->g_ == 2 * unit + h ? narrow_pair<Storage>(1.0f, 1.0f) : 0;
        const uint32_t ones[2] = {one, one};
        mma_16x8x16<Storage>(bias_sums_, rows, ones);
      }
  }

  LKA_DEVICE void store_grad_c(const Tile& tile, int buffer) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Sums sums = load_shared(parts(buffer, 0, n));
#pragma unroll 4  // loads under way together
      for (int warp = 1; warp < p.channel_warps; ++warp) {
        const Sums part = load_shared(parts(buffer, warp, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.of[i / 2][i % 2] += part.of[i / 2][i % 2];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Factors by = {p.scale, p.scale};
        if (activates_) by = load_shared(factors(buffer, n, half));
        this->store_pair(
            p.grad_c, tile, n, half,
            narrow_pair<Storage>(sums.of[half][0] * by.low, sums.of[half][1] * by.high));
      }
    }
  }

  LKA_DEVICE void store_partials() {
    const auto for_each = [&](auto f) {
      for_each_sum([&](int i, float& sum, int, int, int, int) { f(i, sum); });
#pragma unroll
      for (int i = 0; i < 4; ++i) f(kWeightSums + i, bias_sums_[i]);
    };
    auto* memory = reinterpret_cast<float*>(this->shared_ + p.at_stages);
    if (!this->template join_token_warps<kSums>(for_each, memory)) return;
    const auto to = [&](int unit, int h, int i) {
      const int channel = channel_ + unit * kChannels + this->channel_of_sum(h, i);
      return p.up_partials + (int64_t(blockIdx.x) * p.channels + channel) * (p.rank + 1);
    };
    for_each_sum([&](int, float& sum, int unit, int h, int n, int i) {
      const int rank = this->rank_of_sum(n, i);
      if (rank < p.rank && channel_ + unit * kChannels < p.channels)
        store_global(to(unit, h, i) + rank, sum * p.scale);
    });
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // column 2·unit + h is with the lanes of q = unit
        if (this->q_ == unit && channel_ + unit * kChannels < p.channels)
          store_global(to(unit, i % 2, i) + p.rank, bias_sums_[i] * p.scale);
  }

  template <class F>
  LKA_DEVICE void for_each_sum(F f) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            f(((unit * 2 + h) * kTiles + n) * 4 + i, weight_sums_[unit][h][n][i], unit, h, n, i);
  }

  bool activates_;
  int channel_;       // the first of this warp
  int finisher_ = 0;  // the warp of a row that finishes grad_c of the tile at hand
  float weight_sums_[kUnits][2][kTiles][4] = {}, bias_sums_[4] = {};
};

// grad_x, and partial sums of the gradients of the down-projection. A warp has 32 channels and
// needs no other: blocks have parts of the channels where all are too many.
template <class Storage, int kTiles>
class AdapterNarrowDownBackwardBlock : AdapterNarrowBackwardBlock<Storage, kTiles> {
  using Base = AdapterNarrowBackwardBlock<Storage, kTiles>;
  using Base::p;
  using typename Base::Element;
  using typename Base::Pairs;
  using typename Base::Tile;

 public:
  using Base::kChannels;
  static constexpr int kWeightSums = 2 * kTiles * 4, kSums = kWeightSums + 4 * kTiles;

  LKA_DEVICE AdapterNarrowDownBackwardBlock(const AdapterParams& params, char* shared)
      : Base(params, shared) {
    const unsigned splits = p.splits;
    group_ = int(blockIdx.x / splits);
    channel_ = (int(blockIdx.x % splits) * p.channel_warps + this->channel_warp_) * kChannels;
    lane_channel_ = channel_ + 8 * this->q_;
  }

  LKA_DEVICE void run() {
    Tile tile = this->first_tile(group_);
    if (channel_ < p.channels) {  // all lanes of a warp
      load_weight();
      Pairs grad_z;
      TokenFragment x[1], residual[1] = {};
      this->load_pairs(p.grad_z, tile, grad_z);
      load(p.residual, tile, residual);
      if (p.down_partials != nullptr) load(p.x, tile, x);
      // What is used up makes room for the next tile.
      while (tile.first < this->end_) {
        if (p.grad_x.data != nullptr) store_grad_x(tile, grad_z, residual[0]);
        tile = this->next_tile(tile);
        Pairs next;
        this->load_pairs(p.grad_z, tile, next);
        load(p.residual, tile, residual);
        if (p.down_partials != nullptr) {
          multiply_tokens(grad_z, x[0]);
          load(p.x, tile, x);
        }
        Base::for_each_pair([&](int n, int half) { grad_z[n][half] = next[n][half]; });
      }
    }
    if (p.down_partials != nullptr) store_partials();
  }

 private:
  // Ranks as terms, column g of product j being channel_of_column(g, j).
  LKA_DEVICE void load_weight() {
    const auto* from = static_cast<const Element*>(p.down_weight) + lane_channel_;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int rank = 8 * n + this->g_;
      const Vector16 row = load_vector_if(rank < p.rank, from + int64_t(rank) * p.channels);
#pragma unroll
      for (int j = 0; j < 4; ++j) weight_[j][n] = transpose_matrix(row.words[j]);
    }
  }

  LKA_DEVICE void load(const TokenTensor& tensor, const Tile& tile, TokenFragment (&to)[1]) const {
    if (tensor.data != nullptr) this->load_rows(tensor, tile, 0, lane_channel_, to);
  }

  // grad_z · weight + residual, tokens as rows and channels as columns.
  LKA_DEVICE void store_grad_x(const Tile& tile, const Pairs& grad_z,
                               const TokenFragment& added) const {
    uint32_t left[2 * kTiles];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) left[i] = transpose_matrix(grad_z[i / 2][i % 2]);
    TokenFragment result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sums[4] = {Base::widen_low(added.low.words[j]), Base::widen_high(added.low.words[j]),
                       Base::widen_low(added.high.words[j]), Base::widen_high(added.high.words[j])};
      if constexpr (kTiles == 1)
        mma_16x8x8<Storage>(sums, left, weight_[j][0]);
      else
        mma_16x8x16<Storage>(sums, left, weight_[j]);
      result.low.words[j] = narrow_pair<Storage>(sums[0], sums[1]);
      result.high.words[j] = narrow_pair<Storage>(sums[2], sums[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* to =
          reinterpret_cast<Vector16*>(Base::row_of(p.grad_x, tile.rows[half], lane_channel_));
      if (this->exists(tile, this->g_ + 8 * half))
        store_global(to, half == 0 ? result.low : result.high);
    }
  }

  // Gradients += x · grad_z, and ones · grad_z for the bias.
  LKA_DEVICE void multiply_tokens(const Pairs& grad_z, const TokenFragment& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t rows[4];
      Base::turn(x, h, rows);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_16x8x16<Storage>(weight_sums_[h][n], rows, grad_z[n]);
    }
    const uint32_t one = narrow_pair<Storage>(1.0f, 1.0f);
    const uint32_t ones[4] = {one, one, one, one};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x16<Storage>(bias_sums_[n], ones, grad_z[n]);
  }

  LKA_DEVICE void store_partials() {
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        f(i, i < kWeightSums ? weight_sums_[i / (4 * kTiles)][i / 4 % kTiles][i % 4]
                             : bias_sums_[(i - kWeightSums) / 4][i % 4]);
    };
    auto* memory = reinterpret_cast<float*>(this->shared_);
    if (!this->template join_token_warps<kSums>(for_each, memory)) return;
    if (channel_ >= p.channels) return;
    const auto to = [&](int rank) {
      return p.down_partials + (int64_t(group_) * p.rank + rank) * (p.channels + 1);
    };
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int rank = this->rank_of_sum(n, i);
        if (rank >= p.rank) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          store_global(to(rank) + channel_ + this->channel_of_sum(h, i), weight_sums_[h][n][i]);
        // All rows are the same.
        if (i < 2 && channel_ == 0 && this->g_ == 0)
          store_global(to(rank) + p.channels, bias_sums_[n][i]);
      }
  }

  int group_, channel_, lane_channel_;
  uint32_t weight_[4][kTiles] = {};
  float weight_sums_[2][kTiles][4] = {}, bias_sums_[kTiles][4] = {};
};

// What launches are made of: the most warps of a block, and of all blocks that share a
// multiprocessor, which is what registers are for.
template <class Storage, int kUnitsOfWarp, int kTilesOfRank>
struct NarrowUpBackward {
  using Block = AdapterNarrowUpBackwardBlock<Storage, kUnitsOfWarp, kTilesOfRank>;
  static constexpr int kUnits = kUnitsOfWarp, kTiles = kTilesOfRank, kSums = Block::kSums;
  static constexpr int kWarps = 16, kResidentWarps = 16;
};
template <class Storage, int kTilesOfRank>
struct NarrowDownBackward {
  using Block = AdapterNarrowDownBackwardBlock<Storage, kTilesOfRank>;
  static constexpr int kTiles = kTilesOfRank, kSums = Block::kSums;
  static constexpr int kWarps = kTiles == 1 ? 12 : 8, kResidentWarps = 2 * kWarps;
};

}  // namespace lka::cuda
