// The CUDA operators of depthwise convolution: which kernel serves a call, and its arguments.
#include "../stable.h"
#include "depthwise_order.h"
#include "device_code.h"
#include "launch.h"
#include "operators.h"
#include "runner.h"

namespace lka::cuda {
namespace {

ConvParams geometry(const Tensor& map, const std::vector<int64_t>& kernel,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation) {
  ConvParams p;
  p.storage = storage_of(map, "input");
  p.batch = map.size(0);
  p.channels = map.size(1);
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[1];
  return p;
}

// Why no kernel for tensor cores can serve a call, whatever its sizes; empty if one may.
std::string why_no_tensor_cores(const ConvParams& p, int device) {
  if (p.storage != Storage::float16 && p.storage != Storage::bfloat16)
    return "tensor cores take float16 and bfloat16";
  if (p.stride_h != 1 || p.stride_w != 1) return "it serves stride 1";
  return why_device_cannot(device, true);
}

void check_device_serves(int device) {
  const std::string refusal = why_device_cannot(device, false);
  STD_TORCH_CHECK(refusal.empty(), "the cuda backend cannot serve this call: ", refusal);
}

void check_form(Form form, const std::string& refusal) {
  STD_TORCH_CHECK(form != Form::implicit_gemm,
                  "method='implicit_gemm' of the cuda backend cannot serve this call: ", refusal,
                  "; use 'auto' or 'direct'");
}

void check_fft(const std::string& refusal) {
  STD_TORCH_CHECK(refusal.empty(),
                  "method='fft' of the cuda backend cannot serve this call: ", refusal,
                  "; use_backend('auto') serves it by torch.fft");
}

// Whether the register-blocked kernels in float32 may serve a call.
bool served_in_float(const ConvParams& p) {
  return p.storage == Storage::float32 && p.stride_h == 1 && p.stride_w == 1;
}

void correlate(Form form, const ConvParams& p, bool backward, const Tensor& weight,
               const std::optional<Tensor>& bias) {
  const Tensor dense = torch::stable::contiguous(weight);
  Tensor dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);
  const void* const bias_data = bias.has_value() ? dense_bias.data_ptr() : nullptr;
  const int device = weight.get_device_index();
  const DeviceGuard guard(device);
  check_device_serves(device);
  const cudaStream_t stream = current_stream(device);
  Runner runner(p.storage, weight, stream);
  if (form == Form::fft) {
    check_fft(why_device_cannot(device, true));
    const char* refusal = run_fft_correlate(p, backward, dense.data_ptr(), bias_data, runner);
    return check_fft(refusal == nullptr ? "" : refusal);
  }
  if (form != Form::direct) {
    std::string refusal = why_no_tensor_cores(p, device);
    if (refusal.empty()) {
      const char* why = run_tensor_core_correlate(p, backward, dense.data_ptr(), bias_data, runner);
      if (why == nullptr) return;
      refusal = why;
    }
    check_form(form, refusal);
    Tensor taps = dense;  // held until the launch
    const auto in_order = [&](bool channels_in_lanes) {
      if (channels_in_lanes)
        taps = torch::stable::contiguous(torch::stable::transpose(dense, 0, 3));
      return static_cast<const float*>(taps.data_ptr());
    };
    if (served_in_float(p) &&
        run_float_correlate(p, backward, in_order, bias_data, runner) == nullptr)
      return;
  }
  if (backward)
    direct_backward_input(p, dense.data_ptr(), stream);
  else
    direct_forward(p, dense.data_ptr(), bias_data, stream);
}

}  // namespace

template <Form kForm>
Tensor depthwise_conv2d_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, bool channels_last) {
  ConvParams p = geometry(input, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  const int64_t height =
      (input.size(2) + padding[0] + padding[2] - dilation[0] * (p.kernel_h - 1) - 1) / stride[0] +
      1;
  const int64_t width =
      (input.size(3) + padding[1] + padding[3] - dilation[1] * (p.kernel_w - 1) - 1) / stride[1] +
      1;
  Tensor output = empty_map(input, p.batch, p.channels, height, width, channels_last);
  if (output.numel() == 0) return output;
  p.input = view_of(input);
  p.output = view_of(output);
  correlate(kForm, p, false, weight, bias);
  return output;
}

template <Form kForm>
Tensor depthwise_conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                                       const std::vector<int64_t>& input_size,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, bool channels_last) {
  ConvParams p = geometry(grad_output, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  Tensor grad_input =
      empty_map(grad_output, p.batch, p.channels, input_size[0], input_size[1], channels_last);
  if (grad_input.numel() == 0) return grad_input;
  p.output = view_of(grad_output);
  p.input = view_of(grad_input);
  correlate(kForm, p, true, weight, std::nullopt);
  return grad_input;
}

template <Form kForm>
std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight(const Tensor& grad_output,
                                                            const Tensor& input,
                                                            const std::vector<int64_t>& kernel_size,
                                                            const std::vector<int64_t>& stride,
                                                            const std::vector<int64_t>& padding,
                                                            const std::vector<int64_t>& dilation) {
  ConvParams p = geometry(input, kernel_size, stride, padding, dilation);
  Tensor grad_weight = empty(input, {p.channels, 1, p.kernel_h, p.kernel_w}, input.scalar_type());
  Tensor grad_bias = empty(input, {p.channels}, input.scalar_type());
  p.input = view_of(input);
  p.output = view_of(grad_output);
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  check_device_serves(device);
  const cudaStream_t stream = current_stream(device);
  Runner runner(p.storage, input, stream);
  void *const weight_data = grad_weight.data_ptr(), *const bias_data = grad_bias.data_ptr();
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const bool any = grad_output.numel() > 0;
  if (kForm == Form::fft && any) {
    check_fft(why_device_cannot(device, true));
    const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const char* refusal =
        run_fft_weight_gradient(p, multiprocessors, most_shared, weight_data, bias_data, runner);
    if (refusal == nullptr) return {grad_weight, grad_bias};
    // The forward pass may have been served, and only shared memory is missing.
    if (refusal != kSpectraDoNotFit) check_fft(refusal);
  }
  if (kForm != Form::direct && any) {
    std::string refusal = why_no_tensor_cores(p, device);
    if (refusal.empty()) {
      const char* why =
          run_tensor_core_weight_gradient(p, multiprocessors, weight_data, bias_data, runner);
      if (why == nullptr) return {grad_weight, grad_bias};
      refusal = why;
    }
    check_form(kForm, refusal);
    if (served_in_float(p) &&
        run_float_weight_gradient(p, multiprocessors, weight_data, bias_data, runner) == nullptr)
      return {grad_weight, grad_bias};
  }
  direct_backward_weight(p, weight_data, bias_data, stream);
  return {grad_weight, grad_bias};
}

#define LKA_INSTANTIATE(FORM)                                                                  \
  template Tensor depthwise_conv2d_forward<FORM>(                                              \
      const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::vector<int64_t>&, \
      const std::vector<int64_t>&, const std::vector<int64_t>&, bool);                         \
  template Tensor depthwise_conv2d_backward_input<FORM>(                                       \
      const Tensor&, const Tensor&, const std::vector<int64_t>&, const std::vector<int64_t>&,  \
      const std::vector<int64_t>&, const std::vector<int64_t>&, bool);                         \
  template std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight<FORM>(                  \
      const Tensor&, const Tensor&, const std::vector<int64_t>&, const std::vector<int64_t>&,  \
      const std::vector<int64_t>&, const std::vector<int64_t>&);
LKA_INSTANTIATE(Form::any)
LKA_INSTANTIATE(Form::direct)
LKA_INSTANTIATE(Form::fft)
LKA_INSTANTIATE(Form::implicit_gemm)
#undef LKA_INSTANTIATE

}  // namespace lka::cuda
