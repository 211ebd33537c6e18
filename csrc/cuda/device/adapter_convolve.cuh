// The adapter's convolution of one tile of tokens, by multiply-adds in float32.
//
// Rows of the source, between zeros, are staged in shared memory as floats. A thread has four
// neighbouring outputs of one channel, in one row or in two that a kernel row lies between: where
// nothing is dilated, twelve floats of the source and eight taps make 32 multiply-adds for the one
// and, with the eight taps of the row before, 32 more for the other.
#pragma once

#include "adapter_block.cuh"

namespace lka::cuda {

struct alignas(16) Float4 {
  float v[4];
};

// A part of a grid, to be staged as floats with zeros where the grid ends.
struct StagedGrid {
  int64_t plane = 0;  // elements from one channel to the next
  int channels = 1;
  int width = 0;  // elements from one row to the next
  int first_y = 0, end_y = 0;
  int from_x = 0, end_x = 0;  // columns exist from 0 to end_x
  int columns = 0;            // that are staged
  int pitch = 0, to_plane = 0;
};

// Loads of eight rows are under way together, and nothing is divided in the loop. `map` changes
// eight values at a time; those that are not in the grid are zeros before, and must be after it.
template <class Storage, class Map>
LKA_DEVICE void stage_grid(const typename Stored<Storage>::Type* from, const StagedGrid& grid,
                           float* to, Map map) {
  constexpr int kBatch = 8;
  const int rows = grid.end_y - grid.first_y, all = grid.channels * rows;
  if (all <= 0) return;
  // Lanes of a row: a power of two.
  int shift = 2;
  while (shift < 5 && (1 << shift) < grid.columns) ++shift;
  const int step = blockDim.x >> shift, step_channels = step / rows,
            step_rows = step - step_channels * rows;
  // From a row to the thread's next, and what the first row of the next channel adds to that.
  const int64_t from_step = step_channels * grid.plane + step_rows * grid.width;
  const int64_t from_wrap = grid.plane - rows * grid.width;
  const int to_step = step_channels * grid.to_plane + step_rows * grid.pitch;
  const int to_wrap = grid.to_plane - rows * grid.pitch;
  const int first = threadIdx.x >> shift, channel = first / rows,
            first_row = first - channel * rows;
  for (int column = threadIdx.x & ((1 << shift) - 1); column < grid.columns; column += 1 << shift) {
    const int x = grid.from_x + column;
    const bool exists = x >= 0 && x < grid.end_x;
    const auto* source =
        from + channel * grid.plane + int64_t(grid.first_y + first_row) * grid.width + x;
    float* target = to + channel * grid.to_plane + first_row * grid.pitch + column;
    int row = first_row;
    for (int i = first; i < all; i += kBatch * step) {
      typename Stored<Storage>::Type loaded[kBatch] = {};
      float* targets[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (exists && i + b * step < all) loaded[b] = load_global(source);
        targets[b] = target;
        source += from_step;
        target += to_step;
        row += step_rows;
        if (row >= rows) {
          row -= rows;
          source += from_wrap;
          target += to_wrap;
        }
      }
      float values[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) values[b] = Stored<Storage>::value(loaded[b]);
      map(values);
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b * step < all) store_shared(targets[b], values[b]);
    }
  }
}

struct KeepValues {
  template <int kCount>
  LKA_DEVICE void operator()(float (&)[kCount]) const {}
};

// From a multiple of 16 bytes.
template <int kCount>
LKA_DEVICE void load_row(float (&values)[kCount], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Float4 four = load_shared(reinterpret_cast<const Float4*>(from + i));
#pragma unroll
    for (int j = 0; j < 4; ++j) values[i + j] = four.v[j];
  }
}

template <class Storage>
class TileConvolution {
  using Element = typename Stored<Storage>::Type;

 public:
  // `source` is (B, r, T); `shared` is that of the block.
  LKA_DEVICE TileConvolution(const AdapterParams& params, const void* from, char* shared)
      : p(params),
        k(params.convolution),
        source_(static_cast<const Element*>(from)),
        staged_(reinterpret_cast<float*>(shared + params.at_source)),
        taps_(reinterpret_cast<float*>(shared + params.at_taps)) {}

  // Calls emit(channel, token of the tile, sum) for `channels` channels from `first` on.
  template <class Emit>
  LKA_DEVICE void run(const TokenTile& tile, int first, int channels, Emit emit) {
    run_prefix(tile, first, channels, emit);
    struct Nothing {};
    run_grid(
        tile, first, channels, [](int, int, int) { return Nothing(); },
        [&](int channel, int token, int count, const float (&sums)[4], Nothing) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (j < count) emit(channel, token + j, sums[j]);
        });
  }

  // Of the grid alone: calls emit(channel, token of the tile, count, sums, ahead) for up to four
  // tokens that follow one another, where `ahead` is what ahead(channel, token, count) returned
  // before their sums began.
  template <class Ahead, class Emit>
  LKA_DEVICE void run_grid(const TokenTile& tile, int first, int channels, Ahead ahead, Emit emit) {
    if (tile.rows == 0) return;
    const int quads = (tile.columns + 3) / 4;
    // Two rows load less, one keeps more threads busy.
    if (least(k.staged_channels, channels) * tile.rows * quads > int(blockDim.x))
      run_rows<2>(tile, first, channels, ahead, emit);
    else
      run_rows<1>(tile, first, channels, ahead, emit);
  }

  // Prefix tokens alone: they meet one tap, or none, and in the other modes pass.
  template <class Emit>
  LKA_DEVICE void run_prefix(const TokenTile& tile, int first, int channels, Emit emit) const {
    for (int i = threadIdx.x; i < channels * tile.prefix; i += blockDim.x) {
      const int channel = first + i / tile.prefix, token = i % tile.prefix;
      const Element own = load_global(plane(tile, channel) + tile.t0 + token);
      float value = Stored<Storage>::value(own);
      if (p.prefix_mode == PrefixMode::center_tap)
        value *= p.center < 0 ? 0.0f : tap(channel * k.weight_stride_c + p.center);
      emit(channel, token, value);
    }
  }

 private:
  // The rows of a thread are dilation_h apart, so that what one tap meets the tap before does too.
  template <int kRows, class Ahead, class Emit>
  LKA_DEVICE void run_rows(const TokenTile& tile, int first, int channels, Ahead ahead, Emit emit) {
    const int quads = (tile.columns + 3) / 4;
    const int apart = kRows == 1 ? 1 : k.dilation_h;
    const int groups = (tile.rows + kRows * apart - 1) / (kRows * apart) * apart;
    const bool whole = k.staged_taps >= k.kernel_h;
    for (int done = 0; done < channels; done += k.staged_channels) {
      const int live = least(k.staged_channels, channels - done);
      const int units = live * groups * quads;
      for (int unit0 = 0; unit0 < units; unit0 += blockDim.x) {
        const int unit = unit0 + threadIdx.x;
        const int line = unit / quads, x = (unit - line * quads) * 4;
        const int channel = line / groups, group = line - channel * groups;
        const int row = kRows == 1 ? group : group + (apart == 1 ? group : group / apart * apart);
        const int count = unit < units ? least(4, tile.columns - x) : 0;
        const auto token = [&](int r) {
          return tile.prefix + (row + r * apart) * tile.columns + x;
        };
        const auto count_of = [&](int r) { return row + r * apart < tile.rows ? count : 0; };
        decltype(ahead(0, 0, 0)) before[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          before[r] = ahead(first + done + channel, token(r), count_of(r));
        float sums[kRows][4] = {};
        for (int ky = 0; ky < k.kernel_h; ky += k.staged_taps) {
          if (unit0 == 0 || !whole) {
            __syncthreads();
            stage(tile, first + done, live, ky);
            __syncthreads();
          }
          if (count > 0) accumulate(sums, tile, channel, row, x, ky);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          emit(first + done + channel, token(r), count_of(r), sums[r], before[r]);
      }
    }
  }

  LKA_DEVICE const Element* plane(const TokenTile& tile, int channel) const {
    return source_ + (tile.image * p.rank + channel) * p.tokens;
  }

  LKA_DEVICE float tap(int64_t at) const {
    return Stored<Storage>::value(load_global(static_cast<const Element*>(p.conv_weight) + at));
  }

  // Rows of the source that kernel rows ky to ky + taps need, of those on the grid.
  LKA_DEVICE int first_row(const TokenTile& tile, int ky) const {
    const int y = tile.y0 - k.top + ky * k.dilation_h;
    return y < 0 ? 0 : y;
  }
  LKA_DEVICE int end_row(const TokenTile& tile, int ky, int taps) const {
    return least(p.height, tile.y0 + tile.rows - k.top + (ky + taps - 1) * k.dilation_h);
  }

  LKA_DEVICE void stage(const TokenTile& tile, int channel0, int channels, int ky) const {
    const int taps = least(k.staged_taps, k.kernel_h - ky);
    StagedGrid grid;
    grid.plane = p.tokens;
    grid.channels = channels;
    grid.width = grid.end_x = p.width;
    grid.first_y = first_row(tile, ky);
    grid.end_y = end_row(tile, ky, taps);
    grid.from_x = tile.x0 - k.left;
    grid.columns = k.dilation_w == 1 ? (tile.columns + 3) / 4 * 4 + k.taps_pitch : k.pitch;
    grid.pitch = k.pitch;
    grid.to_plane = k.staged_rows * k.pitch;
    stage_grid<Storage>(plane(tile, channel0) + p.prefix, grid, staged_, KeepValues());
    stage_taps(channel0, channels, ky, taps);
  }

  // Kernel rows ky to ky + count, between rows and columns of zeros: a thread has one column of
  // some rows.
  LKA_DEVICE void stage_taps(int channel0, int channels, int ky, int count) const {
    constexpr int kBatch = 4;
    const int rows = count + 2, all = channels * rows;
    int shift = 2;
    while (shift < 5 && (1 << shift) < k.taps_pitch) ++shift;
    const int step = blockDim.x >> shift, step_channels = step / rows,
              step_rows = step - step_channels * rows;
    const auto* weight = static_cast<const Element*>(p.conv_weight) + channel0 * k.weight_stride_c +
                         k.first_tap + (ky - 1) * k.tap_stride_y;
    for (int kx = threadIdx.x & ((1 << shift) - 1); kx < k.taps_pitch; kx += 1 << shift) {
      int i = threadIdx.x >> shift, channel = i / rows, row = i - channel * rows;
      while (i < all) {
        Element values[kBatch] = {};
        int places[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          places[b] = i < all ? (channel * (k.staged_taps + 2) + row) * k.taps_pitch + kx : -1;
          if (i < all && kx < k.kernel_w && row > 0 && row <= count)
            values[b] = load_global(weight + channel * k.weight_stride_c + row * k.tap_stride_y +
                                    kx * k.tap_stride_x);
          i += step;
          channel += step_channels;
          row += step_rows;
          if (row >= rows) {
            row -= rows;
            ++channel;
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (places[b] >= 0) store_shared(taps_ + places[b], Stored<Storage>::value(values[b]));
      }
    }
  }

  // Adds what the staged kernel rows make of the rows of the source that exist, one after another:
  // tap row `step` meets it for the first row of outputs, the one before for the second.
  template <int kRows>
  LKA_DEVICE void accumulate(float (&sums)[kRows][4], const TokenTile& tile, int channel, int row,
                             int x, int ky) const {
    const int taps = least(k.staged_taps, k.kernel_h - ky);
    const int y = tile.y0 + row - k.top + ky * k.dilation_h;
    const auto steps_of = [&](int rows) {
      return k.dilation_h == 1 ? rows : (rows + k.dilation_h - 1) / k.dilation_h;
    };
    const int begin = y < 0 ? steps_of(-y) : 0;
    const int steps = least(taps + kRows - 1, steps_of(end_row(tile, ky, taps) - y)) - begin;
    const float* values =
        staged_ + x +
        (channel * k.staged_rows + y + begin * k.dilation_h - first_row(tile, ky)) * k.pitch;
    const float* tap_row = taps_ + (channel * (k.staged_taps + 2) + begin + 1) * k.taps_pitch;
    if (k.dilation_w != 1) {
      for (int step = 0; step < steps; ++step) {
        for (int kx = 0; kx < k.kernel_w; ++kx) {
          float window[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) window[j] = load_shared(values + kx * k.dilation_w + j);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float t = load_shared(tap_row + kx - r * k.taps_pitch);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[r][j] += t * window[j];
          }
        }
        values += k.dilation_h * k.pitch;
        tap_row += k.taps_pitch;
      }
      return;
    }
    for (int kx = 0; kx < k.taps_pitch; kx += 8) {
      if (k.taps_pitch - kx >= 8)
        add_columns<8>(sums, values + kx, tap_row + kx, steps);
      else
        add_columns<4>(sums, values + kx, tap_row + kx, steps);
    }
  }

  // The same for kTaps columns of taps that are not dilated.
  template <int kTaps, int kRows>
  LKA_DEVICE void add_columns(float (&sums)[kRows][4], const float* values, const float* tap_row,
                              int steps) const {
    float before[kTaps];
    if (kRows == 2) load_row(before, tap_row - k.taps_pitch);
    const int pitch = k.dilation_h * k.pitch;
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      float window[kTaps + 4], taps[kTaps];
      load_row(window, values);
      load_row(taps, tap_row);
#pragma unroll
      for (int i = 0; i < kTaps; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[0][j] += taps[i] * window[i + j];
          if (kRows == 2) sums[kRows - 1][j] += before[i] * window[i + j];
        }
#pragma unroll
      for (int i = 0; i < kTaps; ++i) before[i] = taps[i];
      values += pitch;
      tap_row += k.taps_pitch;
    }
  }

  const AdapterParams& p;
  const AdapterConvolution& k;
  const Element* source_;
  float *staged_, *taps_;
};

}  // namespace lka::cuda
