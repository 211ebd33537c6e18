#include "adapter_steps.h"

#include <algorithm>
#include <cstring>

#include "../stable.h"
#include "depthwise_run.h"
#include "scratch.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

// Tokens that one task takes.
constexpr int64_t kTokensPerTask = 96;
// As for the depthwise planner: not the number of threads there are, on which no result depends.
constexpr int64_t kSupposedThreads = 4;
// Taps in a row to which the adapter's own tiles are as fast as the depthwise kernels' in place.
constexpr int64_t kMostFusedRow = 7;
// Vector multiply-adds of an image that are worth more than one thread.
constexpr double kWorkOfSteps = 50000.0;

int64_t element_bytes(const AdapterParams& p) { return p.storage == Storage::float64 ? 8 : 4; }

// The grid part of a tensor (batch, tokens, rank).
void* grid_of(const AdapterParams& p, const void* tokens) {
  return const_cast<char*>(static_cast<const char*>(tokens)) +
         p.num_prefix_tokens * p.rank * element_bytes(p);
}

// step(image, first token, last token, scratch) for all tokens.
template <class Step>
void over_tokens(const AdapterParams& p, const AdapterKernels& k, const Step& step) {
  const int64_t per_image = ceil_div(p.tokens, kTokensPerTask);
  const size_t scratch_bytes = size_t(k.step_scratch_elements(p) * element_bytes(p));
  torch::stable::parallel_for(0, p.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    void* scratch = task_scratch().get(scratch_bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % per_image * kTokensPerTask;
      step(task / per_image, first, std::min(first + kTokensPerTask, p.tokens), scratch);
    }
  });
}

// begin_part(part), then step(part, image, first token, last token, scratch) for the tokens of it.
template <class Begin, class Step>
void over_parts(const AdapterParams& p, const AdapterGradients& g, const AdapterKernels& k,
                const Begin& begin_part, const Step& step) {
  const int64_t rows = p.batch * p.tokens;
  const size_t scratch_bytes = size_t(k.step_scratch_elements(p) * element_bytes(p));
  torch::stable::parallel_for(0, g.num_parts, 1, [&](int64_t begin, int64_t end) {
    void* scratch = task_scratch().get(scratch_bytes);
    for (int64_t part = begin; part < end; ++part) {
      begin_part(part);
      const int64_t last = (part + 1) * rows / g.num_parts;
      for (int64_t row = part * rows / g.num_parts; row < last;) {
        const int64_t image = row / p.tokens, first = row % p.tokens;
        const int64_t count = std::min(p.tokens - first, last - row);
        step(part, image, first, first + count, scratch);
        row += count;
      }
    }
  });
}

// The tap that a 1×1 image meets under "same" padding; -1 if the padding falls between two taps.
int64_t center_tap(const AdapterParams& p) {
  if (p.pad_top % p.dilation || p.pad_left % p.dilation) return -1;
  return p.pad_top / p.dilation * p.kernel_w + p.pad_left / p.dilation;
}

// c of the prefix tokens.
template <class T>
void convolve_prefix(const AdapterParams& p) {
  const T* a = static_cast<const T*>(p.activate_before ? p.a : p.z);
  const T *conv = static_cast<const T*>(p.conv), *bias = static_cast<const T*>(p.conv_bias);
  const int64_t taps = p.kernel_h * p.kernel_w, tap = center_tap(p);
  const bool as_image = p.prefix_mode == PrefixMode::center_tap;
  for (int64_t image = 0; image < p.batch; ++image) {
    const int64_t first = image * p.tokens * p.rank;
    T* c = static_cast<T*>(p.c) + first;
    for (int64_t i = 0; i < p.num_prefix_tokens * p.rank; ++i) {
      const int64_t channel = i % p.rank;
      c[i] = a[first + i];
      if (!as_image) continue;
      c[i] *= tap < 0 ? T(0) : conv[channel * taps + tap];
      if (bias != nullptr) c[i] += bias[channel];
    }
  }
}

// The prefix tokens' gradients: of a, and added to those of the convolution's weights.
template <class T>
void convolve_prefix_backward(const AdapterParams& p, const AdapterGradients& g, T* grad_conv,
                              T* grad_conv_bias) {
  if (p.prefix_mode == PrefixMode::zero) return;
  const T* a = static_cast<const T*>(p.activate_before ? p.a : p.z);
  const T *conv = static_cast<const T*>(p.conv), *grad_c = static_cast<const T*>(g.grad_c);
  T* grad_a = static_cast<T*>(p.a);
  const int64_t taps = p.kernel_h * p.kernel_w, tap = center_tap(p);
  const bool as_image = p.prefix_mode == PrefixMode::center_tap;
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t i = 0; i < p.num_prefix_tokens * p.rank; ++i) {
      const int64_t at = image * p.tokens * p.rank + i, channel = i % p.rank;
      T grad = grad_c[at];
      if (as_image) {
        if (g.need_conv) {
          grad_conv_bias[channel] += grad;
          if (tap >= 0) grad_conv[channel * taps + tap] += grad * a[at];
        }
        grad *= tap < 0 ? T(0) : conv[channel * taps + tap];
      }
      grad_a[at] = grad;
    }
}

}  // namespace

ConvParams adapter_convolution(const AdapterParams& p) {
  ConvParams conv;
  conv.storage = p.storage == Storage::float64 ? Storage::float64 : Storage::float32;
  conv.batch = p.batch;
  conv.channels = p.rank;
  conv.input.height = p.height;
  conv.input.width = p.width;
  conv.input.stride_b = p.tokens * p.rank;
  conv.input.stride_c = 1;
  conv.input.stride_h = p.width * p.rank;
  conv.input.stride_w = p.rank;
  conv.output = conv.input;
  conv.kernel_h = p.kernel_h;
  conv.kernel_w = p.kernel_w;
  conv.dilation_h = conv.dilation_w = p.dilation;
  conv.pad_top = p.pad_top;
  conv.pad_left = p.pad_left;
  return conv;
}

bool takes_steps(const AdapterParams& p, const char* kernel_name) {
  if (std::strcmp(kernel_name, "fft") == 0) return true;
  if (std::strcmp(kernel_name, "in_place") == 0 && p.kernel_w > kMostFusedRow) return true;
  const double work = double(p.tokens) * double(p.rank_padded) *
                      double(2 * p.dim + p.kernel_h * p.kernel_w) / double(p.lanes);
  return p.batch < kSupposedThreads && work >= kWorkOfSteps;
}

int64_t parts_of_steps(const AdapterParams& p, int64_t most) {
  const int64_t fit = std::max<int64_t>(1, p.batch * p.tokens / kTokensPerTask);
  return std::min(most, std::max(p.batch, std::min(kSupposedThreads, fit)));
}

void run_forward_steps(const AdapterParams& p, const AdapterKernels& k,
                       PlannedConvolution& planned) {
  over_tokens(p, k, [&](int64_t image, int64_t begin, int64_t end, void* scratch) {
    k.down(p, image, begin, end, scratch);
    if (p.activate_before) k.activate(p, image, begin, end);
  });
  planned.plan.source.data = grid_of(p, p.activate_before ? p.a : p.z);
  planned.plan.target.data = grid_of(p, p.c);
  run(planned, p.conv, p.conv_bias);
  if (p.storage == Storage::float64)
    convolve_prefix<double>(p);
  else
    convolve_prefix<float>(p);
  over_tokens(p, k, [&](int64_t image, int64_t begin, int64_t end, void* scratch) {
    k.up(p, image, begin, end, scratch);
  });
}

void run_backward_steps(const AdapterParams& p, const AdapterGradients& g, const AdapterKernels& k,
                        PlannedConvolution& input, PlannedWeightGradient& weight, void* grad_conv,
                        void* grad_conv_bias) {
  const auto clear = [&](int64_t part) {
    const size_t bytes = size_t(g.part_elements * element_bytes(p));
    memset(static_cast<char*>(g.parts) + size_t(part) * bytes, 0, bytes);
  };
  over_parts(p, g, k, clear,
             [&](int64_t part, int64_t image, int64_t begin, int64_t end, void* scratch) {
               if (p.activate_before && g.need_conv) k.activate(p, image, begin, end);
               k.backward_up(p, g, part, image, begin, end, scratch);
             });
  const bool need_a = g.need_down || g.grad_x;
  if (!g.need_conv && !need_a) return;
  weight.plan.input.data = grid_of(p, p.activate_before ? p.a : p.z);
  weight.plan.grad_output.data = input.plan.source.data = grid_of(p, g.grad_c);
  input.plan.target.data = grid_of(p, p.a);
  if (g.need_conv && need_a)
    run(input, weight, p.conv, grad_conv, grad_conv_bias);
  else if (g.need_conv)
    run(weight, grad_conv, grad_conv_bias);
  else
    run(input, p.conv, nullptr);
  // From here on, p.a holds the gradient of a: of the grid already, of prefix tokens from here.
  if (p.storage == Storage::float64)
    convolve_prefix_backward(p, g, static_cast<double*>(grad_conv),
                             static_cast<double*>(grad_conv_bias));
  else
    convolve_prefix_backward(p, g, static_cast<float*>(grad_conv),
                             static_cast<float*>(grad_conv_bias));
  if (!need_a) return;
  over_parts(
      p, g, k, [](int64_t) {},
      [&](int64_t part, int64_t image, int64_t begin, int64_t end, void* scratch) {
        k.backward_down(p, g, part, image, begin, end, scratch);
      });
}

}  // namespace lka::cpu
