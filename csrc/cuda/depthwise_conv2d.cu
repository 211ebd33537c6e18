// The CUDA operators of depthwise convolution: which kernel serves a call, and its arguments.
#include "../stable.h"
#include "depthwise_fft.h"
#include "depthwise_launchers.h"
#include "launch.h"
#include "operators.h"

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

const char* why_too_old(int device) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 8
             ? "the device is older than compute capability 8.0"
             : nullptr;
}

// Why no kernel for tensor cores can serve a call, whatever its sizes; nullptr if one may.
const char* why_no_tensor_cores(const ConvParams& p, int device) {
  if (p.storage != Storage::float16 && p.storage != Storage::bfloat16)
    return "tensor cores take float16 and bfloat16";
  if (p.stride_h != 1 || p.stride_w != 1) return "it serves stride 1";
  return why_too_old(device);
}

void check_form(Form form, const char* refusal) {
  STD_TORCH_CHECK(form != Form::implicit_gemm,
                  "method='implicit_gemm' of the cuda backend cannot serve this call: ", refusal,
                  "; use 'auto' or 'direct'");
}

// Whether the register-blocked kernel in float32 could serve the call.
bool correlate_in_float(const ConvParams& p, bool backward, const Tensor& weight, const void* bias,
                        cudaStream_t stream) {
  if (p.storage != Storage::float32 || p.stride_h != 1 || p.stride_w != 1) return false;
  FloatCorrelateParams params;
  const Plan plan = plan_float_correlate(correlation_of(p, backward), params);
  if (plan.refusal != nullptr) return false;
  Tensor taps = weight;
  if (params.channels_in_lanes)
    taps = torch::stable::contiguous(torch::stable::transpose(weight, 0, 3));
  params.weight = static_cast<const float*>(taps.data_ptr());
  params.bias = static_cast<const float*>(bias);
  float_correlate(params, plan.shape, stream);
  return true;
}

void check_fft(const char* refusal) {
  STD_TORCH_CHECK(refusal == nullptr,
                  "method='fft' of the cuda backend cannot serve this call: ", refusal,
                  "; use_backend('auto') serves it by torch.fft");
}

// Room for the spectra of `planes` planes, which `p` is told of.
Tensor empty_spectra(const Tensor& like, int64_t planes, FftParams& p) {
  const int64_t numbers = int64_t(p.geometry.x.size / 2 + 1) * p.geometry.y.size;
  Tensor spectra = empty(like, {planes, numbers, 2}, ScalarType::Float);
  p.spectra = static_cast<Complex*>(spectra.data_ptr());
  return spectra;
}

void correlate_by_transforms(const ConvParams& p, bool backward, const Tensor& weight,
                             const void* bias, int device, cudaStream_t stream) {
  check_fft(why_too_old(device));
  FftSpectraParams transform;
  const Plan transform_plan = plan_fft_spectra(p, transform);
  check_fft(transform_plan.refusal);
  FftCorrelateParams params;
  const Plan plan = plan_fft_correlate(p, backward, params);
  check_fft(plan.refusal);
  const Tensor spectra = empty_spectra(weight, p.channels, transform);
  transform.taps.data = weight.data_ptr();
  fft_spectra(transform, transform_plan.shape, stream);
  params.spectra = transform.spectra;
  params.bias = bias;
  fft_correlate(p.storage, params, plan.shape, stream);
}

// False where the forward pass may have been served and only shared memory is missing.
bool weight_gradient_by_transforms(const ConvParams& p, int device, const Tensor& grad_weight,
                                   const Tensor& grad_bias, cudaStream_t stream) {
  check_fft(why_too_old(device));
  FftWeightGradientParams params;
  const Plan plan = plan_fft_weight_gradient(
      p, device_attribute(cudaDevAttrMultiProcessorCount, device),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), params);
  if (plan.refusal == kSpectraDoNotFit) return false;
  check_fft(plan.refusal);
  const Tensor sums = empty_spectra(grad_weight, params.groups * p.channels, params);
  const Tensor bias_sums = empty(grad_weight, {params.groups, p.channels}, ScalarType::Float);
  params.bias_sums = static_cast<float*>(bias_sums.data_ptr());
  FftTapGradientParams last;
  const Plan last_plan = plan_fft_tap_gradient(p, params, last);
  check_fft(last_plan.refusal);
  last.taps.data = grad_weight.data_ptr();
  last.grad_bias = grad_bias.data_ptr();
  fft_weight_gradient(p.storage, params, plan.shape, stream);
  fft_tap_gradient(last, last_plan.shape, stream);
  return true;
}

void correlate(Form form, const ConvParams& p, bool backward, const Tensor& weight,
               const std::optional<Tensor>& bias) {
  const Tensor dense = torch::stable::contiguous(weight);
  Tensor dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);
  const void* const bias_data = bias.has_value() ? dense_bias.data_ptr() : nullptr;
  const int device = weight.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (form == Form::fft)
    return correlate_by_transforms(p, backward, dense, bias_data, device, stream);
  if (form != Form::direct) {
    const char* refusal = why_no_tensor_cores(p, device);
    if (refusal == nullptr) {
      CorrelateParams params;
      const Plan plan = plan_correlate(correlation_of(p, backward), params);
      if (plan.refusal == nullptr) {
        params.weight = dense.data_ptr();
        params.bias = bias_data;
        return toeplitz_correlate(p.storage, params, plan.shape, stream);
      }
      refusal = plan.refusal;
    }
    check_form(form, refusal);
    if (correlate_in_float(p, backward, dense, bias_data, stream)) return;
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
  const cudaStream_t stream = current_stream(device);
  if (kForm == Form::fft && grad_output.numel() > 0 &&
      weight_gradient_by_transforms(p, device, grad_weight, grad_bias, stream))
    return {grad_weight, grad_bias};
  if (kForm != Form::direct && grad_output.numel() > 0) {
    const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const auto partials = [&](int64_t groups) {
      return empty(input, {groups, p.channels, p.kernel_h * p.kernel_w + 1}, ScalarType::Float);
    };
    const char* refusal = why_no_tensor_cores(p, device);
    if (refusal == nullptr) {
      WeightGradientParams params;
      const Plan plan = plan_weight_gradient(p, multiprocessors, params);
      if (plan.refusal == nullptr) {
        const Tensor sums = partials(params.groups);
        params.partials = static_cast<float*>(sums.data_ptr());
        toeplitz_weight_gradient(p.storage, params, plan.shape, grad_weight.data_ptr(),
                                 grad_bias.data_ptr(), stream);
        return {grad_weight, grad_bias};
      }
      refusal = plan.refusal;
    }
    check_form(kForm, refusal);
    FloatWeightGradientParams params;
    if (p.storage == Storage::float32 && p.stride_h == 1 && p.stride_w == 1) {
      const Plan plan = plan_float_weight_gradient(p, multiprocessors, params);
      if (plan.refusal == nullptr) {
        const Tensor sums = partials(params.groups);
        params.partials = static_cast<float*>(sums.data_ptr());
        float_weight_gradient(params, plan.shape, grad_weight.data_ptr(), grad_bias.data_ptr(),
                              stream);
        return {grad_weight, grad_bias};
      }
    }
  }
  direct_backward_weight(p, grad_weight.data_ptr(), grad_bias.data_ptr(), stream);
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
