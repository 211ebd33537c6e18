"""Tile sizes of the Triton kernels: pure functions of shape, dtype and number of multiprocessors.

None of these numbers has been measured on a GPU yet; each is reasoned, and the reason stands beside
it. ``docs/kernel-notes.md`` has the estimates they lead to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of an H100 (SXM). Used where there is no device to ask.
DEFAULT_MULTIPROCESSORS = 132


class AdapterTiles(NamedTuple):
    """What the kernels of the adapter are built with.

    Attributes:
        block_t: tokens of a program.
        block_c: channels of the width at a time.
        block_r: channels of the rank, a power of two not below r.
        pad: whether the rank must be padded to twice its block for the tensor cores.
        convolve_in_up: whether the up-projection's program convolves its own tokens.
        weights_apart: whether the gradients of the projections' weights have launches of their own.
        blocks_of_c: blocks of channels that one program of the up-projection writes.
        unroll: taps of a kernel row that are unrolled.
        num_warps, num_stages: of every kernel but the sum of partial sums.
    """

    block_t: int
    block_c: int
    block_r: int
    pad: bool
    convolve_in_up: bool
    weights_apart: bool
    blocks_of_c: int
    unroll: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n ≥ 1."""
    return 1 << (n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; those of an H100 where it has none."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


# Rank block, at most -> (block_t, block_c, num_warps, num_stages). A program holds [block_t, rank],
# [block_c, rank] and [block_t, block_c] sums at once: the more of the rank, the fewer of the
# others, so that none is kept in memory (tests/offline). float32 runs on the FMA units, whose
# operands are all in registers.
_ADAPTER_16_BIT = {
    16: (128, 64, 4, 3),
    32: (64, 64, 4, 3),
    64: (64, 64, 8, 3),
    128: (32, 64, 8, 2),
    256: (32, 32, 8, 2),
}
_ADAPTER_FLOAT32 = {
    16: (64, 32, 4, 3),
    32: (32, 32, 4, 3),
    64: (32, 32, 8, 3),
    128: (16, 32, 8, 2),
    256: (16, 16, 16, 2),
}
MOST_RANK = max(_ADAPTER_16_BIT)


def adapter_tiles(
    num_tokens: int, dim: int, r: int, taps: tuple[int, int], dtype: torch.dtype, num_sms: int
) -> AdapterTiles:
    """Tiles for ``num_tokens`` tokens of ``dim`` channels; ``taps`` are those that can touch."""
    # 8 is the narrowest column block of the matrix instructions. Their sums have at least 16
    # terms in 16-bit types, 8 in float32.
    block_r = max(8, next_power_of_2(r))
    pad = dtype != torch.float32 and block_r < 16
    table = _ADAPTER_FLOAT32 if dtype == torch.float32 else _ADAPTER_16_BIT
    block_t, block_c, num_warps, num_stages = table[max(16, block_r)]
    if block_t == 128 and num_tokens >= 4 * 256 * num_sms:
        # Many tokens: half as many partial sums. Two stages, to leave room for a second program.
        block_t, num_warps, num_stages = 256, 8, 2
    while block_t > 32 and num_tokens < block_t * num_sms:
        block_t //= 2  # few tokens: rather use every multiprocessor
    blocks = -(-dim // block_c)
    programs = -(-num_tokens // block_t)
    # With still fewer programs than multiprocessors, each convolves the same tokens again for a
    # part of the channels: the rank-r tensor is in the cache, and the convolution is short.
    splits = max(1, min(blocks, num_sms // max(1, programs)))
    # A tap, channel and token takes about 5 instructions of the 128 that a multiprocessor makes in
    # a cycle; a channel of x, y and the residual takes 6 bytes of the 13 that an H100's memory
    # gives each of them: below about 8 taps a channel the convolution hides behind memory.
    # Sums of more than 16 channels would leave the projection too few registers.
    convolve_in_up = block_r <= 16 and taps[0] * taps[1] * r * splits <= 8 * dim
    # Written and read once, float32 partial sums for every tile cost 8·r bytes a channel; to read
    # the tile once more costs its own bytes.
    weights_apart = 8 * r > dtype.itemsize * block_t
    return AdapterTiles(
        block_t=block_t,
        block_c=block_c,
        block_r=block_r,
        pad=pad,
        convolve_in_up=convolve_in_up,
        weights_apart=weights_apart,
        blocks_of_c=-(-blocks // splits),
        # All loads of an unrolled row are under way together; longer rows take it in pieces.
        unroll=taps[1] if 1 <= taps[1] <= 13 else 8,
        num_warps=num_warps,
        num_stages=num_stages,
    )
