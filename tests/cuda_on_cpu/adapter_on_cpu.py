"""The adapter's kernels built for the CPU, called on torch tensors as the operators call them."""

from __future__ import annotations

import ctypes

import on_cpu
import torch
from torch import Tensor

from lka_kernels.checks import ACTIVATIONS

PREFIX_MODES = ("center_tap", "skip", "zero")
_ADDRESS = 1024  # of tensors without memory
LAUNCHES = {
    False: ("down", "narrow_down", "correlate", "dense", "planes", "up", "narrow_up"),
    True: (
        *(
            "narrow_up",
            "up",
            "up_weight",
            "correlate",
            "dense",
            "planes",
            "convolve",
            "taps",
            "plane_taps",
        ),
        *("narrow_down", "down", "down_weight"),
    ),
}


class TokenTensor(ctypes.Structure):
    """``lka::cuda::TokenTensor``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"stride_{name}", ctypes.c_int64) for name in "btc"),
        ("vector", ctypes.c_int32),
        ("turned", ctypes.c_bool),
    ]

    @classmethod
    def of(cls, t: Tensor | None) -> TokenTensor:
        return cls() if t is None else cls(t.data_ptr(), *t.stride())


_FLAGS = (
    *("activate_before", "activate_behind"),
    *("need_grad_x", "need_down", "need_conv", "need_up", "residual_is_x"),
)
_SIZES = (
    *("batch", "tokens", "channels", "rank", "prefix", "height", "width"),
    *("kernel_h", "kernel_w", "dilation"),
)
_WEIGHTS = ("down_weight", "down_bias", "conv_weight", "conv_bias", "up_weight", "up_bias")
_TOKENS = ("x", "y", "residual", "grad_output", "grad_x")
_RANK = ("z", "a", "c", "grad_c", "grad_z")


class AdapterCall(ctypes.Structure):
    """``lka::cuda::AdapterCall``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("storage", "activation", "prefix_mode")),
        *((name, ctypes.c_bool) for name in _FLAGS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("dropout_p", "scale")),
        ("seed", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _WEIGHTS),
        *((name, TokenTensor) for name in _TOKENS),
        *((name, ctypes.c_void_p) for name in _RANK),
    ]

    def set(self, **tensors: Tensor | None) -> AdapterCall:
        """Point to tensors, which must outlive the call."""
        for name, t in tensors.items():
            pointer = None if t is None else t.data_ptr()
            setattr(self, name, TokenTensor.of(t) if name in _TOKENS else pointer)
        return self


def describe(x: Tensor, weights, seed: Tensor | None, *options) -> AdapterCall:
    """The arguments that both operators share, in their order."""
    height, width, prefix, mode, dilation, activation, position, dropout_p, scale = options
    call = AdapterCall(
        storage=on_cpu.STORAGE[x.dtype],
        activation=ACTIVATIONS.index(activation),
        prefix_mode=PREFIX_MODES.index(mode),
        activate_before=position != "post",
        activate_behind=position != "pre",
        dropout_p=dropout_p,
        scale=scale,
    )
    rank, _, kernel_h, kernel_w = weights[2].shape
    sizes = (*x.shape, rank, prefix, height, width, kernel_h, kernel_w, dilation)
    for name, size in zip(_SIZES, sizes, strict=True):
        setattr(call, name, size)
    return call.set(x=x, seed=seed, **dict(zip(_WEIGHTS, weights, strict=True)))


def _run(name: str, *arguments) -> None:
    function = getattr(on_cpu.library("adapter_kernels.cpp"), name)
    function.restype = ctypes.c_char_p
    message = function(*arguments)
    if message:
        raise RuntimeError(message.decode())


def _junk(t: Tensor) -> Tensor:
    return torch.full_like(t, torch.nan)


def forward(x, weights, residual, seed, *options, multiprocessors: int = 4):
    """The operator ``large_kernel_adapter_forward_cuda``; results start as NaN."""
    call = describe(x, weights, seed, *options)
    y = _junk(x)
    z = torch.full((x.shape[0], call.rank, x.shape[1]), torch.nan, dtype=x.dtype)
    c = z.clone()
    call.set(y=y, residual=residual, z=z, c=c)
    _run("adapter_forward", ctypes.byref(call), multiprocessors)
    return y, z, c


def backward(
    grad_output, x, z, c, weights, seed, *options, residual_is_x, mask, multiprocessors: int = 4
):
    """The operator ``large_kernel_adapter_backward_cuda``; None for what is not asked for."""
    call = describe(x, weights, seed, *options)
    call.residual_is_x = residual_is_x
    call.need_grad_x = mask[0]
    call.need_down, call.need_conv, call.need_up = any(mask[1:3]), any(mask[3:5]), any(mask[5:])
    like = (weights[0], weights[0][:, 0], weights[2], weights[2][:, 0, 0, 0], weights[4])
    like = [t.contiguous() for t in (*like, weights[4][:, 0])]
    grads = [_junk(t) if asked else None for t, asked in zip(like, mask[1:], strict=True)]
    grad_x = _junk(x) if mask[0] else None
    call.set(grad_output=grad_output, grad_x=grad_x, z=z, c=c)
    pointers = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in grads))
    _run("adapter_backward", ctypes.byref(call), multiprocessors, ctypes.byref(pointers))
    return [grad_x, *grads]


def without_memory(case, dtype: torch.dtype) -> AdapterCall:
    """An ``AdapterCase`` of contiguous tokens that asks for all gradients, at an address."""
    tokens = case.prefix + case.grid[0] * case.grid[1]
    x = torch.empty(case.batch, tokens, case.dim, dtype=dtype, device="meta")
    shapes = ((case.r, case.dim), (case.r, 1, *case.kernel), (case.dim, case.r))
    down, conv, up = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    options = (
        *(*case.grid, case.prefix, case.prefix_mode, case.dilation),
        *(case.activation, case.position, case.dropout, case.scale),
    )
    call = describe(x, (down, None, conv, None, up, None), None, *options)
    call.set(y=x, residual=x, grad_output=x, grad_x=x)
    call.need_grad_x = call.need_down = call.need_conv = call.need_up = True
    for name in (*_WEIGHTS, *_RANK):
        setattr(call, name, _ADDRESS)
    for name in _TOKENS:
        getattr(call, name).data = _ADDRESS
    return call


def plan(call: AdapterCall, backward: bool, multiprocessors: int = 132) -> dict[str, dict]:
    """Launch -> what it takes if it is needed, for a call with or without memory behind it."""
    names = LAUNCHES[backward]
    shapes = (ctypes.c_int64 * (3 * len(names)))()
    arguments = (ctypes.byref(call), ctypes.c_bool(backward), multiprocessors, shapes)
    _run("adapter_plan", *arguments)
    what = ("blocks", "threads", "shared")
    return {
        name: dict(zip(what, shapes[3 * i : 3 * i + 3], strict=True))
        for i, name in enumerate(names)
        if shapes[3 * i] > 0
    }
