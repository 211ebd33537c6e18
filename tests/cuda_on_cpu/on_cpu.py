"""Builds the kernels for the CPU and calls them on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("c++")


@functools.cache
def library(*sources: str) -> ctypes.CDLL:
    """The library of ``sources`` and the runtime, compiled once for each process."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu_"))
    target = folder / "library.so"
    command = [
        compiler(),
        # longjmp to another stack is what fibers do; fortified, it would be refused.
        *("-std=c++17", "-O2", "-march=native", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-array-bounds"),
        *("-I", str(HERE), "-I", str(CSRC)),
        *(str(HERE / name) for name in ("runtime.cpp", "checker.cpp", *sources)),
        *("-o", str(target)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


class MapView(ctypes.Structure):
    """``lka::MapView``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width")),
        *((f"stride_{name}", ctypes.c_int64) for name in "bchw"),
    ]

    @classmethod
    def of(cls, t: Tensor) -> MapView:
        return cls(t.data_ptr(), *t.shape[2:], *t.stride())


class ConvParams(ctypes.Structure):
    """``lka::ConvParams``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("storage", "form")),
        *((name, ctypes.c_int64) for name in ("batch", "channels")),
        *((name, MapView) for name in ("input", "output")),
        *((name, ctypes.c_int64) for name in ("kernel_h", "kernel_w")),
        *((name, ctypes.c_int64) for name in ("stride_h", "stride_w")),
        *((name, ctypes.c_int64) for name in ("dilation_h", "dilation_w")),
        *((name, ctypes.c_int64) for name in ("pad_top", "pad_left")),
    ]


def params(input: Tensor, output: Tensor, kernel, padding, dilation) -> ConvParams:
    """Stride 1; ``padding`` is (top, left, ...)."""
    call = ConvParams(
        STORAGE[input.dtype],
        0,
        *input.shape[:2],
        MapView.of(input),
        MapView.of(output),
        *kernel,
        1,
        1,
        *dilation,
        *padding[:2],
    )
    call.tensors = (input, output)  # whose memory it names
    return call


def _function(name: str):
    function = getattr(library("kernels.cpp"), name)
    function.restype = ctypes.c_char_p
    return function


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _raise_for(message: bytes) -> None:
    if message:
        raise RuntimeError(message.decode())


def correlate(call: ConvParams, backward: bool, weight: Tensor, bias: Tensor | None) -> None:
    """Fill the output of ``call``, or with ``backward`` its input."""
    function = _function("toeplitz_correlate")
    if weight.dtype == torch.float32:
        function = _function("float_correlate")
        source = call.tensors[1 if backward else 0]
        if source.stride(1) == 1 and source.stride(3) != 1:
            weight = weight.transpose(0, 3).contiguous()
    flag = ctypes.c_bool(backward)
    _raise_for(function(ctypes.byref(call), flag, _pointer(weight), _pointer(bias)))


def weight_gradient(
    call: ConvParams, grad_weight: Tensor, grad_bias: Tensor, multiprocessors: int = 4
) -> None:
    """Fill both gradients from input and output of ``call``."""
    kind = "float" if grad_weight.dtype == torch.float32 else "toeplitz"
    function = _function(f"{kind}_weight_gradient")
    pointers = (_pointer(grad_weight), _pointer(grad_bias))
    _raise_for(function(ctypes.byref(call), multiprocessors, *pointers))


def run_correlate(
    form: str, call: ConvParams, backward: bool, weight: Tensor, bias: Tensor | None
) -> None:
    """As ``correlate``: "toeplitz", "dense", "plane"; "tensor_core" is what the operators take."""
    flag = ctypes.c_bool(backward)
    arguments = (ctypes.byref(call), flag, _pointer(weight), _pointer(bias))
    _raise_for(_function(f"{form}_correlate")(*arguments))


def run_weight_gradient(
    form: str, call: ConvParams, grad_weight: Tensor, grad_bias: Tensor, multiprocessors: int = 4
) -> None:
    """As ``weight_gradient``, in a form of ``run_correlate``."""
    pointers = (_pointer(grad_weight), _pointer(grad_bias))
    function = _function(f"{form}_weight_gradient")
    _raise_for(function(ctypes.byref(call), multiprocessors, *pointers))


def fft_correlate(call: ConvParams, backward: bool, weight: Tensor, bias: Tensor | None) -> None:
    """As ``correlate``, by Fourier transforms."""
    flag = ctypes.c_bool(backward)
    arguments = (ctypes.byref(call), flag, _pointer(weight), _pointer(bias))
    _raise_for(_function("fft_correlate")(*arguments))


def fft_weight_gradient(
    call: ConvParams, grad_weight: Tensor, grad_bias: Tensor, multiprocessors: int = 4
) -> None:
    """As ``weight_gradient``, by Fourier transforms."""
    pointers = (_pointer(grad_weight), _pointer(grad_bias))
    _raise_for(_function("fft_weight_gradient")(ctypes.byref(call), multiprocessors, *pointers))


def plan(
    call: ConvParams, direction: str, multiprocessors: int, function: str = "plan"
) -> dict[str, int]:
    """What is launched for a call, with or without memory behind it.

    ``function`` is "plan" of the row-Toeplitz form, "dense_plan" or "fft_plan".
    """
    shape = (ctypes.c_int64 * 3)()
    arguments = (ctypes.byref(call), direction.encode(), multiprocessors, shape)
    _raise_for(_function(function)(*arguments))
    return dict(zip(("blocks", "threads", "shared"), shape, strict=True))


def plane_images(call: ConvParams, direction: str, multiprocessors: int = 132) -> int:
    """Images side by side in the form with planes, or 0; -1 would mix them up."""
    function = library("kernels.cpp").plane_images
    return function(ctypes.byref(call), direction.encode(), multiprocessors)


def why_device_cannot(capability: int, compiled: int, tensor_cores: bool) -> str:
    """``lka::cuda::why_device_cannot`` of versions 10 · major + minor."""
    function = _function("why_device_cannot")
    return function(capability, compiled, ctypes.c_bool(tensor_cores)).decode()
