"""What is measured: shapes of published networks, the grid of the adapter, known losing cases.

``batch`` suits a small CPU and is what ``paired.py`` and the default selection of a CPU take. On
a GPU the default is the largest of its BATCHES up to 64 that it allows; ``--suite full`` takes all
that the device allows.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import roofline

# On a CPU a larger batch is the same work several times over.
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64, 128)}
# What a device allows: unclipped GFLOP of one forward pass, so that torch's slowest path on a CPU
# (3 GFLOP/s) takes seconds a call, and elements of the input, so that several buffers fit.
MOST_GFLOP = {"cpu": 10, "cuda": 20_000}
MOST_ELEMENTS = {"cpu": 2**27, "cuda": 2**30}


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

    @property
    def size(self) -> str:
        """The shape in words."""
        dilated = f" dilation {self.dilation}" if self.dilation > 1 else ""
        return (
            f"({self.batch}, {self.channels}, {self.height}, {self.width}) "
            f"K {self.kernel[0]}x{self.kernel[1]}{dilated}"
        )

    @property
    def longest(self) -> int:
        """The kernel's longer side."""
        return max(self.kernel)

    @property
    def elements(self) -> int:
        """Elements of the input."""
        return self.batch * self.channels * self.height * self.width

    def work(self, direction: str, element_size: int = 4) -> roofline.Work:
        """Bytes and FLOPs."""
        return roofline.depthwise(
            direction,
            self.batch,
            self.channels,
            (self.height, self.width),
            self.kernel,
            padding=self.padding,
            dilation=(self.dilation, self.dilation),
            element_size=element_size,
        )


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

    @property
    def size(self) -> str:
        """The shape in words."""
        prefix = f"{self.prefix}+" if self.prefix else ""
        return (
            f"({self.batch}, {prefix}{self.side}x{self.side}, {self.dim}) "
            f"r {self.rank} K {self.kernel}"
        )

    @property
    def longest(self) -> int:
        """The kernel's side."""
        return self.kernel

    @property
    def elements(self) -> int:
        """Elements of the input."""
        return self.batch * (self.prefix + self.side**2) * self.dim

    def work(self, direction: str, element_size: int = 4) -> roofline.Work:
        """Bytes and FLOPs; the residual is x itself."""
        return roofline.adapter(
            direction,
            self.batch,
            (self.side, self.side),
            self.dim,
            self.rank,
            (self.kernel, self.kernel),
            prefix=self.prefix,
            element_size=element_size,
        )


def square(name, batch, channels, side, kernel, **options) -> Depthwise:
    """A square map and kernel."""
    return Depthwise(name, batch, channels, side, side, (kernel, kernel), **options)


DEPTHWISE = [
    # RepLKNet-31B (arXiv 2203.06717): the four stages.
    square("replknet-1", 1, 128, 56, 31, default=True),
    square("replknet-2", 1, 256, 28, 29, default=True),
    square("replknet-3", 1, 512, 14, 27, default=True),
    square("replknet-4", 2, 1024, 7, 13, default=True),
    # ConvNeXt-L (arXiv 2201.03545).
    square("convnext-l-1", 1, 192, 56, 7, default=True),
    square("convnext-l-2", 1, 384, 28, 7, default=True),
    square("convnext-l-3", 2, 768, 14, 7, default=True),
    square("convnext-l-4", 8, 1536, 7, 7, default=True),
    # SLaK (arXiv 2207.03620): two stripes and a small square instead of a large square.
    Depthwise("slak-1-tall", 1, 96, 56, 56, (51, 5), default=True),
    Depthwise("slak-1-wide", 1, 96, 56, 56, (5, 51)),
    square("slak-1-square", 1, 96, 56, 51),
    square("slak-1-small", 1, 96, 56, 5),
    Depthwise("slak-2-tall", 1, 192, 28, 28, (51, 5)),
    Depthwise("slak-2-wide", 1, 192, 28, 28, (5, 51), default=True),
    square("slak-2-square", 1, 192, 28, 51),
    square("slak-2-small", 1, 192, 28, 5),
    # VAN's large kernel attention (arXiv 2202.09741): 5x5, then 7x7 with dilation 3.
    square("van-1-5", 2, 64, 56, 5),
    square("van-1-dilated", 2, 64, 56, 7, dilation=3),
    square("van-2-5", 2, 128, 28, 5, default=True),
    square("van-2-dilated", 2, 128, 28, 7, dilation=3, default=True),
    square("van-3-5", 2, 320, 14, 5),
    square("van-3-dilated", 2, 320, 14, 7, dilation=3),
    square("van-4-5", 2, 512, 7, 5),
    square("van-4-dilated", 2, 512, 7, 7, dilation=3),
    # The adapter's own convolution.
    square("adapter-1", 8, 8, 56, 7),
    square("adapter-3-k31", 8, 8, 14, 31),
    # Where PyTorch is at its best.
    square("mobile-k3", 8, 64, 56, 3, default=True),
    # Cases that earlier libraries lost.
    Depthwise("one-row", 1, 64, 56, 56, (1, 31)),
    Depthwise("weather", 1, 1536, 90, 180, (7, 7)),
]

# RepLKNet's table of speeds, published for batch 64; and a case that its kernels lost.
TABLE = [
    *(
        square(f"table-{side}-k{kernel}", 1, 384, side, kernel)
        for side in (16, 32, 64)
        for kernel in range(3, 32, 4)
    ),
    Depthwise("tall-map", 1, 384, 256, 200, (31, 31)),
]

_STAGES = (("stage-1", 56, 96, 0), ("stage-2", 28, 192, 0), ("stage-3", 14, 384, 0))
_STAGES += (("stage-4", 7, 768, 0), ("vit-b", 14, 768, 1))

ADAPTER = [
    *(
        Adapter(
            f"{name}-r{rank}-k{kernel}",
            8,
            side,
            dim,
            rank,
            kernel,
            prefix,
            (rank, kernel) == (8, 7),
        )
        for rank in (4, 8, 16, 64, 256)
        for kernel in (3, 7, 13, 31, 51, 91)
        for name, side, dim, prefix in _STAGES
    ),
    Adapter("swin-l-1-r64-k31", 8, 56, 192, rank=64, kernel=31, default=True),
    Adapter("vit-l-r64-k31", 8, 14, 1024, rank=64, kernel=31, default=True),
]


def selected(shapes: list, suite: str, device: str) -> list:
    """The shapes, with their batches, of a suite ("default" or "full") on a device."""
    found = []
    for shape in shapes:
        batches = [b for b in BATCHES[device] if allowed(shape._replace(batch=b), device)]
        if suite == "full":
            # What a shape itself says is measured in any case.
            batches = sorted({*batches, shape.batch}) if device == "cpu" else batches
        elif not shape.default:
            continue
        elif device == "cpu":
            batches = [shape.batch]
        else:
            batches = [b for b in batches if b <= 64][-1:]
        found += [shape._replace(name=f"{shape.name}-b{b}", batch=b) for b in batches]
    return found


def allowed(shape, device: str) -> bool:
    """Whether the device takes this shape with its batch."""
    gflop = shape.work("forward").unclipped_flops / 1e9
    return gflop <= MOST_GFLOP[device] and shape.elements <= MOST_ELEMENTS[device]
