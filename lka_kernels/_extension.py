"""Loads the compiled library and remembers why it could not.

Importing lka_kernels never fails because a compiled part is missing.
"""

from __future__ import annotations

import importlib
import os

import torch

_BUILD_HINT = "reinstall with a C++17 compiler (g++) and without LKA_NO_EXTENSION=1 to build it"
# What the compiled module must have: one left from an earlier version must not break the import.
_FUNCTIONS = (
    *("instruction_set", "built_with_cuda", "depthwise_kernel_name"),
    *("finds_cuda_stream", "why_cuda_device_cannot"),
)


def _load() -> tuple[object | None, str]:
    if os.environ.get("LKA_NO_EXTENSION") == "1":
        return None, "switched off by LKA_NO_EXTENSION=1"
    try:
        module = importlib.import_module("lka_kernels._C")
    except ModuleNotFoundError:
        return None, f"the compiled library lka_kernels/_C.abi3.so is not installed; {_BUILD_HINT}"
    except ImportError as error:
        return None, f"the compiled library does not load: {error}; {_BUILD_HINT}"
    missing = [name for name in _FUNCTIONS if not hasattr(module, name)]
    if missing:
        return None, (
            f"the compiled library lka_kernels/_C.abi3.so is of another version, without "
            f"{', '.join(missing)}; {_BUILD_HINT}"
        )
    return module, "ready"


MODULE, STATUS = _load()


def loaded() -> bool:
    """True if the compiled library is loaded."""
    return MODULE is not None


def instruction_set() -> str:
    """What the CPU kernels run with: "avx512_bf16", "avx512", "avx2" or "baseline"."""
    return MODULE.instruction_set() if MODULE is not None else "none"


def depthwise_kernel_name(
    direction: str,
    dtype: torch.dtype,
    input_size: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool,
) -> str | None:
    """The CPU kernel that these sizes choose, as csrc/cpu/depthwise_kernel_name.h describes it.

    ``direction`` is "forward", "backward_input" or "backward_weight", ``padding`` is (top, left,
    bottom, right). None if the result would be empty.
    """
    return MODULE.depthwise_kernel_name(
        direction,
        str(dtype).removeprefix("torch."),
        tuple(input_size),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        channels_last,
        torch.get_num_threads(),
    )


def built_with_cuda() -> bool:
    """True if the compiled library holds the CUDA kernels."""
    return MODULE is not None and MODULE.built_with_cuda()


def finds_cuda_stream() -> bool:
    """True if CUDA launches find torch's current stream; False beside a torch without CUDA."""
    return MODULE is not None and MODULE.finds_cuda_stream()


def why_cuda_device_cannot(index: int, tensor_cores: bool) -> str | None:
    """Why a CUDA device cannot run the compiled kernels, or None if it can.

    With ``tensor_cores`` those that need what compute capability 8.0 has; both the device and the
    code that the library holds for it count. The operators find the same: csrc/cuda/device_code.h.
    """
    return MODULE.why_cuda_device_cannot(index, tensor_cores) or None
