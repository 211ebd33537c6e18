// The CUDA operators; schemas are in lka_kernels/ops.py. Form::any takes the tensor cores where
// they can serve a call; Form::implicit_gemm and Form::fft raise where they cannot.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../stable.h"

namespace lka::cuda {

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

}  // namespace lka::cuda
