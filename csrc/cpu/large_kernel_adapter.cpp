// Launchers of the fused adapter on the CPU: tensors to params, packed weights, images to torch's
// thread pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../adapter_options.h"
#include "adapter_params.h"
#include "adapter_steps.h"
#include "adapter_weights.h"
#include "kernel_table.h"
#include "operators.h"
#include "scratch.h"
#include "storage_dispatch.h"

namespace lka::cpu {
namespace {

// Parts of the batch whose weight gradients are summed apart: a constant, so that the bits of the
// result do not depend on the number of threads.
constexpr int64_t kMaxParts = 16;
// Tokens that one task of a projection takes when a batch has fewer images than there are threads.
constexpr int64_t kTokensPerTask = 96;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

const AdapterKernels& choose(Storage storage, int64_t rank) {
  const AdapterKernels &full = kernels(storage).adapter_full, &half = kernels(storage).adapter_half;
  const int64_t idle_full = round_up(rank, full.lanes) - rank;
  return idle_full >= half.lanes ? half : full;
}

AdapterParams make_params(const Tensor& x, const AdapterWeights& w,
                          const std::optional<Tensor>& seed, int64_t height, int64_t width,
                          int64_t num_prefix_tokens, const std::string& prefix_mode,
                          int64_t dilation, const std::string& activation,
                          const std::string& activation_position, double dropout_p, double scale) {
  AdapterParams p = {};
  p.storage = storage_of(x, "x");
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.num_prefix_tokens = num_prefix_tokens;
  p.height = height;
  p.width = width;
  STD_TORCH_CHECK(p.tokens == num_prefix_tokens + height * width, "x must have P + H·W tokens");
  p.rank = w.down.size(0);
  p.kernel_h = w.conv.size(2);
  p.kernel_w = w.conv.size(3);
  p.dilation = dilation;
  p.activation = activation_of(activation);
  p.activate_before = activation_position != "post";
  p.activate_after = activation_position != "pre";
  p.prefix_mode = prefix_mode_of(prefix_mode);
  p.scale = scale;
  p.dropout = seed.has_value() && dropout_p > 0;
  if (p.dropout) {
    p.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    const double threshold = std::floor(dropout_p * 4294967296.0);
    p.drop_threshold = uint64_t(std::min(threshold, 4294967296.0));
    p.keep_factor = dropout_p >= 1.0 ? 0.0 : 1.0 / (1.0 - dropout_p);
  }
  const AdapterKernels& k = choose(p.storage, p.rank);
  p.lanes = k.lanes;
  p.rank_blocks = (p.rank + p.lanes - 1) / p.lanes;
  p.rank_padded = p.rank_blocks * p.lanes;
  p.dim_padded = round_up(p.dim, k.wide_lanes);
  p.rank_rows = round_up(p.rank, k.rank_group);
  p.pad_top = dilation * (p.kernel_h - 1) / 2;
  p.pad_left = dilation * (p.kernel_w - 1) / 2;
  p.buffer_rows = height + dilation * (p.kernel_h - 1);
  p.buffer_columns = width + dilation * (p.kernel_w - 1);
  return p;
}

// call(T{}, S{}): the types of the arithmetic and of the tensors.
template <class Call>
void with_arithmetic(Storage storage, const Call& call) {
  if (storage == Storage::float64)
    call(double{}, double{});
  else
    with_storage<float>(storage, [&](auto s) { call(float{}, s); });
}

template <class S>
const S* elements(const Tensor& t) {
  return static_cast<const S*>(t.data_ptr());
}

// The convolution's weights as the depthwise kernels read them.
template <class T, class S>
const void* dense_taps(const AdapterParams& p, const AdapterWeights& w, Packer<T>& packer) {
  const S* from = elements<S>(w.conv);
  if constexpr (std::is_same_v<T, S>) {
    (void)p, (void)packer;
    return from;
  } else {
    const int64_t count = p.rank * p.kernel_h * p.kernel_w;
    return packer.vector(from, count, count, T(1));
  }
}

template <class T, class S>
void pack_forward(AdapterParams& p, const AdapterWeights& w, bool steps, void* memory) {
  Packer<T> packer(memory);
  p.down = packer.projection(p, elements<S>(w.down), p.dim, 1, T(1));
  p.up = packer.projection(p, elements<S>(w.up), 1, p.rank, T(p.scale));
  p.conv = steps ? dense_taps<T, S>(p, w, packer) : packer.taps(p, elements<S>(w.conv), false);
  if (w.has_down_bias) p.down_bias = packer.vector(elements<S>(w.down_bias), p.rank, p.rank, T(1));
  if (w.has_up_bias)
    p.up_bias = packer.vector(elements<S>(w.up_bias), p.dim, p.dim_padded, T(p.scale));
  if (!steps || w.has_conv_bias)
    p.conv_bias = packer.vector(w.has_conv_bias ? elements<S>(w.conv_bias) : nullptr,
                                w.has_conv_bias ? p.rank : 0, p.rank_padded, T(1));
}

template <class T, class S>
void pack_backward(AdapterParams& p, AdapterGradients& g, const AdapterWeights& w, bool steps,
                   void* memory) {
  Packer<T> packer(memory);
  p.down = packer.projection(p, elements<S>(w.down), p.dim, 1, T(1));
  p.up = packer.projection(p, elements<S>(w.up), 1, p.rank, T(p.scale));
  if (steps)
    p.conv = dense_taps<T, S>(p, w, packer);
  else
    g.conv_flipped = packer.taps(p, elements<S>(w.conv), true);
}

void run_forward(const AdapterParams& p, const AdapterKernels& k, int64_t element) {
  const size_t scratch_bytes = size_t(k.scratch_elements(p) * element);
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const double work = double(p.tokens) * double(p.rank_padded) *
                      double(2 * p.dim + p.kernel_h * p.kernel_w) / double(p.lanes);
  if (p.batch >= threads || work < 50000.0) {
    const int64_t grain = std::max<int64_t>(1, int64_t(20000.0 / (work + 1)));
    torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
      void* scratch = task_scratch().get(scratch_bytes);
      for (int64_t image = begin; image < end; ++image) {
        k.down(p, image, 0, p.tokens, scratch);
        k.convolve(p, image, scratch);
        k.up(p, image, 0, p.tokens, scratch);
      }
    });
    return;
  }
  // Fewer images than threads: step by step, tokens side by side.
  const int64_t per_image = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
  const auto over_tokens = [&](auto step) {
    torch::stable::parallel_for(0, p.batch * per_image, 1, [&](int64_t begin, int64_t end) {
      void* scratch = task_scratch().get(scratch_bytes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % per_image * kTokensPerTask;
        step(p, task / per_image, first, std::min(first + kTokensPerTask, p.tokens), scratch);
      }
    });
  };
  over_tokens(k.down);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    void* scratch = task_scratch().get(scratch_bytes);
    for (int64_t image = begin; image < end; ++image) k.convolve(p, image, scratch);
  });
  over_tokens(k.up);
}

// The gradients of the weights, from the sums of the parts; those of the convolution from
// grad_conv, then grad_conv_bias, unless null.
template <class T, class S>
void reduce(const AdapterParams& p, const AdapterGradients& g, const T* grad_conv, Tensor* grads,
            const std::vector<bool>& mask) {
  const int64_t taps = p.kernel_h * p.kernel_w, projection = p.rank_rows * p.dim_padded;
  const auto sum = [&](int grad, int64_t offset, int64_t rows, int64_t columns, int64_t row,
                       T factor, int64_t row_step, int64_t column_step) {
    if (mask[size_t(grad)])
      sum_parts<T, S>(g, offset, rows, columns, row, factor,
                      static_cast<S*>(grads[grad].data_ptr()), row_step, column_step);
  };
  const T scale = T(p.scale);
  int64_t offset = 0;
  sum(1, offset, p.rank, p.dim, p.dim_padded, T(1), p.dim, 1);
  sum(5, offset += projection, p.rank, p.dim, p.dim_padded, scale, 1, p.rank);
  sum(6, offset += projection, 1, p.dim, 0, scale, 0, 1);
  sum(2, offset += p.dim_padded, 1, p.rank, 0, T(1), 0, 1);
  if (grad_conv != nullptr) {
    if (mask[3]) narrow_run(grad_conv, 1, p.rank * taps, static_cast<S*>(grads[3].data_ptr()));
    if (mask[4])
      narrow_run(grad_conv + p.rank * taps, 1, p.rank, static_cast<S*>(grads[4].data_ptr()));
    return;
  }
  offset += p.rank_padded;
  if (mask[3])
    for (int64_t k = 0; k < p.rank; k += p.lanes)
      sum_parts<T, S>(g, offset + k * taps, taps, std::min(p.lanes, p.rank - k), p.lanes, T(1),
                      static_cast<S*>(grads[3].data_ptr()) + k * taps, 1, taps);
  sum(4, offset + p.rank_padded * taps, 1, p.rank, 0, T(1), 0, 1);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> large_kernel_adapter_forward(
    const Tensor& x_any, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& seed, int64_t height, int64_t width, int64_t num_prefix_tokens,
    const std::string& prefix_mode, int64_t dilation, const std::string& activation,
    const std::string& activation_position, double dropout_p, double scale) {
  const Tensor x = torch::stable::contiguous(x_any);
  const AdapterWeights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterParams p = make_params(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                                activation, activation_position, dropout_p, scale);
  const bool wide = p.storage == Storage::float64;
  const ScalarType accumulation = wide ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty(x, {p.batch, p.tokens, p.dim}, x.scalar_type());
  Tensor z = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
  Tensor c = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
  if (y.numel() == 0) return {y, z, c};
  Tensor dense_residual;
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(),
                    "residual must have the dtype of x");
    dense_residual = torch::stable::contiguous(*residual);
    p.residual = dense_residual.data_ptr();
  }
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.z = z.data_ptr();
  p.c = c.data_ptr();
  PlannedConvolution planned =
      plan_forward(adapter_convolution(p), int(torch::stable::get_num_threads()));
  const bool steps = takes_steps(p, planned.kernel_name);
  with_arithmetic(p.storage, [&](auto t, auto s) {
    using T = decltype(t);
    Scratch& memory = steps ? outer_call_scratch() : call_scratch();
    pack_forward<T, decltype(s)>(p, w, steps, memory.get(Packer<T>::elements(p) * sizeof(T)));
  });
  const AdapterKernels& k = choose(p.storage, p.rank);
  if (!steps) {
    run_forward(p, k, wide ? 8 : 4);
    return {y, z, c};
  }
  Tensor a;
  if (p.activate_before) {
    a = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
    p.a = a.data_ptr();
  }
  run_forward_steps(p, k, planned);
  return {y, z, c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_adapter_backward(
    const Tensor& grad_output_any, const Tensor& x_any, const Tensor& z, const Tensor& c,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const Tensor& conv_weight,
    const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& seed, int64_t height,
    int64_t width, int64_t num_prefix_tokens, const std::string& prefix_mode, int64_t dilation,
    const std::string& activation, const std::string& activation_position, double dropout_p,
    double scale, bool residual_is_x, const std::vector<bool>& output_mask) {
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor grad_output = torch::stable::contiguous(grad_output_any);
  STD_TORCH_CHECK(grad_output.scalar_type() == x.scalar_type(),
                  "grad_output must have the dtype of x");
  const AdapterWeights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterParams p = make_params(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                                activation, activation_position, dropout_p, scale);
  const ScalarType dtype = x.scalar_type();
  Tensor grads[7];
  const auto want = [&](int i, std::initializer_list<int64_t> sizes) {
    grads[i] = output_mask[size_t(i)] ? empty(x, sizes, dtype) : empty(x, {0}, dtype);
  };
  want(0, {p.batch, p.tokens, p.dim});
  want(1, {p.rank, p.dim});
  want(2, {p.rank});
  want(3, {p.rank, 1, p.kernel_h, p.kernel_w});
  want(4, {p.rank});
  want(5, {p.dim, p.rank});
  want(6, {p.dim});
  const auto results = [&] {
    return std::make_tuple(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]);
  };
  if (x.numel() == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return results();
  }

  const Tensor dense_z = torch::stable::contiguous(z), dense_c = torch::stable::contiguous(c);
  p.x = x.data_ptr();
  p.z = dense_z.data_ptr();
  p.c = dense_c.data_ptr();
  AdapterGradients g = {};
  g.grad_output = grad_output.data_ptr();
  g.grad_x = output_mask[0] ? grads[0].data_ptr() : nullptr;
  g.add_grad_output = residual_is_x;
  g.need_down = output_mask[1] || output_mask[2];
  g.need_conv = output_mask[3] || output_mask[4];
  g.need_up = output_mask[5] || output_mask[6];
  const ConvParams convolution = adapter_convolution(p);
  PlannedConvolution planned =
      plan_backward_input(convolution, int(torch::stable::get_num_threads()));
  PlannedWeightGradient planned_weight = plan_backward_weight(convolution);
  const bool steps =
      takes_steps(p, planned.kernel_name) || std::strcmp(planned_weight.kernel_name, "fft") == 0;
  const int64_t taps = p.kernel_h * p.kernel_w;
  g.num_parts = steps ? parts_of_steps(p, kMaxParts) : std::min(p.batch, kMaxParts);
  g.part_elements = round_up(2 * p.rank_rows * p.dim_padded + p.dim_padded + p.rank_padded +
                                 (steps ? 0 : p.rank_padded * (taps + 1)),
                             16);
  const AdapterKernels& k = choose(p.storage, p.rank);
  const bool wide = p.storage == Storage::float64;
  const int64_t element = wide ? 8 : 4;
  if (steps) {
    const ScalarType accumulation = wide ? ScalarType::Double : ScalarType::Float;
    const Tensor a = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
    const Tensor grad_c = empty(x, {p.batch, p.tokens, p.rank}, accumulation);
    p.a = a.data_ptr();
    g.grad_c = grad_c.data_ptr();
    with_arithmetic(p.storage, [&](auto t, auto s) {
      using T = decltype(t);
      const int64_t packed = round_up(Packer<T>::elements(p), 16);
      const int64_t conv = round_up(p.rank * (taps + 1), 16);
      T* shared = static_cast<T*>(outer_call_scratch().get(
          size_t(packed + conv + g.num_parts * g.part_elements) * sizeof(T)));
      T* grad_conv = shared + packed;
      g.parts = grad_conv + conv;
      pack_backward<T, decltype(s)>(p, g, w, true, shared);
      run_backward_steps(p, g, k, planned, planned_weight, grad_conv, grad_conv + p.rank * taps);
      reduce<T, decltype(s)>(p, g, grad_conv, grads, output_mask);
    });
    return results();
  }
  with_arithmetic(p.storage, [&](auto t, auto s) {
    using T = decltype(t);
    const int64_t packed = round_up(Packer<T>::elements(p), 16);
    T* shared = static_cast<T*>(
        call_scratch().get(size_t(packed + g.num_parts * g.part_elements) * sizeof(T)));
    g.parts = shared + packed;
    pack_backward<T, decltype(s)>(p, g, w, false, shared);
  });
  const double work = double(p.batch) / double(g.num_parts) * double(p.tokens * p.rank_padded) *
                      double(4 * p.dim + 2 * p.kernel_h * p.kernel_w) / double(p.lanes);
  torch::stable::parallel_for(
      0, g.num_parts, std::max<int64_t>(1, int64_t(20000.0 / (work + 1))),
      [&](int64_t begin, int64_t end) {
        k.backward(p, g, begin, end, task_scratch().get(size_t(k.scratch_elements(p) * element)));
      });
  with_arithmetic(p.storage, [&](auto t, auto s) {
    using T = decltype(t);
    reduce<T, decltype(s)>(p, g, static_cast<const T*>(nullptr), grads, output_mask);
  });
  return results();
}

}  // namespace lka::cpu
