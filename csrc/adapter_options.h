// Arguments of the adapter's operators, whatever device they run on: options by name, weights.
#pragma once

#include <optional>
#include <string>

#include "adapter_params.h"
#include "stable.h"

namespace lka {

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "none", "unknown activation ", name);
  return Activation::none;
}

inline PrefixMode prefix_mode_of(const std::string& name) {
  if (name == "skip") return PrefixMode::skip;
  if (name == "zero") return PrefixMode::zero;
  STD_TORCH_CHECK(name == "center_tap", "unknown prefix_mode ", name);
  return PrefixMode::center_tap;
}

// Weights as dense tensors of x's dtype.
struct AdapterWeights {
  Tensor down, down_bias, conv, conv_bias, up, up_bias;
  bool has_down_bias, has_conv_bias, has_up_bias;
};

inline AdapterWeights dense_weights(const Tensor& x, const Tensor& down,
                                    const std::optional<Tensor>& down_bias, const Tensor& conv,
                                    const std::optional<Tensor>& conv_bias, const Tensor& up,
                                    const std::optional<Tensor>& up_bias) {
  const int64_t dim = x.size(2), rank = down.size(0);
  STD_TORCH_CHECK(down.size(1) == dim && up.size(0) == dim && up.size(1) == rank &&
                      conv.size(0) == rank && conv.size(1) == 1,
                  "weights must be (r, C), (r, 1, kH, kW) and (C, r)");
  const auto dense = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "weights must have the dtype of x");
    return torch::stable::contiguous(t);
  };
  AdapterWeights w;
  w.down = dense(down);
  w.conv = dense(conv);
  w.up = dense(up);
  w.has_down_bias = down_bias.has_value();
  w.has_conv_bias = conv_bias.has_value();
  w.has_up_bias = up_bias.has_value();
  if (w.has_down_bias) w.down_bias = dense(*down_bias);
  if (w.has_conv_bias) w.conv_bias = dense(*conv_bias);
  if (w.has_up_bias) w.up_bias = dense(*up_bias);
  return w;
}

}  // namespace lka
