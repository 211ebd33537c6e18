// The CPU operators; schemas are in lka_kernels/ops.py.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../conv_params.h"
#include "../stable.h"

namespace lka::cpu {

template <Form kForm>
Tensor depthwise_conv2d_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, bool channels_last);

template <Form kForm>
Tensor depthwise_conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                                       const std::vector<int64_t>& input_size,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, bool channels_last);

template <Form kForm>
std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight(const Tensor& grad_output,
                                                            const Tensor& input,
                                                            const std::vector<int64_t>& kernel_size,
                                                            const std::vector<int64_t>& stride,
                                                            const std::vector<int64_t>& padding,
                                                            const std::vector<int64_t>& dilation);

// (grad_input, grad_weight, grad_bias): what the two operators give, faster where these would both
// transform grad_output.
template <Form kForm>
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, bool channels_last);

std::tuple<Tensor, Tensor, Tensor> large_kernel_adapter_forward(
    const Tensor& x, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    const Tensor& conv_weight, const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& seed, int64_t height, int64_t width, int64_t num_prefix_tokens,
    const std::string& prefix_mode, int64_t dilation, const std::string& activation,
    const std::string& activation_position, double dropout_p, double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_adapter_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& z, const Tensor& c,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const Tensor& conv_weight,
    const std::optional<Tensor>& conv_bias, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& seed, int64_t height,
    int64_t width, int64_t num_prefix_tokens, const std::string& prefix_mode, int64_t dilation,
    const std::string& activation, const std::string& activation_position, double dropout_p,
    double scale, bool residual_is_x, const std::vector<bool>& output_mask);

}  // namespace lka::cpu
