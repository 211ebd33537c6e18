#include "fft_planner.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <vector>

#include "sizes.h"

namespace lka::cpu {
namespace {

// In units of the direct kernels' vector multiply-adds: a transform of n elements, for each of
// n·log2(n), and what is done beside it to each element of a spectrum. Measured, see
// docs/kernel-notes.md.
constexpr double kFftStep = 5.5, kFftElement = 5.0;
// What the direct kernels do beside a multiply-add.
constexpr double kDirectTap = 1.15, kInPlaceTap = 1.1;
// Outputs side by side in one of their tiles, with AVX-512; mostly one row of them.
constexpr int64_t kTileColumns = 14;
// Far above any map: the time to find a size, and the number of stages, are bounded.
constexpr int64_t kLargestSize = 1 << 20;
// Rows in hand: their positions should fill the squares that are transposed in registers.
constexpr int64_t kPositionsTogether = 96;

bool has_small_factors(int64_t n) {
  for (int64_t prime : {2, 3, 5})
    while (n % prime == 0) n /= prime;
  return n == 1;
}

int64_t least_size(const Phase& phase, int64_t source_size) {
  const int64_t first = phase.origin, last = phase.origin + (phase.taps - 1) * phase.tap_step;
  return std::max({source_size + std::max<int64_t>(0, -first),
                   phase.count + std::max<int64_t>(0, last), last - first + 1, int64_t(2)});
}

int64_t good_size(int64_t size) {
  while (!has_small_factors(size)) ++size;
  return size;
}

template <class T>
const T* twiddles_of(const FftPlan& plan) {
  // Kept for good: some 16 bytes for every element of every size that was ever run.
  static std::mutex mutex;
  static std::map<int64_t, std::vector<T>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<T>& table = known[plan.size];
  if (!table.empty()) return table.data();
  int64_t n = plan.size;
  for (int stage = 0; stage < plan.num_stages; ++stage) {
    const int radix = plan.radices[stage];
    for (int64_t q = 0; q < n / radix; ++q)
      for (int j = 1; j < radix; ++j) {
        const double angle = -2.0 * M_PI * double(q * j) / double(n);
        table.push_back(T(std::cos(angle)));
        table.push_back(T(std::sin(angle)));
      }
    n /= radix;
  }
  return table.data();
}

FftPlan plan_of_size(int64_t size) {
  FftPlan plan;
  plan.size = size;
  int64_t rest = size;
  for (int radix : {4, 2, 3, 5})
    for (; rest % radix == 0; rest /= radix) plan.radices[plan.num_stages++] = radix;
  return plan;
}

double steps(int64_t n) { return double(n) * std::log2(double(n)); }

}  // namespace

bool plan_fft(const Phase& y, const Phase& x, int64_t height, int64_t width, FftConv& fft) {
  if (y.taps < 1 || x.taps < 1 || height < 1 || width < 1) return false;
  if (least_size(y, height) > kLargestSize || least_size(x, width) > kLargestSize) return false;
  fft.y = plan_of_size(good_size(least_size(y, height)));
  fft.x = plan_of_size(good_size(least_size(x, width)));
  fft.rows_together = std::max<int64_t>(2, (kPositionsTogether / width + 1) / 2 * 2);
  return true;
}

void add_twiddles(FftConv& fft, Storage storage) {
  for (FftPlan* plan : {&fft.y, &fft.x})
    plan->twiddles = storage == Storage::float64
                         ? static_cast<const void*>(twiddles_of<double>(*plan))
                         : static_cast<const void*>(twiddles_of<float>(*plan));
}

double fft_cost(const FftConv& fft, int64_t rows, bool both) {
  const double columns = double(fft.x.size / 2 + 1);
  return kFftStep * (double((rows + 1) / 2) * steps(fft.x.size) +
                     (both ? 2.0 : 1.0) * columns * steps(fft.y.size)) +
         kFftElement * double(rows + fft.y.size) * columns;
}

namespace {

// (output, tap) pairs of one dimension that the direct kernels multiply: of tiles of at most `tile`
// outputs, all with each tap that meets an element of the source for any of them.
double multiplied_taps(const Phase& phase, int64_t source_size, int64_t tile) {
  const int64_t tiles = ceil_div(phase.count, tile);
  double pairs = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = t * phase.count / tiles, end = (t + 1) * phase.count / tiles;
    const int64_t lowest = phase.origin + begin * phase.out_step;
    const int64_t highest = phase.origin + (end - 1) * phase.out_step;
    const int64_t first = std::max<int64_t>(0, ceil_div(-highest, phase.tap_step));
    const int64_t last = std::min(phase.taps, ceil_div(source_size - lowest, phase.tap_step));
    pairs += double(end - begin) * double(std::max<int64_t>(0, last - first));
  }
  return pairs;
}

}  // namespace

double dense_cost(const Phase& y, const Phase& x, int64_t height, int64_t width) {
  return kDirectTap * double(y.count * x.count) * double(height * width);
}

double direct_cost(const Phase& y, const Phase& x, int64_t height, int64_t width) {
  return kDirectTap * multiplied_taps(y, height, 1) * multiplied_taps(x, width, kTileColumns);
}

double tiles_in_place_cost(const Phase& y, const Phase& x, int64_t height, int64_t width) {
  return kInPlaceTap * multiplied_taps(y, height, 1) * multiplied_taps(x, width, 1);
}

}  // namespace lka::cpu
