"""Calls of the two operators that have passed the checks, so that a like call need not.

The checks and the choice of a backend touch much of Python's memory, which a large convolution has
just pushed out of the caches: there they were seen to take 0.1 ms, where they take 0.02 in a tight
loop. Looking a call up touches little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import dispatch

# key -> what the operator needs beside the arguments, in normal form.
_CALLS: dict[tuple, tuple] = {}
_MOST_CALLS = 1024
_PLAIN = (Tensor, torch.nn.Parameter)


def depthwise_key(input, weight, bias, stride, padding, dilation, method) -> tuple | None:
    """Everything that the checks and the choice of a backend look at, or None if they must run."""
    if not _ordinary() or not (_plain(input) and _plain(weight)):
        return None
    if bias is not None and not _plain(bias):
        return None
    return _hashable(
        (
            input.shape,
            input.stride(),
            input.dtype,
            weight.shape,
            weight.stride(),
            weight.dtype,
            None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
            input.get_device(),
            weight.get_device(),
            _autocast_dtype(input),
            (stride, padding, dilation, method, dispatch.requested_backend()),
            # True and 1.0 equal 1, but are not accepted.
            _types(stride),
            _types(padding),
            _types(dilation),
        )
    )


def adapter_key(tensors: tuple[Tensor | None, ...], options: tuple) -> tuple | None:
    """The same for ``large_kernel_adapter``, whose checks look at no strides."""
    if not _ordinary() or not _plain(tensors[0]):
        return None
    found = ["adapter", dispatch.requested_backend(), options, _autocast_dtype(tensors[0])]
    for option in options:
        found.append(_types(option))
    for t in tensors:
        if t is None:
            found.append(None)
        elif _plain(t):
            found.append(t.shape)
            found.append(t.dtype)
            found.append(t.get_device())
        else:
            return None
    return _hashable(tuple(found))


def _ordinary() -> bool:
    """Whether a call may be remembered.

    Not while it is being traced or transformed: what a tracer sees must not depend on earlier
    calls.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or dispatch.transformed()
        or torch._C._len_torch_dispatch_stack()  # make_fx, FakeTensorMode and the like
    )


def _autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast casts to on the device of ``t``, or None where it is off."""
    device = "cuda" if t.is_cuda else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _plain(t) -> bool:
    return type(t) in _PLAIN and (t.is_cpu or t.is_cuda) and t.layout is torch.strided


def _hashable(key: tuple) -> tuple | None:
    try:
        hash(key)
    except TypeError:  # a list among the arguments
        return None
    return key


def find(key: tuple | None) -> tuple | None:
    """What was remembered of a call."""
    return None if key is None else _CALLS.get(key)


def remember(key: tuple, call: tuple) -> None:
    """Keep a call that passed the checks; the memory starts afresh when it is full.

    Not one whose stride or the like is a tensor, which is found by what it is, not by its value.
    """
    if _holds_tensor(key):
        return
    if len(_CALLS) >= _MOST_CALLS:
        _CALLS.clear()
    _CALLS[key] = call


def forget_all() -> None:
    """Start afresh."""
    _CALLS.clear()


def _holds_tensor(value) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple) and any(map(_holds_tensor, value))
    )


def _types(value) -> type | tuple[type, ...]:
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)
