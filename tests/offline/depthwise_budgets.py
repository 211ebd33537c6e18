"""Compile depthwise_conv2d's Triton kernels for other GPUs; see ``triton_budgets.py``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from triton_budgets import CAPABILITIES, Kernels, main

from lka_kernels.backends.triton import depthwise
from lka_kernels.backends.triton.launch import Launch


class Call(NamedTuple):
    """A call of depthwise_conv2d with "same" padding, and the form that is compiled."""

    direction: str
    form: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    dtype: str = "bfloat16"
    channels_last: bool = False
    dilation: int = 1

    @property
    def name(self) -> str:
        batch, channels, height, width = self.shape
        layout = "channels_last" if self.channels_last else "contiguous"
        return (
            f"{self.direction} {self.form} {batch}x{channels}@{height}x{width} "
            f"k{self.kernel[0]}x{self.kernel[1]} d{self.dilation} {self.dtype} {layout}"
        )

    def launches(self) -> list:
        dtype = getattr(torch, self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.empty(self.shape, dtype=dtype, device="meta", memory_format=layout)
        channels = self.shape[1]
        weight = torch.empty(channels, 1, *self.kernel, dtype=dtype, device="meta")
        bias = torch.empty(channels, dtype=dtype, device="meta")
        totals = [self.dilation * (k - 1) for k in self.kernel]
        before = [total // 2 for total in totals]
        after = [total - b for total, b in zip(totals, before, strict=True)]
        geometry = ((1, 1), (*before, *after), (self.dilation, self.dilation))
        if self.direction == "forward":
            arguments = (x, weight, bias, *geometry, self.channels_last, self.form)
            return depthwise.plan_forward(*arguments)[0]
        if self.direction == "backward_input":
            arguments = (x, weight, list(self.shape[2:]), *geometry, self.channels_last, self.form)
            return depthwise.plan_backward_input(*arguments)[0]
        return depthwise.plan_backward_weight(x, x, list(self.kernel), *geometry, self.form)[0]


CALLS = [
    Call("forward", "direct", (64, 192, 56, 56), (7, 7)),
    Call("forward", "direct", (64, 192, 56, 56), (7, 7), channels_last=True),
    Call("forward", "direct", (64, 192, 56, 56), (31, 31), "float32"),
    Call("forward", "direct", (64, 192, 56, 56), (7, 7), "float32", channels_last=True),
    Call("backward_input", "direct", (64, 64, 56, 56), (7, 7), "float16", dilation=3),
    Call("forward", "patch", (64, 192, 56, 56), (7, 7)),
    Call("forward", "patch", (64, 128, 56, 56), (31, 31)),
    Call("backward_input", "patch", (64, 128, 56, 56), (31, 31), "float16"),
    Call("forward", "patch", (64, 256, 28, 28), (29, 29)),
    Call("forward", "patch", (64, 768, 14, 14), (7, 7)),
    Call("forward", "patch", (64, 96, 56, 56), (5, 51)),
    Call("forward", "patch", (64, 96, 56, 56), (51, 5)),
    Call("forward", "patch", (1, 1536, 90, 180), (7, 7)),
    Call("forward", "patch", (64, 64, 56, 56), (7, 7), dilation=3),
    Call("forward", "dense", (64, 512, 14, 14), (27, 27)),
    Call("forward", "dense", (128, 768, 14, 14), (7, 7)),
    Call("backward_input", "dense", (64, 1536, 7, 7), (7, 7), "float16"),
    Call("backward_weight", "direct", (64, 192, 56, 56), (7, 7), "float32"),
    Call("backward_weight", "direct", (64, 192, 56, 56), (7, 7), channels_last=True),
    Call("backward_weight", "rows", (64, 192, 56, 56), (7, 7)),
    Call("backward_weight", "rows", (64, 128, 56, 56), (31, 31)),
    Call("backward_weight", "rows", (64, 512, 14, 14), (27, 27), "float16"),
    Call("backward_weight", "rows", (64, 1536, 7, 7), (7, 7)),
    Call("backward_weight", "dense", (64, 1536, 7, 7), (7, 7)),
    Call("backward_weight", "dense", (64, 1024, 7, 7), (13, 13), "float16"),
    Call("backward_weight", "rows", (64, 96, 56, 56), (51, 51)),
    # Strides beyond int32.
    Call("forward", "direct", (2, 1, 50_000, 50_000), (5, 5), "float16"),
    Call("backward_weight", "rows", (2, 70_000, 200, 200), (5, 5), "float16"),
]


def to_compile() -> dict[str, Launch]:
    """The first launch of every call, moves, and partial sums with taps that do not touch."""
    found = {call.name: call.launches()[0] for call in CALLS}
    by_rows = Call("forward", "gemm", (64, 192, 56, 56), (7, 7), channels_last=True).launches()
    odd = Call("backward_input", "gemm", (64, 1536, 7, 7), (7, 7), "float16", channels_last=True)
    found["move_planes from channels_last 56x56"] = by_rows[0]
    found["move_planes to channels_last 56x56"] = by_rows[-1]
    found["move_planes from channels_last 7x7"] = odd.launches()[0]
    clipped = Call("backward_weight", "dense", (64, 1024, 7, 7), (31, 31))
    return {**found, f"sum_partials of {clipped.name}": clipped.launches()[1]}


def multiplies(name: str) -> bool:
    """All forms but the direct one are matrix products."""
    return not any(part in name for part in (" direct ", "sum_partials", "move_planes"))


def compiled_for(index: int) -> tuple[int, ...]:
    """Every call is compiled for 9.0 and one of three for the others: a minute on two cores."""
    one_of_three = {80: 1, 100: 0}
    return tuple(cap for cap in CAPABILITIES if cap == 90 or index % 3 == one_of_three[cap])


KERNELS = Kernels(
    Path(__file__).with_name("depthwise_budgets.json"),
    to_compile,
    multiplies,
    compiled_for=compiled_for,
)

if __name__ == "__main__":
    main(KERNELS)
