"""Taps, strides and precision: what every plan of a depthwise convolution needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import tiles
from lka_kernels.backends.triton.launch import dot_precision

INT32_END = 2**31


class Taps(NamedTuple):
    """The taps of one dimension that some output meets on the map; all others are left out."""

    first: int
    count: int
    before: int  # padding in front of the first tap; negative where the map is cropped


def taps_that_touch(size: int, out_size: int, taps: int, before: int, dilation: int) -> Taps:
    """The range of ``taps``; ``before`` is the padding in front of a map of ``size`` elements."""
    first = max(0, tiles.ceil_div(before - (out_size - 1), dilation))
    end = min(taps, (size - 1 + before) // dilation + 1)
    # One tap is kept where none touches: the kernels then need no such case.
    first = min(first, taps - 1)
    return Taps(first, max(1, end - first), before - first * dilation)


def vector_of(t: Tensor) -> int:
    """Elements, up to 16 bytes, of which rows, planes and images of ``t`` are multiples."""
    vector = 16 // t.element_size()
    if t.shape[3] > 1 and t.stride(3) != 1:
        return 1
    while any(n % vector for n in (t.shape[3], *t.stride()[:3])):
        vector //= 2
    return vector


def extent(t: Tensor, images: int) -> int:
    """More than the offsets within a plane, or within ``images`` images of a channel."""
    return images * t.stride(0) + 2 * t.shape[2] * t.stride(2) + 2 * t.shape[3] * t.stride(3)


def channels_in_lanes(t: Tensor) -> bool:
    """Whether neighbouring channels, and no neighbouring columns, are neighbours in memory."""
    return t.stride(1) == 1 and t.stride(3) != 1


def precision(dtype: torch.dtype) -> str:
    """The precision of ``tl.dot``: the switch is that of torch's own convolutions."""
    return dot_precision(dtype, torch.backends.cudnn.conv)


def in_vectors(strides: tuple[int, ...], vector: int) -> tuple[int, ...]:
    """Strides (b, c, y) in units of ``vector`` and the stride of a column as it is."""
    return (*(stride // vector for stride in strides[:3]), strides[3])
