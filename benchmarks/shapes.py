"""What is measured: shapes of published networks. The default selection suits a small CPU."""

from __future__ import annotations

from typing import NamedTuple


class Depthwise(NamedTuple):
    """One depthwise convolution with "same" padding."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    dilation: int = 1
    default: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Padding at each edge; every kernel here is odd."""
        return tuple(self.dilation * (k // 2) for k in self.kernel)


class Adapter(NamedTuple):
    """One large kernel adapter with bottleneck width ``rank``."""

    name: str
    batch: int
    side: int
    dim: int
    rank: int = 8
    kernel: int = 7
    prefix: int = 0
    default: bool = False


DEPTHWISE = [
    Depthwise("convnext-l-1", 1, 192, 56, 56, (7, 7), default=True),
    Depthwise("convnext-l-2", 1, 384, 28, 28, (7, 7)),
    Depthwise("convnext-l-3", 2, 768, 14, 14, (7, 7), default=True),
    Depthwise("convnext-l-4", 8, 1536, 7, 7, (7, 7)),
    Depthwise("replknet-1", 1, 128, 56, 56, (31, 31), default=True),
    Depthwise("replknet-2", 1, 256, 28, 28, (29, 29)),
    Depthwise("replknet-3", 1, 512, 14, 14, (27, 27)),
    Depthwise("replknet-4", 2, 1024, 7, 7, (13, 13), default=True),
    Depthwise("slak-tall", 1, 96, 56, 56, (51, 5), default=True),
    Depthwise("slak-wide", 1, 96, 56, 56, (5, 51)),
    Depthwise("slak-square", 1, 96, 28, 28, (51, 51)),
    Depthwise("van-5", 2, 128, 28, 28, (5, 5)),
    Depthwise("van-7-dilated", 2, 128, 28, 28, (7, 7), dilation=3, default=True),
    Depthwise("adapter-1", 8, 8, 56, 56, (7, 7), default=True),
    Depthwise("adapter-3-k31", 8, 8, 14, 14, (31, 31)),
    Depthwise("one-row", 1, 64, 56, 56, (1, 31)),
    Depthwise("weather", 1, 1536, 90, 180, (7, 7)),
]

ADAPTER = [
    Adapter("swin-t-1", 8, 56, 96, default=True),
    Adapter("swin-t-2", 8, 28, 192),
    Adapter("swin-t-3", 8, 14, 384, default=True),
    Adapter("swin-t-4", 8, 7, 768, default=True),
    Adapter("vit-b", 8, 14, 768, prefix=1, default=True),
    Adapter("vit-b-k3", 8, 14, 768, kernel=3, prefix=1),
    Adapter("vit-b-r64", 8, 14, 768, rank=64, prefix=1),
    Adapter("swin-t-1-k31", 8, 56, 96, kernel=31),
]


def selected(shapes: list, everything: bool) -> list:
    """All shapes, or the default selection."""
    return [shape for shape in shapes if everything or shape.default]
