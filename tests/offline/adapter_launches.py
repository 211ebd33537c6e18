"""Launches of the Triton adapter that stand for all: what is compiled, and what is counted."""

from __future__ import annotations

import functools
from unittest import mock

import torch

from lka_kernels import tiles
from lka_kernels.backends.triton import adapter
from lka_kernels.backends.triton.launch import Launch


def launches(
    batch: int,
    grid: tuple[int, int],
    dim: int,
    r: int,
    kernel: tuple[int, int],
    dtype: torch.dtype,
    *,
    prefix: int = 0,
    prefix_mode: str = "center_tap",
    activation: str = "gelu",
    position: str = "pre",
    dropout: float = 0.1,
    biases: bool = True,
    residual: bool = True,
    output_mask: tuple[bool, ...] = (True,) * 7,
) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and of backward, from tensors without storage."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(batch, prefix + grid[0] * grid[1], dim)
    bias = [empty(n) if biases else None for n in (r, r, dim)]
    weights = (
        empty(r, dim), bias[0], empty(r, 1, *kernel), bias[1], empty(dim, r), bias[2],
    )  # fmt: skip
    seed = empty(1, dtype=torch.int64) if dropout else None
    options = (seed, *grid, prefix, prefix_mode, 1, activation, position, dropout, 1.0)
    own = empty(*x.shape) if residual else None
    forward, (y, z, c) = adapter.plan_forward(x, *weights, own, *options)
    mask = [asked and (index not in (2, 4, 6) or biases) for index, asked in enumerate(output_mask)]
    backward, _ = adapter.plan_backward(y, x, z, c, *weights, *options, False, mask)
    return forward, backward


def in_two_launches():
    """A context in which forward takes two launches, though one were estimated to be faster."""
    return mock.patch.object(tiles, "one_launch_tiles", return_value=None)


@functools.cache
def to_compile() -> dict[str, Launch]:
    """Launches by a name that says what they are for."""
    half, whole = (torch.bfloat16,), (torch.float32, torch.bfloat16)
    cases = {
        # The default rank and kernel on the first stage of Swin-L and in ViT-L with a class token.
        "r8 k7 56x56": (whole, (64, (56, 56), 192, 8, (7, 7)), {}),
        "r8 k7 14x14+1": (
            (*whole, torch.float16),
            (64, (14, 14), 1024, 8, (7, 7)),
            {"prefix": 1},
        ),
        # Large ranks: the convolution and the weights' gradients have launches of their own.
        "r64 k31 14x14": (whole, (64, (14, 14), 1024, 64, (31, 31)), {}),
        "r256 k13 14x14": (whole, (64, (14, 14), 768, 256, (13, 13)), {}),
        # One image: forward in one launch.
        "r8 k7 14x14+1 one image": (whole, (1, (14, 14), 1024, 8, (7, 7)), {"prefix": 1}),
        "r8 k7 7x7 four images": ((torch.float32,), (4, (7, 7), 768, 8, (7, 7)), {}),
        # Every optional part the other way round.
        "r5 k3 skip": (
            half,
            (2, (7, 7), 100, 5, (3, 4)),
            {
                "prefix": 2,
                "prefix_mode": "skip",
                "activation": "silu",
                "position": "both",
                "biases": False,
                "residual": False,
                "output_mask": (False,) + (True,) * 6,
            },
        ),
        "r16 k5 zero": (
            half,
            (2, (7, 7), 96, 16, (5, 5)),
            {
                "prefix": 1,
                "prefix_mode": "zero",
                "activation": "gelu_tanh",
                "position": "post",
                "dropout": 0.0,
                "output_mask": (True,) + (False,) * 6,
            },
        ),
    }
    found = {}
    for case, (dtypes, arguments, options) in cases.items():
        for dtype in dtypes:
            with in_two_launches():
                forward, backward = launches(*arguments, dtype, **options)
            alone, _ = launches(*arguments, dtype, **options)
            if len(alone) == 1:
                forward += alone
            for launch in forward + backward:
                name = launch.kernel.__name__.removesuffix("_kernel")
                key = f"{case} {str(dtype).removeprefix('torch.')} {name}"
                if key in found:  # the two of weight_backward, which differ in an activation
                    key += " (down)"
                found[key] = launch
    return found
