"""Argument checks of the public functions: clear errors before any kernel runs.

ValueError for shapes and values, TypeError for types. Each message names the argument, what was
given and what is accepted.
"""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor

METHODS = ("auto", "direct", "implicit_gemm", "fft")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "none")
ACTIVATION_POSITIONS = ("pre", "post", "both")
PREFIX_MODES = ("center_tap", "skip", "zero")
INITS = ("zero", "identity", "paper")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def one_of(name: str, value, accepted) -> None:
    """Raise ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        choices = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def is_tensor(name: str, value, layouts=(torch.strided,)) -> None:
    """Raise TypeError unless ``value`` is a Tensor of one of ``layouts``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if value.layout not in layouts:
        accepted = " or ".join(map(str, layouts))
        raise TypeError(f"{name} must have layout {accepted}; got {value.layout}")


def is_int(value) -> bool:
    """True for int and SymInt, False for bool and everything else."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def as_int(value) -> int | torch.SymInt | None:
    """``value`` as the integer that it is to ``F.conv2d``, NumPy's and tensors included, or None.

    A SymInt stays one: as an int it would be a constant of the graph.
    """
    if is_int(value):
        return value
    if isinstance(value, (bool, tuple, list, str)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_number(name: str, value) -> None:
    """Raise TypeError unless ``value`` is a real number, symbolic ones included."""
    accepted = (numbers.Real, torch.SymInt, torch.SymFloat)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def probability(name: str, value) -> None:
    """Raise unless ``value`` is a number in [0, 1]."""
    is_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]; got {value}")


def adapter_options(
    num_prefix_tokens, prefix_mode, dilation, activation, activation_position, scale
) -> None:
    """Raise for what ``large_kernel_adapter`` and its modules refuse of these, whatever x is."""
    if not is_int(num_prefix_tokens):
        raise TypeError(f"num_prefix_tokens must be an int; got {num_prefix_tokens!r}")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must not be negative; got {num_prefix_tokens}")
    one_of("prefix_mode", prefix_mode, PREFIX_MODES)
    one_of("activation", activation, ACTIVATIONS)
    one_of("activation_position", activation_position, ACTIVATION_POSITIONS)
    if not is_int(dilation):
        raise TypeError(f"dilation must be an int; got {dilation!r}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")
    is_number("scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite; got {scale}")


def pair(name: str, value, *, minimum: int) -> tuple[int, int]:
    """Return (height, width) from an int or a pair of ints, each at least ``minimum``."""
    several = isinstance(value, (tuple, list)) and len(value) in (1, 2)
    height, width = (as_int(value[0]), as_int(value[-1])) if several else (as_int(value),) * 2
    if height is None or width is None:
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    if height < minimum or width < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value!r}")
    return height, width


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Padding (before, after) of one dimension for ``padding="same"``.

    An odd total puts the extra element after, as ``torch.nn.functional.conv2d`` does.
    """
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def padding_tlbr(padding, stride, dilation, kernel_size) -> tuple[int, int, int, int]:
    """Return padding as (top, left, bottom, right) from an int, a pair, "same" or "valid"."""
    if isinstance(padding, str):
        one_of("padding", padding, ("same", "valid"))
        if padding == "valid":
            return (0, 0, 0, 0)
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1; got stride={stride}")
        top, bottom = same_padding(kernel_size[0], dilation[0])
        left, right = same_padding(kernel_size[1], dilation[1])
        return top, left, bottom, right
    height, width = pair("padding", padding, minimum=0)
    return height, width, height, width


def dtypes_and_devices_agree(first_name: str, first: Tensor, others) -> None:
    """Raise unless every (name, tensor) of ``others`` has the dtype and device of ``first``."""
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({first.dtype}); got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name} ({first.device}); "
                f"got {tensor.device}"
            )


def depthwise_output_size(input_size, kernel_size, stride, padding, dilation):
    """Output (height, width) of a convolution; ``padding`` is (top, left, bottom, right)."""
    return tuple(
        (input_size[i] + padding[i] + padding[i + 2] - dilation[i] * (kernel_size[i] - 1) - 1)
        // stride[i]
        + 1
        for i in (0, 1)
    )
