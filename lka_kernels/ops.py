"""Operator schemas and fakes, the same for every backend.

Schemas are defined here rather than in C++, so that an install without the compiled extension has
every operator and torch.export or torch.compile sees the same names everywhere. The compiled
library only adds implementations.

Names: ``lka_kernels::<operator>_<direction>_<backend>``. Padding is (top, left, bottom, right),
because "same" padding of an even kernel is uneven. ``channels_last`` is the memory format of the
result; inputs may have any strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels.checks import depthwise_output_size

LIBRARY = torch.library.Library("lka_kernels", "FRAGMENT")

_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation, bool channels_last"
DEPTHWISE_SCHEMAS = {
    "forward": f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    "backward_input": (
        f"(Tensor grad_output, Tensor weight, SymInt[2] input_size, {_GEOMETRY}) -> Tensor"
    ),
    # One pass over grad_output serves weight and bias; padding comes before any other geometry.
    "backward_weight": (
        "(Tensor grad_output, Tensor input, int[2] kernel_size, int[2] stride, int[4] padding, "
        "int[2] dilation) -> (Tensor grad_weight, Tensor grad_bias)"
    ),
}
# Of backends for which all gradients together are less work than one after the other.
BOTH_SCHEMAS = {
    **DEPTHWISE_SCHEMAS,
    "backward": (
        f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
}
_ADAPTER_WEIGHTS = (
    "Tensor down_weight, Tensor? down_bias, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor up_weight, Tensor? up_bias"
)
_ADAPTER_OPTIONS = (
    "Tensor? seed, SymInt height, SymInt width, int num_prefix_tokens, str prefix_mode, "
    "int dilation, str activation, str activation_position, float dropout_p, float scale"
)
ADAPTER_SCHEMAS = {
    # z is the output of the down-projection and c that of the convolution: all that the backward
    # pass needs beside x and the weights. See the fakes for their shapes and dtypes.
    "forward": (
        f"(Tensor x, {_ADAPTER_WEIGHTS}, Tensor? residual, {_ADAPTER_OPTIONS}) "
        "-> (Tensor y, Tensor z, Tensor c)"
    ),
    # residual_is_x: grad_output is part of x's gradient. output_mask follows the order of the
    # results; a result not asked for has no elements.
    "backward": (
        f"(Tensor grad_output, Tensor x, Tensor z, Tensor c, {_ADAPTER_WEIGHTS}, "
        f"{_ADAPTER_OPTIONS}, bool residual_is_x, bool[7] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


class DepthwiseOps(NamedTuple):
    """The operators that one backend needs to serve ``depthwise_conv2d``."""

    forward: object
    backward_input: object
    backward_weight: object
    backward: object | None = None  # both


class AdapterOps(NamedTuple):
    """The operators that one backend needs to serve ``large_kernel_adapter``."""

    forward: object
    backward: object


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(channels_last: bool) -> torch.memory_format:
    """The torch memory format of a flag ``channels_last``."""
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake_depthwise_forward(
    input, weight, bias, stride, padding, dilation, channels_last
) -> Tensor:
    height, width = depthwise_output_size(
        input.shape[2:], weight.shape[2:], stride, padding, dilation
    )
    return torch.empty(
        (input.shape[0], input.shape[1], height, width),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(channels_last),
    )


def _fake_depthwise_backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last
) -> Tensor:
    return torch.empty(
        (*grad_output.shape[:2], *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format(channels_last),
    )


def _fake_depthwise_backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    channels = input.shape[1]
    return input.new_empty((channels, 1, *kernel_size)), input.new_empty((channels,))


def _fake_depthwise_backward(
    grad_output, input, weight, stride, padding, dilation, channels_last
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = (stride, padding, dilation)
    return (
        _fake_depthwise_backward_input(
            grad_output, weight, input.shape[2:], *geometry, channels_last
        ),
        *_fake_depthwise_backward_weight(grad_output, input, weight.shape[2:], *geometry),
    )


def _fake_adapter_forward(x, down_weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], down_weight.shape[0])
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype),
    )


def _fake_gpu_adapter_forward(x, down_weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    # Channel-major, in the dtype of x; y follows the strides of x, so that a map with channels
    # first needs no copy.
    shape = (x.shape[0], down_weight.shape[0], x.shape[1])
    return torch.empty_like(x), x.new_empty(shape), x.new_empty(shape)


def _fake_adapter_backward(
    grad_output,
    x,
    z,
    c,
    down_weight,
    down_bias,
    conv_weight,
    conv_bias,
    up_weight,
    up_bias,
    *options,
) -> tuple[Tensor, ...]:
    output_mask = options[-1]
    r, dim = down_weight.shape
    shapes = (x.shape, (r, dim), (r,), conv_weight.shape, (r,), (dim, r), (dim,))
    return tuple(
        x.new_empty(shape if asked else (0,))
        for shape, asked in zip(shapes, output_mask, strict=True)
    )


def _fake_gpu_adapter_backward(grad_output, x, *rest) -> tuple[Tensor, ...]:
    grad_x, *others = _fake_adapter_backward(grad_output, x, *rest)
    return torch.empty_like(x) if rest[-1][0] else grad_x, *others


_DEPTHWISE_FAKES = {
    "forward": _fake_depthwise_forward,
    "backward_input": _fake_depthwise_backward_input,
    "backward_weight": _fake_depthwise_backward_weight,
    "backward": _fake_depthwise_backward,
}
_GPU_ADAPTER_FAKES = {
    "forward": _fake_gpu_adapter_forward,
    "backward": _fake_gpu_adapter_backward,
}
_ADAPTER_FAKES = {
    "cpu": {"forward": _fake_adapter_forward, "backward": _fake_adapter_backward},
    "triton": _GPU_ADAPTER_FAKES,
    "cuda": _GPU_ADAPTER_FAKES,
    "gpu": _GPU_ADAPTER_FAKES,
}


def _define(operator: str, backend: str, schemas: dict, fakes: dict) -> list:
    overloads = []
    for direction, schema in schemas.items():
        name = f"{operator}_{direction}_{backend}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lka_kernels::{name}", fakes[direction], lib=LIBRARY)
        overloads.append(getattr(torch.ops.lka_kernels, name).default)
    return overloads


_CPU = ("cpu", "cpu_direct", "cpu_fft")
# Family -> operators; see ``dispatch.Choice.family``. "fft" runs on any device, "gpu" chooses by
# sizes among the families of GPUs and PyTorch, and "gpu_fft" among transforms. The other backends
# have one family more for each method that can be asked for.
DEPTHWISE: dict[str, DepthwiseOps] = {
    name: DepthwiseOps(
        *_define(
            "depthwise_conv2d",
            name,
            BOTH_SCHEMAS if name in _CPU else DEPTHWISE_SCHEMAS,
            _DEPTHWISE_FAKES,
        )
    )
    for name in (
        *(*_CPU, "fft"),
        *("cuda", "cuda_direct", "cuda_gemm", "cuda_fft"),
        *("triton", "triton_direct", "triton_gemm", "triton_fft"),
        *("gpu", "gpu_fft"),
    )
}
ADAPTER: dict[str, AdapterOps] = {
    name: AdapterOps(*_define("large_kernel_adapter", name, ADAPTER_SCHEMAS, fakes))
    for name, fakes in _ADAPTER_FAKES.items()
}
