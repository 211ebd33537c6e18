"""Compile depthwise_conv2d's Triton kernels for GPUs that are not there; print what came out.

    python tests/offline/depthwise_budgets.py            # compare with depthwise_budgets.json
    python tests/offline/depthwise_budgets.py --write    # replace it

For every launch of representative calls: registers and stack of a thread, shared memory of
a program, matrix instructions. Must run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from budgets import Budgets
from compiled import TENSOR_CORES, compile_launch

from lka_kernels.backends.triton import depthwise

CAPABILITIES = (80, 90, 100)
# Every call is compiled for 9.0 and one of three for the others: a minute on two cores.
ONE_OF_THREE = {80: 1, 100: 0}


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


def measure(job: tuple[Call, int]) -> dict:
    """Compile the launches of a call for a capability; the sum of partial sums once is enough."""
    call, capability = job
    found = {}
    for launch in call.launches()[:1]:
        compiled = compile_launch(launch, capability)
        found = {
            "registers": compiled.registers,
            "stack": compiled.stack,
            "shared": compiled.shared,
            "matrix_instructions": compiled.count(TENSOR_CORES),
        }
    return found


def measure_all() -> dict[str, dict]:
    """Name and capability -> what came out, on all cores."""
    jobs = [
        (call, capability)
        for i, call in enumerate(CALLS)
        for capability in CAPABILITIES
        if capability == 90 or i % 3 == ONE_OF_THREE[capability]
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        results = list(pool.map(measure, jobs))
    return {f"{call.name} sm_{cap}": r for (call, cap), r in zip(jobs, results, strict=True)}


def main() -> None:
    """Compare or, with --write, keep."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    file = Path(__file__).with_name("depthwise_budgets.json")
    Budgets(
        file, "triton", triton.__version__, takes_tensor_cores=lambda name: " direct " not in name
    ).main(measure_all())


if __name__ == "__main__":
    main()
