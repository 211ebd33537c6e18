"""Triton kernels for NVIDIA GPUs.

Importing this package costs nothing: Triton is loaded at the first call. With TRITON_INTERPRET=1 in
the environment by then, Triton's interpreter runs the kernels on CPU tensors, slowly, which is how
they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from lka_kernels import ops

LEAST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_type() -> str:
    """The type of the tensors that the kernels serve here."""
    return "cpu" if interpreting() else "cuda"


def status() -> str:
    """ "ready", or why the kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if interpreting():
        return "ready"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if torch.version.hip is not None:
        return "ROCm devices are not supported"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{capability[0]}.{capability[1]}; {least} is needed"
        )
    return "ready"


def _adapter_forward(*arguments):
    from lka_kernels.backends.triton import adapter

    return adapter.forward(*arguments)


def _adapter_backward(*arguments):
    from lka_kernels.backends.triton import adapter

    return adapter.backward(*arguments)


# Family of operators -> the form that its kernels take.
_DEPTHWISE_FORMS = {"triton": "auto", "triton_direct": "direct", "triton_gemm": "gemm"}


def _depthwise(direction: str, form: str):
    def operator(*arguments):
        from lka_kernels.backends.triton import depthwise

        return getattr(depthwise, direction)(*arguments, form)

    return operator


def _fft(direction: str):
    def operator(*arguments):
        from lka_kernels.backends.triton import fft

        return getattr(fft, direction)(*arguments)

    return operator


for _key in ("CUDA", "CPU"):  # CPU tensors reach them under the interpreter alone
    ops.LIBRARY.impl("large_kernel_adapter_forward_triton", _adapter_forward, _key)
    ops.LIBRARY.impl("large_kernel_adapter_backward_triton", _adapter_backward, _key)
    for _family, _form in _DEPTHWISE_FORMS.items():
        for _direction in ops.DEPTHWISE_SCHEMAS:
            ops.LIBRARY.impl(
                f"depthwise_conv2d_{_direction}_{_family}", _depthwise(_direction, _form), _key
            )
    for _direction in ops.DEPTHWISE_SCHEMAS:
        ops.LIBRARY.impl(f"depthwise_conv2d_{_direction}_triton_fft", _fft(_direction), _key)
