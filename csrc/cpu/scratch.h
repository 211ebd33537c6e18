// Memory that outlives a call, so that a kernel does not fault in fresh pages each time.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace lka::cpu {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `bytes`, 64-byte aligned, contents undefined; valid until the next call.
  void* get(size_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, capacity_);
      if (data_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

// Per thread: one for the tasks a thread runs, one for what a call shares among its tasks, and one
// for an operator that calls another.
inline Scratch& task_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& outer_call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace lka::cpu
