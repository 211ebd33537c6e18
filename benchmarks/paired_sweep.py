"""Which of many small problems are slower than ``F.conv2d`` in the layout that they are given?

    python benchmarks/paired_sweep.py [--dtype float32] [--threads 1] [--channels 3 16 20 64 192]
                                      [--stride 1 | --geometries] [--itself]

Goes through batches of 1 and 8, maps of 7 to 56 and every direction and layout: kernels of 3, 5 and
7 with one stride, or a list of extents, strides and dilations. Whatever is below 0.97 at first is
measured twice more, longer and with new tensors, and printed if it stays below 0.95. As in
``paired.py``, whose calls these are, inputs take turns; set glibc's variables as described there.

``--itself`` compares ``F.conv2d`` with ``F.conv2d`` on tensors of its own: what is printed then
lies below 0.95 by chance, by where tensors stand and what is in the caches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import paired, shapes
from lka_kernels import depthwise_conv2d, info

CHANNELS = (3, 16, 20, 64, 192)
SIZES = (7, 14, 28, 56)
LARGEST_MAP = 2_000_000  # elements
# Kernel, stride, dilation: even, long, large and single, with strides and dilations.
GEOMETRIES = [
    ((k, k), stride, dilation)
    for k, stride, dilation in (
        *((k, 1, 1) for k in (1, 2, 4, 6, 9, 11, 13, 31)),
        *((k, 2, 1) for k in (1, 2, 8, 9, 13)),
        *((3, 3, 1), (4, 4, 1), (5, 4, 1), (3, 2, 2)),
        *((3, 1, 2), (5, 1, 2), (3, 1, 3), (7, 1, 3)),
    )
] + [(kernel, 1, 1) for k in (7, 11, 21) for kernel in ((1, k), (k, 1))]


class Cell(NamedTuple):
    """One measurement."""

    shape: shapes.Depthwise
    stride: int
    layout: torch.memory_format
    direction: str

    def ratio(
        self, dtype: torch.dtype, rounds: int, seconds: float, function=depthwise_conv2d
    ) -> tuple[float, float]:
        """Torch's time divided by that of ``function``, and the latter in milliseconds."""
        ours, theirs = (
            paired.calls(call, self.shape, self.layout, dtype, self.direction, self.stride)
            for call in (function, F.conv2d)
        )
        return paired.compare(ours, theirs, rounds, seconds)


def main(arguments: list[str] | None = None) -> int:
    """Print the slower cells; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--geometries", action="store_true")
    parser.add_argument("--itself", action="store_true", help="F.conv2d against itself")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    geometries = (
        GEOMETRIES if options.geometries else [((k, k), options.stride, 1) for k in (3, 5, 7)]
    )
    print(
        f"{info.processor_name()}, {info._extension.instruction_set()}, torch {torch.__version__}, "
        f"{options.threads} thread(s), {options.dtype}: torch's time / "
        + ("its own" if options.itself else "ours"),
        flush=True,
    )
    function = F.conv2d if options.itself else depthwise_conv2d
    suspects, total = [], 0
    for cell in cells(options.channels, options.sizes, geometries):
        total += 1
        if cell.ratio(dtype, 3, 0.1, function)[0] < 0.97:
            suspects.append(cell)
    slower = 0
    for cell in suspects:
        ratio, milliseconds = max(cell.ratio(dtype, 15, 1.0, function) for _ in range(2))
        if ratio < 0.95:
            slower += 1
            layout = "contiguous" if cell.layout == torch.contiguous_format else "channels_last"
            print(
                f"{cell.shape.size:48} stride {cell.stride} {layout:14} {cell.direction:16}"
                f"{ratio:6.2f} ({milliseconds:.3f} ms)",
                flush=True,
            )
    print(f"{total} cells, {slower} below 0.95")
    return 0


def cells(channels: list[int], sizes: list[int], geometries: list) -> Iterator[Cell]:
    """All combinations that are not too large; kernels above 8 with at most 64 channels."""
    for batch, count, size in itertools.product((1, 8), channels, sizes):
        if batch * count * size * size > LARGEST_MAP:
            continue
        for kernel, stride, dilation in geometries:
            if max(kernel) > 2 * size or (min(kernel) > 8 and count > 64):
                continue
            shape = shapes.Depthwise("", batch, count, size, size, kernel, dilation)
            for layout in (torch.contiguous_format, torch.channels_last):
                for direction in paired.DIRECTIONS:
                    yield Cell(shape, stride, layout, direction)


if __name__ == "__main__":
    sys.exit(main())
