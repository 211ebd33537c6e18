"""Memory that starts as junk, so that an element left unwritten, or read unwritten, is seen."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path

import torch

from lka_kernels import _extension, ops


@functools.cache
def junk_fill_flag() -> ctypes.c_bool:
    """The switch of torch's CPU allocator that fills every fresh tensor with 0x7fedbeef.

    That is NaN in float32, NaN in every other element of float16 and bfloat16, and 1.7e308 in
    float64. It acts in the allocator, so it reaches tensors that compiled operators allocate,
    which ``torch.utils.deterministic.fill_uninitialized_memory`` does not.
    """
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    name = "FLAGS_caffe2_cpu_allocator_do_junk_fill"
    # Without it every test of unwritten memory would pass in silence: errors are left to be seen.
    flag = ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), name)
    flag.value = True
    try:
        if not torch.empty(1024).isnan().all():
            raise RuntimeError(f"{name} of {path} no longer fills fresh tensors with junk")
    finally:
        flag.value = False
    return flag


@contextlib.contextmanager
def junk_filled_tensors():
    """Every tensor allocated on the CPU in this block starts as junk."""
    flag = junk_fill_flag()
    flag.value = True
    try:
        yield
    finally:
        flag.value = False


def poison_scratch(dtype: torch.dtype) -> None:
    """Leave NaN in the buffers that the compiled kernels keep from one call to the next.

    Only this thread's buffers are certain to be reached. Rows and columns of padding are zeroed
    by every call, so NaN stays where the maps of these calls were.
    """
    if not _extension.loaded():
        return
    operators = ops.DEPTHWISE["cpu"]
    nan = torch.full((1, 16, 65, 65), torch.nan, dtype=dtype)
    weight = torch.full((16, 1, 7, 7), torch.nan, dtype=dtype)
    geometry = ((1, 1), (3, 3, 3, 3), (1, 1))
    operators.forward(nan, weight, weight[:, 0, 0, 0], *geometry, False)
    operators.backward_weight(nan, nan, (7, 7), *geometry)
