"""What launches must move, counted from their arguments: an estimate, not a measurement."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lka_kernels.backends.triton.launch import Launch, Transform

# A third of an H100's second-level cache: partial sums that fit it are supposed to stay there from
# the launch that writes them to the one that adds them, as what streams by is marked to be evicted
# first. Whether they do has not been measured.
CACHED_BYTES = 50 * 2**20 // 3


class Traffic(NamedTuple):
    """Bytes of a sequence of launches.

    Attributes:
        memory: bytes that cross between the chip and its memory.
        cache: bytes of partial sums and scratch that are written and read within the cache.
        launches: how many there are; transforms may be several each and are not among them.
    """

    memory: int
    cache: int
    launches: int


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def transform_bytes(transform: Transform) -> int:
    """The fewest bytes of a transform: cuFFT may take more passes than one.

    torch.fft copies the source of an inverse transform, which cuFFT may overwrite
    (``_fft_c2r_cufft`` in PyTorch's SpectralOps.cpp).
    """
    copies = 2 * _bytes(transform.source) if transform.inverse else 0
    return copies + _bytes(transform.source) + _bytes(transform.result)


def traffic(steps: list[Launch | Transform]) -> Traffic:
    """Count every tensor argument once for each launch that has it.

    This is exact where programs share no input, and supposes that what they do share (weights, the
    halo of the convolution) is read from memory once. Float32 workspaces of partial sums, and the
    scratch of programs, count as cache traffic if all of them fit ``CACHED_BYTES``.
    """
    launches = [step for step in steps if isinstance(step, Launch)]
    partial = 0
    memory = sum(transform_bytes(step) for step in steps if isinstance(step, Transform))
    for launch in launches:
        names = launch.kernel.arg_names
        for name, argument in zip(names, launch.arguments, strict=False):
            if not isinstance(argument, Tensor):
                continue
            size = _bytes(argument)
            if "partials" in name:
                partial += size
            elif name == "scratch":  # written and read by the same program
                partial += 2 * size
            else:
                memory += size
    if partial / 2 <= CACHED_BYTES:  # each workspace is written once and read once
        return Traffic(memory, partial, len(launches))
    return Traffic(memory + partial, 0, len(launches))
