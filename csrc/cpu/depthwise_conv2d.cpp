// Launchers of depthwise convolution on the CPU: tensors to params, params to plans.
#include "../stable.h"
#include "depthwise_run.h"
#include "operators.h"
#include "sizes.h"

namespace lka::cpu {
namespace {

ConvParams geometry(const Tensor& map, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(
      stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
      "stride and dilation must be (height, width), padding (top, left, bottom, right)");
  ConvParams p;
  p.storage = storage_of(map, "input");
  p.batch = map.size(0);
  p.channels = map.size(1);
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[1];
  return p;
}

void check_weight(const Tensor& weight, const Tensor& map) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == map.size(1) && weight.size(1) == 1,
                  "weight must be (C, 1, kH, kW) with the channels of input");
  STD_TORCH_CHECK(weight.scalar_type() == map.scalar_type(), "weight must have input's dtype");
}

int64_t output_height(const ConvParams& p, const Tensor& input,
                      const std::vector<int64_t>& padding) {
  return output_extent(input.size(2), p.kernel_h, p.stride_h, padding[0], padding[2], p.dilation_h);
}

int64_t output_width(const ConvParams& p, const Tensor& input,
                     const std::vector<int64_t>& padding) {
  return output_extent(input.size(3), p.kernel_w, p.stride_w, padding[1], padding[3], p.dilation_w);
}

void check_grad_output(const Tensor& grad_output, const ConvParams& p, const Tensor& input,
                       const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(),
                  "grad_output must have input's dtype");
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.size(0) == p.batch &&
                      grad_output.size(1) == p.channels &&
                      grad_output.size(2) == output_height(p, input, padding) &&
                      grad_output.size(3) == output_width(p, input, padding),
                  "grad_output must have the shape of the output");
}

ConvParams forward_geometry(const Tensor& input, const Tensor& weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  check_weight(weight, input);
  ConvParams p = geometry(input, stride, padding, dilation);
  p.kernel_h = weight.size(2);
  p.kernel_w = weight.size(3);
  return p;
}

// The kernels read weights as dense (C, kH, kW).
Tensor dense_weight(const Tensor& weight) {
  const int64_t kh = weight.size(2), kw = weight.size(3);
  const bool dense = (kw == 1 || weight.stride(3) == 1) && (kh == 1 || weight.stride(2) == kw) &&
                     (weight.size(0) == 1 || weight.stride(0) == kh * kw);
  return dense ? weight : torch::stable::contiguous(weight);
}

void run(PlannedConvolution& planned, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor dense = dense_weight(weight);
  Tensor dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);
  run(planned, dense.data_ptr(), bias.has_value() ? dense_bias.data_ptr() : nullptr);
}

}  // namespace

template <Form kForm>
Tensor depthwise_conv2d_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, bool channels_last) {
  ConvParams p = forward_geometry(input, weight, stride, padding, dilation);
  p.form = kForm;
  Tensor output = empty_map(input, p.batch, p.channels, output_height(p, input, padding),
                            output_width(p, input, padding), channels_last);
  if (output.numel() == 0) return output;
  p.input = view_of(input);
  p.output = view_of(output);
  PlannedConvolution planned = plan_forward(p, int(torch::stable::get_num_threads()));
  run(planned, weight, bias);
  return output;
}

template <Form kForm>
Tensor depthwise_conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                                       const std::vector<int64_t>& input_size,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, bool channels_last) {
  check_weight(weight, grad_output);
  ConvParams p = geometry(grad_output, stride, padding, dilation);
  p.form = kForm;
  p.kernel_h = weight.size(2);
  p.kernel_w = weight.size(3);
  Tensor grad_input =
      empty_map(grad_output, p.batch, p.channels, input_size[0], input_size[1], channels_last);
  if (grad_input.numel() == 0) return grad_input;
  p.output = view_of(grad_output);
  p.input = view_of(grad_input);
  PlannedConvolution planned = plan_backward_input(p, int(torch::stable::get_num_threads()));
  run(planned, weight, std::nullopt);
  return grad_input;
}

template <Form kForm>
std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight(const Tensor& grad_output,
                                                            const Tensor& input,
                                                            const std::vector<int64_t>& kernel_size,
                                                            const std::vector<int64_t>& stride,
                                                            const std::vector<int64_t>& padding,
                                                            const std::vector<int64_t>& dilation) {
  ConvParams p = geometry(input, stride, padding, dilation);
  p.form = kForm;
  p.kernel_h = kernel_size[0];
  p.kernel_w = kernel_size[1];
  check_grad_output(grad_output, p, input, padding);
  Tensor grad_weight = empty(input, {p.channels, 1, p.kernel_h, p.kernel_w}, input.scalar_type());
  Tensor grad_bias = empty(input, {p.channels}, input.scalar_type());
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_weight, grad_bias};
  }
  p.input = view_of(input);
  p.output = view_of(grad_output);
  PlannedWeightGradient planned = plan_backward_weight(p);
  run(planned, grad_weight.data_ptr(), grad_bias.data_ptr());
  return {grad_weight, grad_bias};
}

template <Form kForm>
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, bool channels_last) {
  if (grad_output.numel() == 0 || input.numel() == 0) {
    const auto [grad_weight, grad_bias] = depthwise_conv2d_backward_weight<kForm>(
        grad_output, input, {weight.size(2), weight.size(3)}, stride, padding, dilation);
    return {
        depthwise_conv2d_backward_input<kForm>(grad_output, weight, {input.size(2), input.size(3)},
                                               stride, padding, dilation, channels_last),
        grad_weight, grad_bias};
  }
  ConvParams p = forward_geometry(input, weight, stride, padding, dilation);
  p.form = kForm;
  check_grad_output(grad_output, p, input, padding);
  Tensor grad_input =
      empty_map(grad_output, p.batch, p.channels, input.size(2), input.size(3), channels_last);
  Tensor grad_weight = empty(input, {p.channels, 1, p.kernel_h, p.kernel_w}, input.scalar_type());
  Tensor grad_bias = empty(input, {p.channels}, input.scalar_type());
  p.output = view_of(grad_output);
  p.input = view_of(input);
  PlannedWeightGradient planned_weight = plan_backward_weight(p);
  p.input = view_of(grad_input);
  PlannedConvolution planned = plan_backward_input(p, int(torch::stable::get_num_threads()));
  const Tensor dense = dense_weight(weight);
  run(planned, planned_weight, dense.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr());
  return {grad_input, grad_weight, grad_bias};
}

#define LKA_INSTANTIATE(form)                                                                  \
  template Tensor depthwise_conv2d_forward<form>(                                              \
      const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::vector<int64_t>&, \
      const std::vector<int64_t>&, const std::vector<int64_t>&, bool);                         \
  template Tensor depthwise_conv2d_backward_input<form>(                                       \
      const Tensor&, const Tensor&, const std::vector<int64_t>&, const std::vector<int64_t>&,  \
      const std::vector<int64_t>&, const std::vector<int64_t>&, bool);                         \
  template std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight<form>(                  \
      const Tensor&, const Tensor&, const std::vector<int64_t>&, const std::vector<int64_t>&,  \
      const std::vector<int64_t>&, const std::vector<int64_t>&);                               \
  template std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward<form>(                 \
      const Tensor&, const Tensor&, const Tensor&, const std::vector<int64_t>&,                \
      const std::vector<int64_t>&, const std::vector<int64_t>&, bool);
LKA_INSTANTIATE(Form::any)
LKA_INSTANTIATE(Form::direct)
LKA_INSTANTIATE(Form::fft)
#undef LKA_INSTANTIATE

}  // namespace lka::cpu
