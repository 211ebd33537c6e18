"""One launch of a Triton kernel as data: run it, compile it for another device, count its bytes.

So too a transform by torch.fft that stands between launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel, the number of its programs, its arguments.

    ``arguments`` are those of run time in the order of the kernel's signature; ``constants`` are
    its ``tl.constexpr`` parameters by name.
    """

    kernel: object
    programs: int
    arguments: tuple
    constants: dict
    num_warps: int
    num_stages: int


class Transform(NamedTuple):
    """A transform of real planes by torch.fft, or its inverse, not scaled."""

    source: torch.Tensor
    result: torch.Tensor
    inverse: bool


def dot_precision(dtype: torch.dtype, switch) -> str:
    """``input_precision`` of ``tl.dot``: "tf32" for float32 where ``switch`` allows it.

    ``switch`` is ``torch.backends.cuda.matmul`` or ``torch.backends.cudnn.conv``. To read their
    older ``allow_tf32`` raises once the newer attribute has been set; this one follows both.
    """
    return "tf32" if dtype == torch.float32 and switch.fp32_precision == "tf32" else "ieee"


def run_one(launch: Launch):
    """Run a launch on the current device and stream.

    Returns the compiled kernel, None from the interpreter.
    """
    return launch.kernel[(launch.programs,)](
        *launch.arguments,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
