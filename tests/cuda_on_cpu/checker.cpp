#include "checker.h"

#include <algorithm>
#include <cstring>

namespace cuda_on_cpu {

Checker& checker() {
  static Checker only;
  return only;
}

void Checker::begin_block(const Range* ranges, int num_ranges, char* shared, size_t bytes,
                          int threads) {
  ranges_ = ranges;
  num_ranges_ = num_ranges;
  shared_ = shared;
  shared_bytes_ = bytes;
  cells_.assign(bytes / 2, Cell());
  begun_.assign(threads, {});
  groups_.assign(threads, {});
  epoch_ = 0;
  warp_epochs_.assign(size_t(threads + 31) / 32, 0);
}

// Whether a barrier, of the block or of the warp, lies between an access and this thread's next.
bool Checker::sees_write(const Cell& cell) const {
  return cell.writer == thread || cell.write_epoch != epoch_ ||
         (cell.writer >= 0 && cell.writer / 32 == warp() &&
          cell.warp_write_epoch < warp_epochs_[warp()]);
}

bool Checker::sees_reads(const Cell& cell) const {
  return cell.reader == thread || cell.read_epoch != epoch_ ||
         (cell.reader_warp == warp() && cell.warp_read_epoch < warp_epochs_[warp()]);
}

void Checker::global(const void* at, size_t bytes, bool store) const {
  const char* what = store ? "global store" : "global load";
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes that is not aligned");
  const auto* address = static_cast<const char*>(at);
  for (int i = 0; i < num_ranges_; ++i) {
    const auto* begin = static_cast<const char*>(ranges_[i].begin);
    if (address < begin || address + bytes > begin + ranges_[i].bytes) continue;
    if (store && !ranges_[i].writable) fail("global store to " + std::string(ranges_[i].name));
    if (ranges_[i].written == nullptr) return;
    char* first = ranges_[i].written + (address - begin) / 2;
    if (store)
      std::fill_n(first, (bytes + 1) / 2, char(1));
    else if (std::count(first, first + (bytes + 1) / 2, char(0)) > 0)
      fail("global load of " + std::string(ranges_[i].name) + " that was never written");
    return;
  }
  std::string nearest;
  for (int i = 0; i < num_ranges_; ++i)
    nearest += " " + std::string(ranges_[i].name) + "[" +
               std::to_string(address - static_cast<const char*>(ranges_[i].begin)) + " of " +
               std::to_string(ranges_[i].bytes) + " bytes]";
  fail(std::string(what) + " out of range:" + nearest);
}

std::pair<size_t, size_t> Checker::cells(const void* at, size_t bytes, const char* access) const {
  const ptrdiff_t offset = static_cast<const char*>(at) - shared_;
  if (offset < 0 || size_t(offset) + bytes > shared_bytes_)
    fail(std::string(access) + " out of range: " + std::to_string(offset) + " of " +
         std::to_string(shared_bytes_) + " bytes");
  if (size_t(offset) % bytes != 0 || bytes % 2 != 0)
    fail(std::string(access) + " of " + std::to_string(bytes) + " bytes that is not aligned");
  return {size_t(offset) / 2, size_t(offset) / 2 + bytes / 2};
}

void Checker::shared_load(const void* at, size_t bytes) {
  const auto [first, end] = cells(at, bytes, "shared load");
  for (size_t i = first; i < end; ++i) {
    Cell& cell = cells_[i];
    if (cell.state == unwritten) fail("shared load of memory never written");
    if (cell.state == in_flight) fail("shared load of a copy that was not waited for");
    if (!sees_write(cell))
      fail("shared load of what another thread wrote, without a barrier between");
    const bool again = cell.read_epoch == epoch_;
    cell.reader = !again || cell.reader == thread ? thread : kSeveral;
    cell.reader_warp = !again || cell.reader_warp == warp() ? warp() : kSeveral;
    cell.read_epoch = epoch_;
    cell.warp_read_epoch = warp_epochs_[warp()];
  }
}

void Checker::overwrite(Cell& cell, const char* access) {
  if (cell.state == in_flight) fail(std::string(access) + " over a copy under way");
  if (!sees_reads(cell))
    fail(std::string(access) + " over what another thread reads, without a barrier between");
  if (cell.state == written && !sees_write(cell))
    fail(std::string(access) + " over what another thread wrote, without a barrier between");
  cell.writer = thread;
  cell.write_epoch = epoch_;
  cell.warp_write_epoch = warp_epochs_[warp()];
}

void Checker::shared_store(const void* at, size_t bytes) {
  const auto [first, end] = cells(at, bytes, "shared store");
  for (size_t i = first; i < end; ++i) {
    overwrite(cells_[i], "shared store");
    cells_[i].state = written;
  }
}

void Checker::begin_copy(void* at, size_t bytes) {
  const auto [first, end] = cells(at, bytes, "asynchronous copy");
  for (size_t i = first; i < end; ++i) {
    overwrite(cells_[i], "asynchronous copy");
    cells_[i].state = in_flight;
  }
  begun_[thread].emplace_back(first, end);
}

void Checker::commit_copies() {
  groups_[thread].push_back(std::move(begun_[thread]));
  begun_[thread].clear();
}

// What is waited for is seen by this thread at once and by others after the next barrier.
void Checker::wait_for_copies(size_t groups) {
  auto& pending = groups_[thread];
  while (pending.size() > groups) {
    for (const auto& [first, end] : pending.front())
      for (size_t i = first; i < end; ++i) {
        cells_[i].state = written;
        cells_[i].writer = thread;
        cells_[i].write_epoch = epoch_;
        cells_[i].warp_write_epoch = warp_epochs_[warp()];
      }
    pending.erase(pending.begin());
  }
}

void check_global_load(const void* at, size_t bytes) { checker().global(at, bytes, false); }
void check_global_store(const void* at, size_t bytes) { checker().global(at, bytes, true); }
void check_shared_load(const void* at, size_t bytes) { checker().shared_load(at, bytes); }
void check_shared_store(const void* at, size_t bytes) { checker().shared_store(at, bytes); }

void cp_async(void* shared, const void* global, int bytes, int valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("asynchronous copy of a size there is not");
  if (valid < 0 || valid > bytes) fail("asynchronous copy of more than its size");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("asynchronous copy from an address that is not aligned");
  checker().begin_copy(shared, bytes);
  if (valid > 0) check_global_load(global, bytes);
  memcpy(shared, global, valid);
  memset(static_cast<char*>(shared) + valid, 0, bytes - valid);
}

void cp_async_commit() { checker().commit_copies(); }
void cp_async_wait(int groups) { checker().wait_for_copies(size_t(groups)); }

}  // namespace cuda_on_cpu
