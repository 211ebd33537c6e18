"""Calls of depthwise convolution with stride 1, and what they should give."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "cropped", "sliced", "transposed")


class Case(NamedTuple):
    """``padding`` is (top, left, bottom, right)."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int] = (1, 1)
    layout: str = "contiguous"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = (
            n + self.padding[i] + self.padding[i + 2] - self.dilation[i] * (self.kernel[i] - 1)
            for i, n in enumerate((self.height, self.width))
        )
        return self.batch, self.channels, *size

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        top, left, bottom, right = self.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, dilation=self.dilation, groups=self.channels)

    def backward_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        x = torch.zeros(self.shape, dtype=grad_output.dtype, requires_grad=True)
        return torch.autograd.grad(self.forward(x, weight), x, grad_output)[0]

    def backward_weight(self, grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.zeros(self.channels, 1, *self.kernel, dtype=x.dtype, requires_grad=True)
        grad = torch.autograd.grad(self.forward(x, weight), weight, grad_output)[0]
        return grad, grad_output.sum((0, 2, 3))

    def check(self, result: Tensor, truth: Tensor, terms: int | None = None) -> None:
        """Sums in float32 that are rounded once: half a unit of the result, and of the sums
        what ``terms`` products of standard normal numbers make, all roundings pointing one way.
        """
        terms = math.prod(self.kernel) + 1 if terms is None else terms
        eps = torch.finfo(result.dtype).eps
        error = (result.double() - truth).abs()
        allowed = truth.abs() * eps / 2 + terms * math.sqrt(terms) * torch.finfo(torch.float32).eps
        if result.dtype == torch.float16:
            allowed = allowed + 2.0**-25  # half of the least step there is
        worst = (error - allowed).max() if error.numel() else torch.tensor(0.0)
        assert error.isfinite().all(), "elements that are not finite, or were never written"
        assert worst <= 0, f"{error.max():.3g} from the truth, {worst:.3g} more than allowed"


def spread(t: Tensor, layout: str) -> Tensor:
    """``t`` in a layout; elements of its memory that are not its own are NaN."""
    b, c, h, w = t.shape

    def view(shape, index) -> Tensor:
        room = torch.full(shape, torch.nan, dtype=t.dtype)
        return index(room).copy_(t)

    if layout == "channels_last":
        return view((b, h, w, c), lambda room: room.permute(0, 3, 1, 2))
    if layout == "cropped":
        return view((b, c, h + 1, w + 3), lambda room: room[:, :, 1:, 2:-1])
    if layout == "sliced":
        return view((b, c + 1, 2 * h, 2 * w + 1), lambda room: room[:, 1:, ::2, 1::2])
    if layout == "transposed":
        return view((b, c, w, h), lambda room: room.transpose(2, 3))
    return view((b, c, h, w), lambda room: room[:])


def _same(k: int, dilation: int = 1) -> tuple[int, int]:
    total = (k - 1) * dilation
    return total // 2, total - total // 2


def same(batch, channels, height, width, kernel, dilation=(1, 1), layout="contiguous") -> Case:
    """A case with "same" padding."""
    (top, bottom), (left, right) = (_same(k, d) for k, d in zip(kernel, dilation, strict=True))
    padding = (top, left, bottom, right)
    return Case(batch, channels, height, width, kernel, padding, dilation, layout)


CASES = [
    same(1, 1, 7, 7, (7, 7)),
    same(17, 2, 7, 7, (7, 7)),
    same(3, 5, 14, 14, (7, 7)),
    same(2, 8, 14, 14, (7, 7), layout="channels_last"),
    same(2, 11, 9, 12, (5, 5), layout="channels_last"),
    same(2, 24, 12, 33, (3, 3), layout="channels_last"),
    same(1, 3, 30, 70, (4, 6)),
    same(2, 1, 29, 28, (31, 31)),
    same(1, 8, 18, 28, (31, 31), layout="channels_last"),
    same(2, 2, 7, 7, (13, 13)),
    same(1, 2, 30, 34, (43, 43)),  # two stages instead of four
    same(1, 1, 6, 5, (51, 51)),
    same(1, 1, 40, 41, (51, 5)),
    same(1, 1, 41, 40, (5, 51)),
    same(2, 3, 20, 24, (7, 7), (3, 3)),
    same(2, 8, 16, 16, (7, 7), (3, 3), "channels_last"),
    same(2, 2, 17, 19, (3, 4), (2, 5)),
    same(1, 2, 1, 50, (1, 31)),
    same(1, 2, 50, 1, (31, 1)),
    same(5, 3, 8, 9, (1, 1)),
    Case(2, 2, 10, 11, (3, 4), (0, 0, 0, 0)),
    Case(2, 2, 10, 11, (3, 4), (5, 0, 1, 7)),
    Case(1, 2, 6, 6, (3, 3), (9, 8, 0, 7)),
    Case(3, 3, 12, 20, (5, 6), (2, 3, 2, 2), layout="cropped"),
    Case(3, 3, 12, 20, (5, 6), (2, 3, 2, 2), layout="sliced"),
]
