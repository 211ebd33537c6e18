"""Random calls of depthwise convolution: shapes, geometry and memory layouts."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "cropped",
    "cropped_channels_last",
    "rows_outermost",
    "transposed",
    "expanded",
    "expanded_channels",
)
# Equal columns times equal columns would make sums of equal terms, whose rounding errors all point
# one way; so the gradient does not have them.
INPUT_LAYOUTS = (*LAYOUTS, "expanded_columns")
# Multiply-adds of one example: bounds the time of the float64 truth, not what shapes can occur.
BUDGET = 4_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; ``padding`` as the public function takes it."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: object = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"

    @property
    def geometry(self) -> tuple:
        """Stride, padding and dilation, in the order of the public function."""
        return self.stride, self.padding, self.dilation

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        if self.padding == "same":
            return self.height, self.width
        pad = (0, 0) if self.padding == "valid" else self.padding
        return tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                (self.height, self.width),
                pad,
                self.dilation,
                self.kernel,
                self.stride,
                strict=True,
            )
        )

    @property
    def magnitudes(self) -> dict[str, float]:
        """Root mean square of each result for inputs that are standard normal.

        The rounding error of a sum follows its terms, also where they happen to cancel.
        """
        taps = math.prod(map(min, self.kernel, (self.height, self.width)))
        terms = self.batch * math.prod(self.output_size)
        return {
            "output": math.sqrt(taps + 1),
            "grad_input": math.sqrt(taps),
            "grad_weight": math.sqrt(terms),
            "grad_bias": math.sqrt(terms),
        }

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias: standard normal, in the layouts of this case."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.channels, self.height, self.width)
        input = lay_out(shape, self.layout, dtype, generator)
        weight = lay_out((self.channels, 1, *self.kernel), self.weight_layout, dtype, generator)
        if not self.bias:
            return input, weight, None
        return input, weight, torch.randn(self.channels, generator=generator).to(dtype)

    def grad_output(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """A standard normal gradient of the result, in the layout of this case."""
        generator = torch.Generator().manual_seed(seed)
        return lay_out(
            (self.batch, self.channels, *self.output_size), self.grad_layout, dtype, generator
        )


def lay_out(shape, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A standard normal tensor (B, C, H, W) with the strides that ``layout`` names."""
    b, c, h, w = shape

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    if layout == "contiguous":
        return normal(*shape)
    if layout == "channels_last":
        return normal(b, h, w, c).permute(0, 3, 1, 2)
    if layout == "sliced":  # strides in every dimension, an offset, unaligned addresses
        return normal(b, c + 1, 2 * h + 1, 3 * w + 2)[:, 1:, 1::2, 2::3]
    if layout == "cropped":  # contiguous rows, apart from each other
        return normal(b, c, h + 1, w + 3)[:, :, 1:, 2:-1]
    if layout == "cropped_channels_last":
        return normal(b, h + 1, w + 3, c)[:, 1:, 2:-1].permute(0, 3, 1, 2)
    if layout == "rows_outermost":
        return normal(h, b, c, w).permute(1, 2, 0, 3)
    if layout == "transposed":
        return normal(b, c, w, h).transpose(2, 3)
    if layout == "expanded":
        return normal(1, c, h, w).expand(shape)
    if layout == "expanded_channels":
        return normal(b, 1, h, w).expand(shape)
    assert layout == "expanded_columns"
    return normal(b, c, h, 1).expand(shape)


def _least_padding(size: int, extent: int) -> int:
    return max(0, -((size - extent) // 2))


@st.composite
def depthwise_cases(draw, *, max_channels=80, max_map=65, max_kernel=31, budget=BUDGET) -> Case:
    """Calls that F.conv2d accepts: every kernel, stride, dilation, padding and layout."""
    batch = draw(st.sampled_from((1, 2, 3, 1, 2, 5, 0)))
    map_size = st.one_of(st.integers(1, min(16, max_map)), st.integers(1, max_map))
    height, width = draw(map_size), draw(map_size)
    kernel_size = st.one_of(st.integers(1, min(9, max_kernel)), st.integers(1, max_kernel))
    kernel = (draw(kernel_size), draw(kernel_size))
    if draw(st.booleans()):
        kernel = (kernel[0], kernel[0])
    stride = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 1), (1, 2), (5, 4))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 3), (4, 2), (3, 3))))
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    least = (_least_padding(height, extent[0]), _least_padding(width, extent[1]))
    kinds = ["int", "pair"]
    if stride == (1, 1):
        kinds += ["same", "same"]
    if least == (0, 0):
        kinds.append("valid")
    kind = draw(st.sampled_from(kinds))
    if kind == "int":
        padding = max(least) + draw(st.integers(0, 3))
        padding = (padding, padding)
    elif kind == "pair":
        padding = tuple(
            p + draw(st.integers(0, max(2, e // 2))) for p, e in zip(least, extent, strict=True)
        )
    else:
        padding = kind
    case = Case(
        batch,
        1,
        height,
        width,
        kernel,
        stride,
        padding,
        dilation,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(INPUT_LAYOUTS)),
        weight_layout=draw(st.sampled_from(("contiguous", "channels_last", "sliced"))),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
    )
    per_channel = max(1, batch) * math.prod(case.output_size) * math.prod(kernel)
    most = max(1, min(max_channels, budget // per_channel))
    # Around the vector widths, where the last lanes are masked, and anywhere.
    few = [c for c in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 80) if c <= most]
    channels = draw(st.one_of(st.sampled_from(few), st.integers(1, most)))
    return dataclasses.replace(case, channels=channels)
