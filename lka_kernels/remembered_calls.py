"""Calls of ``depthwise_conv2d`` that have passed the checks, so that a like call need not.

The checks and the choice of a backend touch much of Python's memory, which a large convolution has
just pushed out of the caches: there they were seen to take 0.1 ms, where they take 0.02 in a tight
loop. Looking a call up touches little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import dispatch

# key -> (stride, padding, dilation, channels_last, backend)
_CALLS: dict[tuple, tuple] = {}
_MOST_CALLS = 1024
_PLAIN = (Tensor, torch.nn.Parameter)


def key(input, weight, bias, stride, padding, dilation, method) -> tuple | None:
    """Everything that the checks and the choice of a backend look at, or None if they must run.

    They must for tensors other than plain ones on the CPU, under autocast, and while a call is
    being traced or transformed: what a tracer sees must not depend on earlier calls.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or dispatch.transformed():
        return None
    if torch._C._len_torch_dispatch_stack():  # make_fx, FakeTensorMode and the like
        return None
    if type(input) not in _PLAIN or type(weight) not in _PLAIN:
        return None
    if bias is not None and (type(bias) not in _PLAIN or not bias.is_cpu):
        return None
    if not (input.is_cpu and weight.is_cpu) or torch.is_autocast_enabled("cpu"):
        return None
    found = (
        input.shape,
        input.stride(),
        input.dtype,
        weight.shape,
        weight.stride(),
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        (stride, padding, dilation, method, dispatch.requested_backend()),
        # True and 1.0 equal 1, but are not accepted.
        _types(stride),
        _types(padding),
        _types(dilation),
    )
    try:
        hash(found)
    except TypeError:  # a list
        return None
    return found


def find(key: tuple | None) -> tuple | None:
    """(stride, padding, dilation, channels_last, backend) of a remembered call."""
    return None if key is None else _CALLS.get(key)


def remember(key: tuple, call: tuple) -> None:
    """Keep a call that passed the checks; the memory starts afresh when it is full."""
    if len(_CALLS) >= _MOST_CALLS:
        _CALLS.clear()
    _CALLS[key] = call


def forget_all() -> None:
    """Start afresh."""
    _CALLS.clear()


def _types(value) -> type | tuple[type, ...]:
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)
