// PyTorch's own convolution, for the few calls that it serves faster than the kernels here.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../stable.h"

namespace lka::cpu {

inline Tensor aten_depthwise_forward(const Tensor& input, const Tensor& weight,
                                     const std::optional<Tensor>& bias,
                                     const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  const std::vector<int64_t> none = {0, 0};
  std::array<StableIValue, 9> stack = {from(input),  from(weight),  from(bias),
                                       from(stride), from(padding), from(dilation),
                                       from(false),  from(none),    from(input.size(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of the input only shape and layout matter.
inline Tensor aten_depthwise_backward_input(const Tensor& grad_output, const Tensor& like_input,
                                            const Tensor& weight,
                                            const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding,
                                            const std::vector<int64_t>& dilation) {
  using torch::stable::detail::from;
  const std::vector<int64_t> none = {0, 0};
  const std::optional<std::vector<int64_t>> no_bias;
  const bool wanted[3] = {true, false, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  std::array<StableIValue, 11> stack = {
      from(grad_output), from(like_input), from(weight), from(no_bias), from(stride),
      from(padding),     from(dilation),   from(false),  from(none),    from(grad_output.size(1)),
      from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  for (int i : {1, 2}) torch::stable::detail::to<Tensor>(stack[i]);  // undefined, but owned
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace lka::cpu
