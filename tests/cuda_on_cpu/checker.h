// Which memory a kernel may touch, and in what state shared memory is.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

[[noreturn]] void fail(const std::string& what);

class Checker {
 public:
  int thread = 0;

  void begin_block(const Range* ranges, int num_ranges, char* shared, size_t bytes, int threads);
  void pass_barrier() { ++epoch_; }
  void pass_warp_barrier(int warp) { ++warp_epochs_[warp]; }
  void global(const void* at, size_t bytes, bool store) const;
  void shared_load(const void* at, size_t bytes);
  void shared_store(const void* at, size_t bytes);
  void begin_copy(void* at, size_t bytes);
  void commit_copies();
  void wait_for_copies(size_t groups);

 private:
  enum State : uint8_t { unwritten, written, in_flight };
  static constexpr int kNobody = -1, kSeveral = -2;

  // Two bytes of shared memory, the smallest access.
  struct Cell {
    State state = unwritten;
    int writer = kNobody, reader = kNobody;
    int reader_warp = kNobody;
    int64_t write_epoch = -1, read_epoch = -1;            // barriers passed by then
    int64_t warp_write_epoch = -1, warp_read_epoch = -1;  // of the warp
  };
  using Copies = std::vector<std::pair<size_t, size_t>>;  // first cell, how many

  std::pair<size_t, size_t> cells(const void* at, size_t bytes, const char* access) const;
  void overwrite(Cell& cell, const char* access);
  int warp() const { return thread / 32; }
  bool sees_write(const Cell& cell) const;
  bool sees_reads(const Cell& cell) const;

  const Range* ranges_ = nullptr;
  int num_ranges_ = 0;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::vector<Cell> cells_;
  std::vector<Copies> begun_;
  std::vector<std::vector<Copies>> groups_;
  int64_t epoch_ = 0;
  std::vector<int64_t> warp_epochs_;
};

Checker& checker();

}  // namespace cuda_on_cpu
