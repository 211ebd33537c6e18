"""The specification: both operators in plain PyTorch, one line per step of the definition.

Every other backend is tested against this file. It is differentiable any number of times, runs
wherever PyTorch runs, and is what an install without compiled kernels falls back to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lka_kernels import philox
from lka_kernels.checks import same_padding


def depthwise_conv2d(input, weight, bias, stride, padding, dilation) -> Tensor:
    """``F.conv2d`` with one group per input channel; ``padding`` is (top, left, bottom, right)."""
    top, left, bottom, right = padding
    if (top, left) != (bottom, right):
        # F.conv2d takes symmetric numbers only; uneven padding arises from "same", even kernels.
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    return F.conv2d(input, weight, bias, stride, (top, left), dilation, input.shape[1])


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation named as in ``large_kernel_adapter``."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return x


def center_tap_index(kernel_size, dilation: int) -> tuple[int, int] | None:
    """Row and column of the tap that a 1×1 image meets under "same" padding, or None if none does.

    With an even kernel and a dilation above 1 the padding falls between two taps.
    """
    before = [same_padding(size, dilation)[0] for size in kernel_size]
    if any(b % dilation for b in before):
        return None
    return before[0] // dilation, before[1] // dilation


def center_tap(conv_weight: Tensor, dilation: int) -> Tensor | None:
    """The weights (r,) of ``center_tap_index``."""
    index = center_tap_index(conv_weight.shape[2:], dilation)
    return None if index is None else conv_weight[:, 0, index[0], index[1]]


def convolve_tokens(
    a: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    prefix_mode: str,
    dilation: int,
) -> Tensor:
    """Depthwise "same" convolution of tokens (B, P+N, r) over their H×W grid."""
    height, width = grid_size
    prefix, grid = a[:, :num_prefix_tokens], a[:, num_prefix_tokens:]
    image = grid.transpose(1, 2).unflatten(2, (height, width))
    image = F.conv2d(
        image, conv_weight, conv_bias, padding="same", dilation=dilation, groups=a.shape[2]
    )
    grid = image.flatten(2).transpose(1, 2)
    if num_prefix_tokens == 0:
        return grid
    if prefix_mode == "center_tap":
        tap = center_tap(conv_weight, dilation)
        prefix = prefix * (0 if tap is None else tap)
        if conv_bias is not None:
            prefix = prefix + conv_bias
    # "skip" leaves the prefix as it is; "zero" is applied to the adapter's output.
    return torch.cat([prefix, grid], dim=1)


def large_kernel_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    prefix_mode: str,
    dilation: int,
    activation: str,
    activation_position: str,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """The adapter on tokens ``x`` (B, P+N, C); ``seed`` (1,) int64 selects the dropout stream."""
    z = F.linear(x, down_weight, down_bias)
    a = activate(z, activation) if activation_position in ("pre", "both") else z
    c = convolve_tokens(
        a, conv_weight, conv_bias, grid_size, num_prefix_tokens, prefix_mode, dilation
    )
    e = activate(c, activation) if activation_position in ("post", "both") else c
    if seed is not None and dropout_p > 0:
        e = e * philox.dropout_multiplier(seed, e.shape, dropout_p).to(e.dtype)
    y = F.linear(e, up_weight, up_bias)
    if num_prefix_tokens and prefix_mode == "zero":
        y = torch.cat([torch.zeros_like(y[:, :num_prefix_tokens]), y[:, num_prefix_tokens:]], dim=1)
    if scale != 1.0:
        y = y * scale
    return y if residual is None else residual + y
