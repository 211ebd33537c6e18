"""Gradients that are first written as partial sums, and the launch that adds these up."""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import tiles
from lka_kernels.backends.triton.launch import Launch
from lka_kernels.backends.triton.partial_sums_kernel import sum_partials_kernel

_MOST_TOTALS = 6


class PartialSums:
    """Totals and their partial sums, each a row, added from the first row to the last.

    The order depends on the number of rows alone, so that gradients are the same from run to run.
    """

    def __init__(self):
        self._segments: list[tuple[Tensor, Tensor]] = []
        self._taps: tuple = (None,) * 6

    def rows(self, total: Tensor | None, count: int) -> Tensor | None:
        """A workspace (count, elements of total), or None without a total."""
        if total is None:
            return None
        partials = total.new_empty((count, total.numel()), dtype=torch.float32)
        self.add(partials, total)
        return partials

    def add(self, partials: Tensor, total: Tensor) -> None:
        """Add ``partials`` (rows, elements of ``total``), with any stride of its rows."""
        self._segments.append((partials, total))

    def add_taps(
        self, partials: Tensor, total: Tensor, first: tuple[int, int], count: tuple[int, int]
    ) -> None:
        """Add those of kernels (C, 1, kH, kW) as the first total.

        Only ``count`` taps from ``first`` on have partial sums, the others are 0.
        """
        self._segments.insert(0, (partials, total))
        height, width = total.shape[2:]
        if tuple(count) != (height, width):
            self._taps = (*first, *count, width, height * width)

    def launches(self) -> list[Launch]:
        """The launch, if there is anything to add."""
        if not self._segments:
            return []
        block, rows = tiles.sum_tiles(max(partials.shape[0] for partials, _ in self._segments))
        arguments = []
        for partials, total in self._segments:
            count, size = partials.shape
            arguments += (partials, count, partials.stride(0), size, total)
        arguments += (None, 0, 0, 0, None) * (_MOST_TOTALS - len(self._segments))
        programs = sum(tiles.ceil_div(total.numel(), block) for _, total in self._segments)
        constants = {"BLOCK": block, "ROWS": rows}
        return [Launch(sum_partials_kernel, programs, (*arguments, *self._taps), constants, 4, 3)]
