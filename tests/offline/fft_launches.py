"""Steps of Triton's fft method that stand for all: what is compiled, and what is counted."""

from __future__ import annotations

import torch

from lka_kernels.backends.triton import fft
from lka_kernels.backends.triton.launch import Launch

DIRECTIONS = ("forward", "backward_input", "backward_weight")


def steps(
    direction: str,
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    *,
    channels_last: bool = False,
    stride: int = 1,
) -> list:
    """Launches and transforms of a call with half a kernel of padding, without storage."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch, channels, *size = shape

    def empty(*shape, **options):
        return torch.empty(shape, dtype=dtype, device="meta", **options)

    x = empty(*shape, memory_format=layout)
    before = [k // 2 for k in kernel]
    geometry = ((stride, stride), (*before, *before), (1, 1))
    out_size = [(n + 2 * b - k) // stride + 1 for n, b, k in zip(size, before, kernel, strict=True)]
    grad = empty(batch, channels, *out_size, memory_format=layout)
    weight = empty(channels, 1, *kernel)
    done = []
    if direction == "forward":
        fft.steps_forward(x, weight, empty(channels), *geometry, channels_last, done.append)
    elif direction == "backward_input":
        fft.steps_backward_input(grad, weight, size, *geometry, channels_last, done.append)
    else:
        fft.steps_backward_weight(grad, x, kernel, *geometry, done.append)
    return done


def to_compile() -> dict[str, Launch]:
    """Launches by a name that says what they are for."""
    cases = {
        "forward bfloat16": (("forward", (64, 192, 56, 56), (31, 31), torch.bfloat16), {}),
        "forward bfloat16 channels_last": (
            ("forward", (64, 192, 56, 56), (31, 31), torch.bfloat16),
            {"channels_last": True},
        ),
        "backward_input float32 stride 2": (
            ("backward_input", (8, 96, 28, 28), (13, 13), torch.float32),
            {"stride": 2},
        ),
        "backward_weight float16": (
            ("backward_weight", (64, 1024, 7, 7), (13, 13), torch.float16),
            {},
        ),
        # Spectra of more than 2^31 numbers.
        "backward_weight bfloat16 wide": (
            ("backward_weight", (1, 150_000, 120, 120), (5, 5), torch.bfloat16),
            {"channels_last": True},
        ),
    }
    found = {}
    for case, (arguments, options) in cases.items():
        launches = [step for step in steps(*arguments, **options) if isinstance(step, Launch)]
        for number, launch in enumerate(launches):
            found[f"{case} {number} {launch.kernel.__name__.removesuffix('_kernel')}"] = launch
    return found
