// The CUDA operators of the fused adapter: tensors to params, memory for results and partial sums.
#include "../adapter_options.h"
#include "adapter_order.h"
#include "device_code.h"
#include "launch.h"
#include "operators.h"
#include "runner.h"

namespace lka::cuda {
namespace {

void check_device(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the device of x, CUDA device ", x.get_device_index(),
                  "; it is on device ", tensor.get_device_index());
}

// Kernels read `tensor` as x's dtype in these sizes, without looking.
void check_like(const Tensor& tensor, const Tensor& x, const std::vector<int64_t>& sizes,
                const char* name) {
  check_device(tensor, x, name);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(tensor.dim() == int64_t(sizes.size()), name, " must have ", sizes.size(),
                  " dimensions; it has ", tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(tensor.size(int64_t(i)) == sizes[i], name, " must have size ", sizes[i],
                    " in dimension ", i, "; it has ", tensor.size(int64_t(i)));
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

TokenTensor tokens_of(const Tensor& t) {
  TokenTensor tokens;
  tokens.data = t.data_ptr();
  tokens.stride_b = t.stride(0);
  tokens.stride_t = t.stride(1);
  tokens.stride_c = t.stride(2);
  return tokens;
}

AdapterCall describe(const Tensor& x, const AdapterWeights& w, const std::optional<Tensor>& seed,
                     int64_t height, int64_t width, int64_t num_prefix_tokens,
                     const std::string& prefix_mode, int64_t dilation,
                     const std::string& activation, const std::string& activation_position,
                     double dropout_p, double scale) {
  AdapterCall call;
  call.storage = storage_of(x, "x");
  call.activation = activation_of(activation);
  call.prefix_mode = prefix_mode_of(prefix_mode);
  call.activate_before = activation_position != "post";
  call.activate_behind = activation_position != "pre";
  call.batch = x.size(0);
  call.tokens = x.size(1);
  call.channels = x.size(2);
  call.rank = w.down.size(0);
  call.prefix = num_prefix_tokens;
  call.height = height;
  call.width = width;
  STD_TORCH_CHECK(call.tokens == num_prefix_tokens + height * width, "x must have P + H·W tokens");
  call.kernel_h = w.conv.size(2);
  call.kernel_w = w.conv.size(3);
  call.dilation = dilation;
  call.dropout_p = dropout_p;
  call.scale = scale;
  for (const Tensor* weight : {&w.down, &w.conv, &w.up}) check_device(*weight, x, "weights");
  if (w.has_down_bias) check_device(w.down_bias, x, "down_bias");
  if (w.has_conv_bias) check_device(w.conv_bias, x, "conv_bias");
  if (w.has_up_bias) check_device(w.up_bias, x, "up_bias");
  if (seed.has_value()) {
    check_device(*seed, x, "seed");
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed must be int64");
    call.seed = static_cast<const int64_t*>(seed->data_ptr());
  }
  call.down_weight = w.down.data_ptr();
  call.conv_weight = w.conv.data_ptr();
  call.up_weight = w.up.data_ptr();
  if (w.has_down_bias) call.down_bias = w.down_bias.data_ptr();
  if (w.has_conv_bias) call.conv_bias = w.conv_bias.data_ptr();
  if (w.has_up_bias) call.up_bias = w.up_bias.data_ptr();
  call.x = tokens_of(x);
  return call;
}

void check_served(const std::string& refusal) {
  STD_TORCH_CHECK(refusal.empty(), "the cuda backend cannot serve this adapter: ", refusal);
}

int multiprocessors_of(int device) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> large_kernel_adapter_forward(
    const Tensor& x, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& seed, int64_t height, int64_t width, int64_t num_prefix_tokens,
    const std::string& prefix_mode, int64_t dilation, const std::string& activation,
    const std::string& activation_position, double dropout_p, double scale) {
  const AdapterWeights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterCall call = describe(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                              activation, activation_position, dropout_p, scale);
  const auto rank_tensor = [&] {
    return empty(x, {call.batch, call.rank, call.tokens}, x.scalar_type());
  };
  Tensor y = torch::stable::empty_like(x), z = rank_tensor(), c = rank_tensor();
  if (x.numel() == 0) return {y, z, c};
  call.y = tokens_of(y);
  call.z = z.data_ptr();
  call.c = c.data_ptr();
  if (residual.has_value()) {
    check_like(*residual, x, sizes_of(x), "residual");
    call.residual = tokens_of(*residual);
  }
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  check_served(why_device_cannot(device, true));
  Runner runner(call.storage, x, current_stream(device));
  const char* refusal = run_adapter_forward(call, multiprocessors_of(device), runner);
  check_served(refusal == nullptr ? "" : refusal);
  return {y, z, c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_adapter_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& z, const Tensor& c,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const Tensor& conv_weight,
    const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& seed, int64_t height,
    int64_t width, int64_t num_prefix_tokens, const std::string& prefix_mode, int64_t dilation,
    const std::string& activation, const std::string& activation_position, double dropout_p,
    double scale, bool residual_is_x, const std::vector<bool>& output_mask) {
  check_like(grad_output, x, sizes_of(x), "grad_output");
  const AdapterWeights w =
      dense_weights(x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias);
  AdapterCall call = describe(x, w, seed, height, width, num_prefix_tokens, prefix_mode, dilation,
                              activation, activation_position, dropout_p, scale);
  for (const auto& [saved, name] : {std::pair(&z, "z"), std::pair(&c, "c")})
    check_like(*saved, x, {call.batch, call.rank, call.tokens}, name);
  const ScalarType dtype = x.scalar_type();
  Tensor grads[7];
  const auto want = [&](size_t i, std::initializer_list<int64_t> sizes) {
    grads[i] = output_mask[i] ? empty(x, sizes, dtype) : empty(x, {0}, dtype);
  };
  grads[0] = output_mask[0] ? torch::stable::empty_like(x) : empty(x, {0}, dtype);
  want(1, {call.rank, call.channels});
  want(2, {call.rank});
  want(3, {call.rank, 1, call.kernel_h, call.kernel_w});
  want(4, {call.rank});
  want(5, {call.channels, call.rank});
  want(6, {call.channels});
  const auto results = [&] {
    return std::make_tuple(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]);
  };
  if (x.numel() == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return results();
  }
  const Tensor dense_z = torch::stable::contiguous(z), dense_c = torch::stable::contiguous(c);
  call.need_grad_x = output_mask[0];
  call.need_down = output_mask[1] || output_mask[2];
  call.need_conv = output_mask[3] || output_mask[4];
  call.need_up = output_mask[5] || output_mask[6];
  call.residual_is_x = residual_is_x;
  call.grad_output = tokens_of(grad_output);
  if (call.need_grad_x) call.grad_x = tokens_of(grads[0]);
  call.z = dense_z.data_ptr();
  call.c = dense_c.data_ptr();
  void* pointers[6];
  for (int i = 0; i < 6; ++i)
    pointers[i] = output_mask[size_t(i + 1)] ? grads[i + 1].data_ptr() : nullptr;
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  check_served(why_device_cannot(device, true));
  Runner runner(call.storage, x, current_stream(device));
  const char* refusal = run_adapter_backward(call, multiprocessors_of(device), pointers, runner);
  check_served(refusal == nullptr ? "" : refusal);
  return results();
}

}  // namespace lka::cuda
