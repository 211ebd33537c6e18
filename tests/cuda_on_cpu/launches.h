// Planned launches run by fibers: what functions that Python calls have in common.
#pragma once

#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "cuda/adapter_order.h"
#include "cuda/depthwise_order.h"
#include "cuda/device/sum_partials.cuh"
#include "cuda_on_cpu.h"

namespace on_fibers {

namespace cuda = lka::cuda;
using cuda_on_cpu::Range;
using lka::Storage;

inline int64_t size_of(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// From the first to the last element of a map.
inline Range range_of(const char* name, const lka::MapView& view, int64_t batch, int64_t channels,
                      int64_t element_size, bool writable) {
  const int64_t last = (batch - 1) * view.stride_b + (channels - 1) * view.stride_c +
                       (view.height - 1) * view.stride_h + (view.width - 1) * view.stride_w;
  return {name, view.data, size_t((last + 1) * element_size), writable};
}

inline const char* keep(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

// Runs what the orders of launches ask for, one launch after the other: fibers instead of a GPU,
// and the checker knows all memory that a call has. The first mistake ends the call.
class Runner {
 public:
  explicit Runner(Storage storage) : storage_(storage) {}

  void add(const char* name, const void* data, int64_t bytes, bool writable) {
    if (data != nullptr) add({name, data, size_t(bytes), writable});
  }
  // Only what kernels do not write is there before they run.
  void add(Range range) {
    if (range.writable) {
      written_.emplace_back((range.bytes + 1) / 2, char(0));
      range.written = written_.back().data();
    }
    ranges_.push_back(range);
  }

  float* floats(int64_t count) { return reinterpret_cast<float*>(make("partial sums", 4 * count)); }
  void* rank_tensor(const cuda::AdapterCall& call) {
    return make("rank-r tensor", call.batch * call.rank * call.tokens * size_of(storage_));
  }

  void toeplitz_correlate(const cuda::CorrelateParams& p, const cuda::LaunchShape& shape) {
    run("toeplitz_correlate", shape, [&](char* shared) {
      in_16_bits([&](auto s) { cuda::ToeplitzCorrelateBlock<decltype(s)>(p, shared).run(); });
    });
  }
  void toeplitz_weight_gradient(const cuda::WeightGradientParams& p,
                                const cuda::LaunchShape& shape) {
    run("toeplitz_weight_gradient", shape, [&](char* shared) {
      in_16_bits([&](auto s) { cuda::WeightGradientBlock<decltype(s)>(p, shared).run(); });
    });
  }
  void dense_correlate(const cuda::DenseCorrelateParams& p, const cuda::LaunchShape& shape) {
    run("dense_correlate", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        using S = decltype(s);
        if (p.row_tiles == 4) return cuda::DenseCorrelateBlock<S, 4>(p, shared).run();
        if (p.row_tiles == 2) return cuda::DenseCorrelateBlock<S, 2>(p, shared).run();
        cuda::DenseCorrelateBlock<S, 1>(p, shared).run();
      });
    });
  }
  void plane_correlate(const cuda::PlaneCorrelateParams& p, const cuda::LaunchShape& shape) {
    run("plane_correlate", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        using S = decltype(s);
        const auto with = [&](auto narrow, auto wide) {
          p.source.row_vector == 0 ? wide.run() : narrow.run();
        };
        switch (cuda::plane_tiles(p)) {
          case 1:
            return with(cuda::PlaneCorrelateBlock<S, 1, false>(p, shared),
                        cuda::PlaneCorrelateBlock<S, 1, true>(p, shared));
          case 2:
            return with(cuda::PlaneCorrelateBlock<S, 2, false>(p, shared),
                        cuda::PlaneCorrelateBlock<S, 2, true>(p, shared));
          case 4:
            return with(cuda::PlaneCorrelateBlock<S, 4, false>(p, shared),
                        cuda::PlaneCorrelateBlock<S, 4, true>(p, shared));
          case 7: return cuda::PlaneCorrelateBlock<S, 7, false>(p, shared).run();
          default: cuda::PlaneCorrelateBlock<S, 8, false>(p, shared).run();
        }
      });
    });
  }
  void dense_weight_gradient(const cuda::DenseWeightGradientParams& p,
                             const cuda::LaunchShape& shape) {
    run("dense_weight_gradient", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        using S = decltype(s);
        if (p.tiles == 8) return cuda::DenseWeightGradientBlock<S, 8>(p, shared).run();
        cuda::DenseWeightGradientBlock<S, 14>(p, shared).run();
      });
    });
  }
  void plane_weight_gradient(const cuda::PlaneWeightGradientParams& p,
                             const cuda::LaunchShape& shape) {
    run("plane_weight_gradient", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        using S = decltype(s);
        if (p.input.row_vector == 0)
          return cuda::PlaneWeightGradientBlock<S, true>(p, shared).run();
        cuda::PlaneWeightGradientBlock<S, false>(p, shared).run();
      });
    });
  }
  void float_correlate(const cuda::FloatCorrelateParams& p, const cuda::LaunchShape& shape) {
    run("float_correlate", shape, [&](char*) { cuda::FloatCorrelateThread(p).run(); });
  }
  void float_weight_gradient(const cuda::FloatWeightGradientParams& p,
                             const cuda::LaunchShape& shape) {
    run("float_weight_gradient", shape, [&](char* shared) {
      cuda::FloatWeightGradientBlock(p, reinterpret_cast<float*>(shared)).run();
    });
  }
  template <class Params>
  void sum_partials(const Params& p, const cuda::LaunchShape& shape, void* weight, void* bias) {
    run("sum_partials", shape,
        [&](char*) { in_any([&](auto s) { cuda::sum_partials<decltype(s)>(p, weight, bias); }); });
  }
  void fft_spectra(const cuda::FftSpectraParams& p, const cuda::LaunchShape& shape) {
    run("fft_spectra", shape, [&](char* shared) { cuda::FftSpectraBlock(p, shared).run(); });
  }
  void fft_correlate(const cuda::FftCorrelateParams& p, const cuda::LaunchShape& shape) {
    run("fft_correlate", shape, [&](char* shared) {
      in_any([&](auto s) { cuda::FftCorrelateBlock<decltype(s)>(p, shared).run(); });
    });
  }
  void fft_weight_gradient(const cuda::FftWeightGradientParams& p, const cuda::LaunchShape& shape) {
    run("fft_weight_gradient", shape, [&](char* shared) {
      in_any([&](auto s) { cuda::FftWeightGradientBlock<decltype(s)>(p, shared).run(); });
    });
  }
  void fft_tap_gradient(const cuda::FftTapGradientParams& p, const cuda::LaunchShape& shape) {
    run("fft_tap_gradient", shape,
        [&](char* shared) { cuda::FftTapGradientBlock(p, shared).run(); });
  }
#define LKA_RUN(NAME, BLOCK)                                                \
  void NAME(const cuda::AdapterParams& p, const cuda::LaunchShape& shape) { \
    run(#NAME, shape, [&](char* shared) {                                   \
      in_any([&](auto s) { cuda::BLOCK<decltype(s)>(p, shared).run(); });   \
    });                                                                     \
  }
  LKA_RUN(adapter_down, AdapterDownBlock)
  LKA_RUN(adapter_up, AdapterUpBlock)
  LKA_RUN(adapter_up_backward, AdapterUpBackwardBlock)
  LKA_RUN(adapter_convolve_backward, AdapterConvolveBackwardBlock)
  LKA_RUN(adapter_down_backward, AdapterDownBackwardBlock)
  LKA_RUN(adapter_weight_gradient, AdapterWeightGradientBlock)
#undef LKA_RUN
  void adapter_narrow_down(const cuda::AdapterParams& p, const cuda::LaunchShape& shape) {
    run("adapter_narrow_down", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        using S = decltype(s);
        if (p.rank <= 8) return cuda::AdapterNarrowDownBlock<S, 1>(p, shared).run();
        cuda::AdapterNarrowDownBlock<S, 2>(p, shared).run();
      });
    });
  }
  void adapter_narrow_up(const cuda::AdapterParams& p, const cuda::LaunchShape& shape) {
    run("adapter_narrow_up", shape, [&](char* shared) {
      in_16_bits([&](auto s) { cuda::AdapterNarrowUpBlock<decltype(s)>(p, shared).run(); });
    });
  }
  void adapter_narrow_up_backward(const cuda::AdapterParams& p, const cuda::LaunchShape& shape) {
    run("adapter_narrow_up_backward", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        cuda::detail::with_narrow_up_block<decltype(s)>(
            p, [&](auto form) { typename decltype(form)::Block(p, shared).run(); });
      });
    });
  }
  void adapter_narrow_down_backward(const cuda::AdapterParams& p, const cuda::LaunchShape& shape) {
    run("adapter_narrow_down_backward", shape, [&](char* shared) {
      in_16_bits([&](auto s) {
        cuda::detail::with_narrow_down_block<decltype(s)>(
            p, [&](auto form) { typename decltype(form)::Block(p, shared).run(); });
      });
    });
  }
  void adapter_sums(const cuda::AdapterSums& p, const cuda::LaunchShape& shape) {
    run("adapter_sums", shape, [&](char* shared) {
      in_any([&](auto s) {
        cuda::sum_adapter_partials<decltype(s)>(p, reinterpret_cast<float*>(shared));
      });
    });
  }

  // What went wrong, or an empty text; `refusal` is what an order returned.
  const char* said(const char* refusal) const {
    return keep(refusal == nullptr ? said_ : std::string("refused: ") + refusal);
  }

 private:
  // Every element of it is NaN in every type.
  char* make(const char* name, int64_t bytes) {
    memory_.emplace_back(size_t(bytes + 15) / 16 * 16, char(0xff));
    add(name, memory_.back().data(), bytes, true);
    return memory_.back().data();
  }
  void run(const char* name, const cuda::LaunchShape& shape,
           const std::function<void(char*)>& kernel) {
    if (!said_.empty()) return;
    // What every device has; the weight gradient of transforms is planned for the device's own.
    if (shape.shared_bytes > cuda::kMostShared && std::string(name) != "fft_weight_gradient") {
      said_ = std::string(name) + ": " + std::to_string(shape.shared_bytes) +
              " bytes of shared memory a block";
      return;
    }
    said_ = cuda_on_cpu::run({shape.blocks, shape.threads, size_t(shape.shared_bytes)},
                             ranges_.data(), int(ranges_.size()), kernel);
    if (!said_.empty()) said_ = std::string(name) + ": " + said_;
  }
  template <class F>
  void in_16_bits(F f) const {
    if (storage_ == Storage::bfloat16)
      f(cuda::BFloat16());
    else
      f(cuda::Float16());
  }
  template <class F>
  void in_any(F f) const {
    if (storage_ == Storage::float32)
      f(cuda::Float32());
    else
      in_16_bits(f);
  }

  Storage storage_;
  std::vector<Range> ranges_;
  std::deque<std::vector<char>> memory_, written_;
  std::string said_;
};

// Blocks, threads and shared memory of a block; or why the call is refused.
inline const char* describe(const cuda::Plan& plan, int64_t* shape) {
  shape[0] = plan.shape.blocks;
  shape[1] = plan.shape.threads;
  shape[2] = plan.shape.shared_bytes;
  return plan.refusal == nullptr ? "" : plan.refusal;
}

}  // namespace on_fibers
