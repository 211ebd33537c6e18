"""Which backend and method serve a call, and why.

A choice looks at dtype, device, memory format, geometry and weight shape only: all known while
tracing, so that dynamic batch or map sizes grow no guards. Thresholds on those sizes belong inside
the operators.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lka_kernels import _extension
from lka_kernels.backends import triton as triton_backend
from lka_kernels.checks import ACTIVATIONS, FLOAT_DTYPES, one_of
from lka_kernels.tiles import MOST_RANK

BACKENDS = ("cpu", "triton", "cuda", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels write padded rows out. Padding that makes this many elements of a plane, and so many
# for every one of the map, has a stride as large, and F.conv2d needs no memory for it.
_MOST_PADDED, _MOST_PADDED_SHARE = 2**24, 64
GPU_ADAPTER_DTYPES = TRITON_DTYPES
CUDA_DTYPES = {  # of methods that do not serve all
    "implicit_gemm": (torch.bfloat16, torch.float16),
    "fft": (torch.float32, torch.bfloat16, torch.float16),
}


class Choice(NamedTuple):
    """What serves a call."""

    backend: str
    method: str
    reason: str

    @property
    def family(self) -> str:
        """The operators of ``ops.DEPTHWISE`` that serve the call, or "torch" for none of them.

        Operators take no method: every backend has a family for each, and one that chooses by
        sizes.
        """
        return _FAMILIES.get((self.backend, self.method), self.backend)


_FAMILIES = {
    ("cpu", "direct"): "cpu_direct",
    ("cpu", "fft"): "cpu_fft",
    ("triton", "direct"): "triton_direct",
    ("triton", "implicit_gemm"): "triton_gemm",
    ("triton", "fft"): "triton_fft",
    ("cuda", "direct"): "cuda_direct",
    ("cuda", "implicit_gemm"): "cuda_gemm",
    ("cuda", "fft"): "cuda_fft",
    ("gpu", "fft"): "gpu_fft",
}
_STRIDE_1_ONLY = {
    ("cpu", "fft"),
    *(("triton", method) for method in ("auto", "direct", "implicit_gemm")),
    ("cuda", "implicit_gemm"),
    ("cuda", "fft"),
    ("gpu", "auto"),
    ("gpu", "fft"),
}
# What the device of the tensors has to be; Triton's is asked for.
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def depthwise_methods() -> list[tuple[str, str]]:
    """Every (backend, method) that serves ``depthwise_conv2d``; "fft" is torch.fft, on any device.

    A backend with one method has no choice to make between methods by sizes, hence no "auto". "gpu"
    is what ``use_backend("auto")`` takes on CUDA tensors: sizes choose the backend too.
    """
    found = []
    for backend in (*BACKENDS, "gpu"):
        own = [method for name, method in _FAMILIES if name == backend]
        found += [(backend, method) for method in (["auto", *own] if own else ["direct"])]
    return [*found, ("fft", "fft")]


class _Requested:
    backend = "auto"


class use_backend:
    """Use one backend for every following call; also a context manager that restores the last.

    The choice is the process's, as torch.backends is: it holds in all threads, those that a data
    loader or DataParallel starts included, which a context variable would not reach. A function
    that torch.compile has traced is traced anew for another choice. A context manager that was
    kept may be entered again, and then chooses again.

    Args:
        name: "cpu" (compiled kernels for CPU tensors), "triton", "cuda", "torch" (plain PyTorch)
            or "auto" (the fastest that can serve each call).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message gives the reason.
    """

    def __init__(self, name: str):
        one_of("backend", name, (*BACKENDS, "auto"))
        if name != "auto":
            status = _STATUS[name]()
            if status != "ready":
                raise RuntimeError(f"backend {name!r} cannot run: {status}")
        self._name = name
        self._previous = [_Requested.backend]
        self._entered = False
        _Requested.backend = name

    def __enter__(self) -> use_backend:
        if self._entered or _Requested.backend != self._name:  # not straight after it was made
            self._previous.append(_Requested.backend)
        self._entered = True
        _Requested.backend = self._name
        return self

    def __exit__(self, *exception) -> None:
        _Requested.backend = self._previous.pop()


def available_backends() -> dict[str, str]:
    """Backend name -> "ready" or the reason why it is not.

    Asks the current CUDA device, if there is one, and so begins to use it in this process.
    """
    return {name: status() for name, status in _STATUS.items()}


def _cuda_status() -> str:
    if not _extension.loaded():
        return _extension.STATUS
    if not _extension.built_with_cuda():
        return (
            "the compiled library was built without CUDA kernels; "
            "reinstall with nvcc on PATH or CUDA_HOME set"
        )
    if not torch.cuda.is_available():
        return "CUDA kernels are built, but torch finds no CUDA device"
    if not _extension.finds_cuda_stream():
        return f"torch {torch.__version__} does not tell its current CUDA stream"
    return _extension.why_cuda_device_cannot(torch.cuda.current_device(), False) or "ready"


def _reported(status: Callable[[], str]) -> Callable[[], str]:
    """``status``, and the reason instead of an error: as where a process was forked after CUDA."""

    def ask() -> str:
        try:
            return status()
        except RuntimeError as error:
            return f"CUDA cannot be used in this process: {error}"

    return ask


# Each on its own: the CPU's and torch's do not touch CUDA.
_STATUS: dict[str, Callable[[], str]] = {
    "cpu": lambda: _extension.STATUS,
    "triton": _reported(lambda: triton_backend.status()),
    "cuda": _reported(lambda: _cuda_status()),
    "torch": lambda: "ready",
}


def _device_refuses(backend: str, tensor: Tensor, tensor_cores: bool) -> str | None:
    """Why the device of ``tensor`` cannot run the kernels of ``backend``, or None if it can.

    Only of the CUDA backend: Triton compiles for the device. Nothing is asked while a call is
    traced, or where CUDA is not in use, as with tensors that have no storage; the operators refuse
    for the same reason before they launch.
    """
    if backend != "cuda" or tensor.device.type != "cuda":
        return None
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return None
    refusal = _extension.why_cuda_device_cannot(tensor.device.index or 0, tensor_cores)
    return None if refusal is None else f"{tensor.device}: {refusal}"


def _not_installed() -> dict[str, str]:
    """Backend -> "ready", or why it can serve no GPU, as far as this is known without a device."""
    if torch.version.hip is not None:
        return dict.fromkeys(("cuda", "triton"), "ROCm devices are not supported")
    found = {"cuda": "ready", "triton": "ready"}
    if not _extension.built_with_cuda():
        found["cuda"] = (
            "the compiled library was built without CUDA kernels"
            if _extension.loaded()
            else _extension.STATUS
        )
    if importlib.util.find_spec("triton") is None:
        found["triton"] = "the package triton is not installed"
    return found


# Found once, as a traced call cannot ask.
_INSTALLED = _not_installed()


def gpu_backends(index: int) -> dict[str, str]:
    """Backend -> "ready", or why the operators of "gpu" do not take it on a device.

    A device is asked once. Where CUDA is not in use, as with tensors that have no storage, only
    what is installed counts.
    """
    return _asked(index) if torch.cuda.is_initialized() else _INSTALLED


@functools.cache
def _asked(index: int) -> dict[str, str]:
    with torch.cuda.device(index):
        found = {name: _STATUS[name]() for name in ("cuda", "triton")}
    if found["cuda"] == "ready":
        found["cuda"] = _extension.why_cuda_device_cannot(index, True) or "ready"
    if found["triton"] == "ready" and triton_backend.interpreting():
        found["triton"] = "TRITON_INTERPRET=1 runs its kernels on CPU tensors"
    return found


def _gpu_refuses(input: Tensor, names: tuple[str, ...] = ("cuda", "triton")) -> str | None:
    """Why none of the backends can serve the device of ``input``, or None if one can.

    A call that is traced takes what is installed at its word; the operators go to PyTorch on a
    device that does not serve them.
    """
    if torch.compiler.is_compiling():
        found = _INSTALLED
    else:
        found = gpu_backends(input.device.index or 0)
    reasons = []
    for name in names:
        if found[name] == "ready":
            return None
        reasons.append(f"{name}: {found[name]}")
    return "; ".join(reasons)


def requested_backend() -> str:
    """The backend that ``use_backend`` asked for last, or "auto"."""
    return _Requested.backend


def transformed() -> bool:
    """Inside torch.func or forward-mode AD, which need rules that only PyTorch's operators have."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_TRANSFORMED = "it does not run inside torch.func transforms or forward-mode differentiation"


def _cannot_run_depthwise(
    backend: str,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    method: str = "auto",
) -> str | None:
    """Why ``backend`` cannot serve this depthwise convolution, or None if it can."""
    if backend == "torch":
        return None
    if (refusal := _not_strided(input, weight)) is not None:
        return refusal
    device = triton_backend.device_type() if backend == "triton" else _DEVICES[backend]
    if input.device.type != device:
        return f"it serves {device} tensors; input is on {input.device}"
    dtypes = TRITON_DTYPES if backend in ("triton", "gpu") else FLOAT_DTYPES
    if backend == "cuda":
        dtypes = CUDA_DTYPES.get(method, FLOAT_DTYPES)
    if input.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it serves {names}; input is {input.dtype}"
    if input.dim() != 4:
        return f"it serves batches (B, C, H, W); input has {input.dim()} dimensions"
    if weight.shape[0] != input.shape[1]:
        return (
            f"it serves one filter per channel; weight has {weight.shape[0]} filters "
            f"for {input.shape[1]} channels"
        )
    if (backend, method) in _STRIDE_1_ONLY and stride != (1, 1):
        return f"it serves stride 1; stride is {stride}"
    if transformed():
        return _TRANSFORMED
    return None


def cannot_run_depthwise(
    backend: str, method: str, input: Tensor, weight: Tensor, stride: tuple[int, int]
) -> str | None:
    """Why a method of ``depthwise_methods`` cannot serve a call, wherever it can run at all."""
    if backend == "fft":
        return _cannot_transform(input, weight)
    return _cannot_run_depthwise(backend, input, weight, stride, method)


def _cannot_transform(input: Tensor, weight: Tensor) -> str | None:
    """Why no transforms can serve this depthwise convolution, or None if torch.fft can."""
    if input.dim() != 4 or weight.shape[0] != input.shape[1]:
        return (
            "it needs input (B, C, H, W) and one filter per channel; got input "
            f"{tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    if input.dtype not in FLOAT_DTYPES:
        return f"input is {input.dtype}"
    if transformed():  # the operators' results would have no derivative, or a wrong one
        return _TRANSFORMED
    return _not_strided(input, weight)


def _not_strided(input: Tensor, weight: Tensor) -> str | None:
    """Why kernels that read memory by strides cannot serve a call: oneDNN's opaque layout."""
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.layout is not torch.strided:
            return f"it serves layout torch.strided; {name} has {tensor.layout}"
    return None


def choose_depthwise(
    input: Tensor,
    weight: Tensor,
    method: str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (0, 0, 0, 0),
) -> Choice:
    """Choose for one call of ``depthwise_conv2d`` with checked arguments.

    Raises:
        RuntimeError: a backend asked for by ``use_backend`` cannot serve the call.
        ValueError: a method asked for by name cannot serve the call.
    """
    requested = _Requested.backend
    if method == "implicit_gemm":
        return _choose_implicit_gemm(input, weight, stride)
    if method == "fft":
        return _choose_fft(input, weight, stride)
    if requested == "auto":
        height, width = input.shape[-2:]
        padded = (height + padding[0] + padding[2]) * (width + padding[1] + padding[3])
        if padded > max(_MOST_PADDED, _MOST_PADDED_SHARE * height * width):
            return Choice(
                "torch", "direct", f"padding {padding} makes {padded} elements of a plane"
            )
        if input.device.type == "cpu" and _extension.MODULE is not None:
            refusal = _cannot_run_depthwise("cpu", input, weight, stride)
            if refusal is None:
                return _COMPILED_CPU[method]
            return Choice("torch", "direct", f"the compiled CPU kernels cannot: {refusal}")
        if input.device.type == "cuda" and method == "auto":
            refusal = _cannot_run_depthwise("gpu", input, weight, stride)
            refusal = refusal or _gpu_refuses(input)
            if refusal is None:
                return _GPU
            return Choice("torch", "direct", f"the GPU kernels cannot: {refusal}")
        return Choice("torch", "direct", _why_torch(input))
    refusal = _cannot_run_depthwise(requested, input, weight, stride)
    refusal = refusal or _device_refuses(requested, input, tensor_cores=False)
    if refusal is not None:
        raise RuntimeError(f"backend {requested!r} cannot run this call: {refusal}")
    reason = f"asked for by use_backend({requested!r})"
    if requested == "triton" and method == "auto":
        return Choice(requested, "auto", f"{reason}; sizes choose direct or implicit_gemm")
    if requested == "cpu" and method == "auto":
        return Choice(requested, "auto", f"{reason}; sizes choose direct or fft")
    if requested == "cuda" and method == "auto":
        refusal = cannot_run_depthwise("cuda", "implicit_gemm", input, weight, stride)
        refusal = refusal or _device_refuses("cuda", input, tensor_cores=True)
        if refusal is None:
            return Choice(requested, "auto", f"{reason}; implicit_gemm unless sizes refuse it")
        return Choice(requested, "direct", f"{reason}; implicit_gemm cannot: {refusal}")
    return Choice(requested, "direct", reason)


def _choose_implicit_gemm(input: Tensor, weight: Tensor, stride: tuple[int, int]) -> Choice:
    """The Triton backend's, or the CUDA backend's where ``use_backend`` asked for that."""
    requested = _Requested.backend
    backend = "cuda" if requested == "cuda" else "triton"
    if requested not in ("auto", "triton", "cuda"):
        refusal = f"backend {requested!r} has none"
    elif backend == "triton" and (status := triton_backend.status()) != "ready":
        refusal = f"it needs the Triton backend: {status}"
    else:
        refusal = cannot_run_depthwise(backend, "implicit_gemm", input, weight, stride)
        refusal = refusal or _device_refuses(backend, input, tensor_cores=True)
    if refusal is not None:
        raise ValueError(
            f"method='implicit_gemm' cannot serve this call: {refusal}; "
            "use 'auto', 'direct' or 'fft'"
        )
    return Choice(backend, "implicit_gemm", "asked for by method='implicit_gemm'")


_COMPILED_CPU = {
    "auto": Choice("cpu", "auto", "compiled CPU kernels; sizes choose direct or fft"),
    "direct": Choice("cpu", "direct", "compiled CPU kernels"),
}


_GPU = Choice("gpu", "auto", "GPU kernels or PyTorch's; sizes choose by measured times")


def _why_torch(input: Tensor) -> str:
    if input.device.type == "cpu":
        return f"no compiled CPU kernels: {_extension.STATUS}"
    if input.device.type == "cuda":
        return (
            "direct sums on cuda are PyTorch's; "
            "use_backend('cuda') or use_backend('triton') asks for others"
        )
    return f"no kernel of this library serves {input.device.type} tensors"


_FFT_OF_GPUS = {
    "triton": "torch.fft between Triton kernels",
    "cuda": "transforms of at most 128 × 128 in one launch, larger ones are refused",
}


def _choose_fft(input: Tensor, weight: Tensor, stride: tuple[int, int]) -> Choice:
    refusal = _cannot_transform(input, weight)
    if refusal is not None:
        raise ValueError(f"method='fft' cannot serve this call: {refusal}")
    asked = "asked for by method='fft'"
    if (
        _Requested.backend in ("auto", "cpu")
        and _extension.MODULE is not None
        and cannot_run_depthwise("cpu", "fft", input, weight, stride) is None
    ):
        return Choice("cpu", "fft", f"{asked}; compiled CPU kernels")
    if _Requested.backend in _FFT_OF_GPUS:
        backend = _Requested.backend
        refusal = cannot_run_depthwise(backend, "fft", input, weight, stride)
        refusal = refusal or _device_refuses(backend, input, tensor_cores=True)
        if refusal is None:
            return Choice(backend, "fft", f"{asked}; {_FFT_OF_GPUS[backend]}")
        return Choice("fft", "fft", f"{asked}; torch.fft alone, as backend {backend!r}: {refusal}")
    if _Requested.backend == "auto" and input.device.type == "cuda":
        refusal = cannot_run_depthwise("gpu", "fft", input, weight, stride)
        refusal = refusal or _gpu_refuses(input, ("cuda",))
        if refusal is None:
            return Choice(
                "gpu",
                "fft",
                f"{asked}; sizes choose transforms of at most 128 × 128 in one launch or torch.fft",
            )
        return Choice(
            "fft",
            "fft",
            f"{asked}; torch.fft alone, as the transforms in one launch cannot: {refusal}",
        )
    return Choice("fft", "fft", f"{asked}; torch.fft on any device")


def choose_adapter(x: Tensor, activation: str, r: int) -> Choice:
    """Choose for one call of ``large_kernel_adapter`` with checked arguments.

    Raises:
        RuntimeError: a backend asked for by ``use_backend`` cannot serve the call.
    """
    requested = _Requested.backend
    if requested == "auto" and x.device.type == "cuda":
        refusal = cannot_run_adapter("gpu", x, activation, r) or _gpu_refuses(x)
        if refusal is None:
            return _FUSED_GPU
        return Choice("torch", "reference", f"the fused GPU kernels cannot: {refusal}")
    backend = "cpu" if requested == "auto" else requested
    if backend == "cpu" and _extension.MODULE is None:
        refusal = _extension.STATUS
    else:
        refusal = cannot_run_adapter(backend, x, activation, r)
        refusal = refusal or _device_refuses(backend, x, tensor_cores=True)
    if requested == "auto":
        if refusal is None:
            return _FUSED_CPU
        return Choice("torch", "reference", f"the fused CPU kernels cannot: {refusal}")
    if refusal is not None:
        raise RuntimeError(f"backend {requested!r} cannot run this call: {refusal}")
    if requested == "torch":
        return Choice("torch", "reference", "asked for by use_backend('torch')")
    return Choice(requested, "fused", f"asked for by use_backend({requested!r})")


_FUSED_CPU = Choice("cpu", "fused", "one fused CPU operator forward and one backward")
_FUSED_GPU = Choice("gpu", "fused", "fused GPU kernels; sizes choose by measured times")


def cannot_run_adapter(backend: str, x: Tensor, activation: str, r: int) -> str | None:
    """Why ``backend`` cannot serve this adapter wherever it can run at all, or None if it can."""
    if backend == "torch":
        return None
    device = triton_backend.device_type() if backend == "triton" else _DEVICES[backend]
    if x.device.type != device:
        return f"it serves {device} tensors; x is on {x.device}"
    dtypes = FLOAT_DTYPES if backend == "cpu" else GPU_ADAPTER_DTYPES
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it serves {names}; x is {x.dtype}"
    if backend != "cpu" and r > MOST_RANK:
        return f"it serves a rank r of at most {MOST_RANK}; down_weight has {r}"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r}"
    if transformed():
        return _TRANSFORMED
    return None
