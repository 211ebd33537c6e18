"""Where is ``depthwise_conv2d`` slower than ``F.conv2d`` in the layout that it is given?

    python benchmarks/paired.py [--dtype float32] [--threads 1] [--rounds 15] [--stride 1]
                                [--match TEXT]

Prints, for each shape, memory format and direction, the median over the rounds of torch's time
divided by ours: below 1 we are slower. The two take turns within a round, so that a change in the
machine's load meets both; what is timed is the whole public call, without gradients, or its
backward alone. glibc returns large freed outputs to the system, and a fresh page costs as much as
the arithmetic at K = 3: raise MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to measure the
convolution rather than the pages. GLIBC_TUNABLES=glibc.malloc.tcache_count=0 keeps it from handing
out another block of several MB at every call, as chance will have it, which a cache does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import facts, measure, shapes
from benchmarks.measure import timed
from lka_kernels import depthwise_conv2d, info

DIRECTIONS = ("forward", "backward-input", "backward-weight")
# Beside the networks' shapes: the small kernels and maps that oneDNN is best at.
SMALL = [
    shapes.Depthwise(f"{channels}@{side}-k{kernel}", 8, channels, side, side, (kernel, kernel))
    for channels, side in ((64, 56), (128, 28), (384, 14), (768, 7), (24, 112))
    for kernel in (3, 5, 7)
]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--match", default="", help="shapes whose name contains this")
    options = parser.parse_args(arguments)
    selected = [s for s in SMALL + shapes.DEPTHWISE if options.match in s.name]
    if not selected:
        parser.error(f"no shape's name contains {options.match!r}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    print(
        f"{info.processor_name()}, {info._extension.instruction_set()}, torch {torch.__version__}, "
        f"{options.threads} thread(s), {options.dtype}, stride {options.stride}: "
        "torch's time / ours"
    )
    print(" ".join(f"{k}={v}" for k, v in facts.malloc_settings().items()))
    print(f"{'shape':34}{'layout':>15}" + "".join(f"{d:>24}" for d in DIRECTIONS), flush=True)
    worst: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
    for shape in selected:
        for layout in (torch.contiguous_format, torch.channels_last):
            cells = []
            for direction in DIRECTIONS:
                ours, theirs = (
                    calls(function, shape, layout, dtype, direction, options.stride)
                    for function in (depthwise_conv2d, F.conv2d)
                )
                ratio, milliseconds = compare(ours, theirs, options.rounds)
                worst[direction].append(ratio)
                cells.append(f"{ratio:8.2f} ({milliseconds:8.3f} ms)")
            name = "contiguous" if layout == torch.contiguous_format else "channels_last"
            size = f"{shape.name} {shape.batch}x{shape.channels}@{shape.height}x{shape.width}"
            print(f"{size:34}{name:>15}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    for direction, ratios in worst.items():
        slower = sum(ratio < 0.95 for ratio in ratios)
        print(f"{direction}: worst {min(ratios):.2f}, {slower} of {len(ratios)} below 0.95")
    return 0


def calls(
    function,
    shape: shapes.Depthwise,
    layout: torch.memory_format,
    dtype: torch.dtype,
    direction: str,
    stride: int = 1,
) -> Callable[[], object]:
    """A call of ``function`` in ``direction`` that takes the next of several inputs each time."""
    geometry = (stride, shape.padding, shape.dilation)
    groups = () if function is depthwise_conv2d else (shape.channels,)

    def make():
        x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, dtype=dtype)
        return x.contiguous(memory_format=layout).requires_grad_(direction == "backward-input")

    weight = torch.randn(shape.channels, 1, *shape.kernel, dtype=dtype)
    bias = torch.randn(shape.channels, dtype=dtype)
    weight.requires_grad_(direction == "backward-weight")
    inputs = measure.random_inputs(make)

    def forward(x):
        return function(x, weight, bias, *geometry, *groups)

    if direction == "forward":
        turn = itertools.cycle(inputs)
        return lambda: forward(next(turn))
    graphs = [(forward(x), weight if direction == "backward-weight" else x) for x in inputs]
    grad = torch.randn_like(graphs[0][0])
    turn = itertools.cycle(graphs)

    def backward():
        output, leaf = next(turn)
        return torch.autograd.grad(output, leaf, grad, retain_graph=True)

    return backward


def compare(ours, theirs, rounds: int, budget: float = 20.0) -> tuple[float, float]:
    """Median of theirs / ours over paired rounds, and our median in milliseconds.

    A round takes at least two milliseconds of each, and all of them about ``budget`` seconds at
    most.
    """
    once = {call: timed(call, 1) for call in (ours, theirs) for _ in range(2)}
    repeats = {call: max(1, int(2e-3 / each)) for call, each in once.items()}
    rounds = max(3, min(rounds, int(budget / sum(each * repeats[c] for c, each in once.items()))))
    ratios, own = [], []
    for index in range(rounds):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        taken = {call: timed(call, repeats[call]) for call in order}
        ratios.append(taken[theirs] / taken[ours])
        own.append(taken[ours])
    return statistics.median(ratios), 1e3 * statistics.median(own)


if __name__ == "__main__":
    sys.exit(main())
