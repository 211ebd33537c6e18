// Loading memory ahead of its use, some lines at every step of other work. All at once would stall
// the processor for as long as the loads themselves: it holds few misses at a time, and can then
// compute nothing meanwhile. Into the first cache, although the rows at hand fill it: asked for
// only as near as the second, lines seem to be dropped where many are under way (on a Zen 5 dW in
// place took up to a quarter longer, from memory and in caches).
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

// rows × columns runs of bytes; steps are bytes too.
struct Region {
  const void* at;
  int64_t run;
  int64_t columns, column_step;
  int64_t rows, row_step;

  int64_t lines() const { return (run + 63) / 64 * columns * rows; }
  // Runs that follow each other are one run.
  Region joined() const {
    Region r = *this;
    if (r.run == r.column_step) r.run *= r.columns, r.column_step = r.run, r.columns = 1;
    if (r.columns == 1 && r.run == r.row_step) r.run *= r.rows, r.rows = r.rows > 0;
    return r;
  }
};

class Prefetcher {
 public:
  // Cover a region in `steps` steps.
  void begin(const Region& apart, int64_t steps, bool for_writing = false) {
    const Region region = apart.joined();
    begin_at_rate(region, (region.lines() + steps - 1) / steps, for_writing);
  }
  // So many lines a step: the division, made once for many regions of a size.
  void begin_at_rate(const Region& region, int64_t lines_per_step, bool for_writing = false) {
    region_ = region;
    for_writing_ = for_writing;
    per_step_ = lines_per_step;
    row_ = at_ = static_cast<const char*>(region.at);
    offset_ = column_ = 0;
    left_ = region.run > 0 && region.columns > 0 ? region.rows : 0;
  }

  void step() {
    for (int64_t line = 0; line < per_step_ && left_ > 0; ++line) {
      if (for_writing_)
        __builtin_prefetch(at_ + offset_, 1);
      else
        __builtin_prefetch(at_ + offset_, 0);
      offset_ += 64;
      if (offset_ < region_.run) continue;
      offset_ = 0;
      next_run();
    }
  }

  // The same by runs, for reading: for kernels that read where elements stand, and for whole
  // planes. Where steps are inlined into a loop of few instructions, line by line is faster.
  void step_runs() {
    for (int64_t lines = per_step_; lines > 0 && left_ > 0;) {
      const char* const from = at_ + offset_;
      const int64_t of_run = (region_.run - offset_ + 63) / 64;
      const int64_t now = lines < of_run ? lines : of_run;
      for (int64_t line = 0; line < now; ++line) __builtin_prefetch(from + 64 * line);
      lines -= now;
      offset_ += 64 * now;
      if (now < of_run) return;
      offset_ = 0;
      next_run();
    }
  }

 private:
  void next_run() {
    at_ += region_.column_step;
    if (++column_ < region_.columns) return;
    column_ = 0;
    at_ = row_ += region_.row_step;
    --left_;
  }

  Region region_{};
  int64_t per_step_ = 0, offset_ = 0, column_ = 0, left_ = 0;
  const char *row_ = nullptr, *at_ = nullptr;
  bool for_writing_ = false;
};

// Two regions that the work after this needs.
struct Ahead {
  Prefetcher first, second;

  void step() {
    first.step();
    second.step();
  }
  void step_runs() {
    first.step_runs();
    second.step_runs();
  }
};

// Vectors of V elements that a line of memory holds, where they are shorter.
template <int V, class S>
constexpr int kVectorsPerLine = V * sizeof(S) < 64 ? 64 / int(V * sizeof(S)) : 1;

// Rows that come after those at hand, loaded ahead at constant distances while pixels are computed,
// the target as if to be read (asked for as what will be written it took longer). Elements meet few
// taps here, and a Prefetcher, which keeps count, would cost as much as the products. All in
// elements.
struct RowsAhead {
  int64_t channels;
  int64_t source_pixel, target_pixel;  // from one pixel that is loaded to the next
  int64_t target;                      // from the target row at hand to the next, 0: none
  int64_t source;                      // from the source row at hand to the first that is new
  int64_t rows, source_row;            // so many are new, so far apart

  // For the block of channels that begins with `channel`, its share of what from_times · kFrom
  // pixels of the source and to_times · kTo of the target, all side by side, have in these places.
  template <int V, int kFrom, int kTo, class S>
  __attribute__((always_inline)) void load(const S* from, int64_t from_times, const S* to,
                                           int64_t to_times, int64_t channel) const {
    to += target;
    for (int64_t n = 0; n < to_times; ++n, to += kTo * target_pixel)
      share<V, kTo>(to, target_pixel, channel);
    from += source;
    for (int64_t row = 0; row < rows; ++row, from += source_row) {
      const S* at = from;
      for (int64_t n = 0; n < from_times; ++n, at += kFrom * source_pixel)
        share<V, kFrom>(at, source_pixel, channel);
    }
  }

 private:
  template <int V, int kPixels, class S>
  __attribute__((always_inline)) void share(const S* at, int64_t pixel, int64_t channel) const {
    if (pixel == channels) {  // in the order of memory, which the processor follows by itself
      constexpr int kLines = (kPixels * V * sizeof(S) + 63) / 64;
      const char* const line = reinterpret_cast<const char*>(at + kPixels * channel);
#pragma GCC unroll kUnroll
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + 64 * i);
    } else {
      const S* line = at + channel;
#pragma GCC unroll kUnroll
      for (int i = 0; i < kPixels; ++i, line += pixel) {
        keep_in_register(line);  // else the compiler keeps as many multiples of the step
        __builtin_prefetch(line);
      }
    }
  }
};

}  // namespace
