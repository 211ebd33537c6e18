"""Tiles of the adapter's kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lka_kernels.tiles.machine import (
    BYTES_PER_CLOCK,
    CHIP_BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LATENCY,
    LAUNCH_CLOCKS,
    NEAR_LATENCY,
    PRODUCTS_PER_CLOCK,
    ceil_div,
    next_power_of_2,
)

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
# A program that convolves its own tokens loads the map once for every tap. On an H100 (bfloat16)
# all programs together made about a million of these loads in a microsecond, where a launch of
# depthwise convolution, which loads a row once for all of its taps, took 5 of them at least:
# forward 30 µs against 33 with 4.9 million loads (14²+1 tokens), 134 against 87 with 79 million
# (56²). Backward has two convolutions, of which that of the taps' gradient took 2 to 4 times more:
# 110 µs against 90, 518 against 183.
_MOST_LOADS_OF_TAPS = {"forward": 6_000_000, "backward": 1_500_000}
# Programs that share a multiprocessor and hide what each waits for.
_RESIDENT = 4
# What 8.6 and 8.9 give a program is 99 KiB; what is copied ahead leaves some for exchanges.
_MOST_STAGED_BYTES = 80 * 1024
# z of a program's tokens and of all that they meet, which is to stay in the first-level cache.
_MOST_SCRATCH_BYTES = 16 * 1024


class AdapterTiles(NamedTuple):
    """What the kernels of the adapter are built with.

    Attributes:
        block_t: tokens of a program.
        block_c: channels of the width at a time.
        block_r: channels of the rank, a power of two not below r.
        pad: whether the rank must be padded to twice its block for a product.
        convolve_apart: whether the convolution and its gradients are launches of depthwise
            convolution; else the up-projection's program convolves its own tokens.
        weights_apart: whether the gradients of the projections' weights have launches of their own.
        blocks_of_c: blocks of channels that one program of the up-projection writes.
        unroll: taps of a kernel row that are unrolled.
        num_warps, num_stages: of every kernel but the sum of partial sums.
    """

    block_t: int
    block_c: int
    block_r: int
    pad: bool
    convolve_apart: bool
    weights_apart: bool
    blocks_of_c: int
    unroll: int
    num_warps: int
    num_stages: int


class OneLaunchTiles(NamedTuple):
    """What the adapter's forward in one launch is built with.

    Attributes:
        block_t: tokens of a program.
        block_w: tokens, of these and what they can meet, whose z is computed at a time.
        block_c: channels of x at a time.
        block_up, blocks_of_c: channels of y at a time, and how often.
        num_warps, num_stages: of the kernel.
        clocks: of a multiprocessor of an H100, estimated, with the launch.
    """

    block_t: int
    block_w: int
    block_c: int
    block_up: int
    blocks_of_c: int
    num_warps: int
    num_stages: int
    clocks: float


def adapter_tiles(
    num_tokens: int,
    dim: int,
    r: int,
    taps: tuple[int, int],
    dtype: torch.dtype,
    num_sms: int,
    direction: str = "forward",
) -> AdapterTiles:
    """Tiles for ``num_tokens`` tokens of ``dim`` channels; ``taps`` are those that can touch.

    ``direction`` is "forward" or "backward".
    """
    # 8 is the narrowest column block of the matrix instructions. Their sums have at least 16
    # terms; in float32 Triton 3.6 compiles none of fewer either, though 3.8 does.
    block_r = max(8, next_power_of_2(r))
    pad = block_r < 16
    table = _ADAPTER_FLOAT32 if dtype == torch.float32 else _ADAPTER_16_BIT
    block_t, block_c, num_warps, num_stages = table[max(16, block_r)]
    if block_t == 128:
        # Measured on an H100, r = 8, 7×7, batch 64: forward takes 71 µs on 56² × 96 with 64 tokens
        # and 128 channels, 79 with 128 and 64, 87 with 256 and 64. Backward takes 82 on 14²+1 × 768
        # with 64 and 128, 88 with 128 and 128, 90 with 64 and 64; on 56² × 96, where tiles of 64
        # tokens have too many partial sums, 167 with 128 and 32, and 177 with 128 and 64.
        many = num_tokens >= 2 * 128 * num_sms
        block_t = 128 if direction == "backward" and many else 64
        block_c = 128
        if direction == "backward" and dim < 256:
            block_c = next((block for block in (128, 64, 32) if dim % block == 0), 64)
        num_stages = 4 if block_t == 64 else 3
    while block_t > 32 and num_tokens < block_t * num_sms:
        block_t //= 2  # few tokens: rather use every multiprocessor
        num_stages = min(6, num_stages + 2)  # and have as many loads under way as before
    blocks = -(-dim // block_c)
    programs = -(-num_tokens // block_t)
    # A block of channels waits for its residual, which only other programs on the multiprocessor
    # hide: with few, several convolve the same tokens, each for a part of the channels. The
    # rank-r tensor is in the cache, and the convolution is short.
    splits = max(1, min(blocks, 4 * num_sms // max(1, programs)))
    # Programs that share tokens should not convolve them again and again, and sums of more than 16
    # channels would leave the projection too few registers.
    loads = num_tokens * taps[0] * taps[1] * r
    affordable = 8 * dim // max(1, taps[0] * taps[1] * r)
    needed = max(1, min(splits, num_sms // max(1, programs)))
    convolve_apart = block_r > 16 or affordable < needed or loads > _MOST_LOADS_OF_TAPS[direction]
    if not convolve_apart:
        splits = min(splits, affordable)
    # Written and read once, float32 partial sums for every tile cost 8·r bytes a channel; to read
    # the tile once more costs its own bytes.
    weights_apart = 8 * r > dtype.itemsize * block_t
    return AdapterTiles(
        block_t=block_t,
        block_c=block_c,
        block_r=block_r,
        pad=pad,
        convolve_apart=convolve_apart,
        weights_apart=weights_apart,
        blocks_of_c=-(-blocks // splits),
        # All loads of an unrolled row are under way together; longer rows take it in pieces.
        unroll=taps[1] if 1 <= taps[1] <= 13 else 8,
        num_warps=num_warps,
        num_stages=num_stages,
    )


class _Part(NamedTuple):
    """Clocks of a part of a program: until it is done alone, and how long it keeps others away."""

    alone: float
    busy: float

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.alone + other.alone, self.busy + other.busy)


def _stream(num_bytes: int, in_flight: int, busy_sms: int) -> _Part:
    """``num_bytes`` read or written, of which ``in_flight`` are waited for at a time."""
    rate = min(BYTES_PER_CLOCK, CHIP_BYTES_PER_CLOCK / busy_sms)
    return _Part(LATENCY + num_bytes / min(rate, in_flight / LATENCY), num_bytes / rate)


def _project(tokens: int, dim: int, block_r: int, dtype: torch.dtype) -> _Part:
    """tokens × dim × block_r multiply-adds."""
    rate = LANES_PER_CLOCK if dtype == torch.float32 else PRODUCTS_PER_CLOCK
    clocks = tokens * dim * block_r / rate
    return _Part(clocks, clocks)


def _convolve(tokens: int, r: int, taps: tuple[int, int], latency: int) -> _Part:
    """5 instructions a tap; all loads of a kernel row are under way together."""
    busy = 5 * tokens * r * taps[0] * taps[1] / LANES_PER_CLOCK
    return _Part(taps[0] * latency + busy, busy)


def _launch_clocks(programs: int, num_sms: int, resident: int, part: _Part) -> float:
    """Clocks of a launch whose programs are all ``part``."""
    each = ceil_div(programs, num_sms)
    return LAUNCH_CLOCKS + max(ceil_div(each, resident) * part.alone, each * part.busy)


def _overlapped(first: _Part, second: _Part) -> _Part:
    return _Part(max(first.alone, second.alone), max(first.busy, second.busy))


def two_launch_clocks(
    num_tokens: int, dim: int, r: int, taps: tuple[int, int], dtype: torch.dtype, num_sms: int
) -> float:
    """Clocks of the adapter's forward in ``down`` and ``up``, or with a launch that convolves."""
    t = adapter_tiles(num_tokens, dim, r, taps, dtype, num_sms)
    tile = t.block_t * t.block_c * dtype.itemsize
    programs = ceil_div(num_tokens, t.block_t)
    busy_sms = min(programs, num_sms)
    down = _overlapped(
        _stream(t.block_t * dim * dtype.itemsize, (t.num_stages - 1) * tile, busy_sms),
        _project(t.block_t, dim, t.block_r, dtype),
    )
    up_programs = programs * ceil_div(dim, t.blocks_of_c * t.block_c)
    # The residual is read and y written, and one block of channels waits for the one before.
    block = _stream(2 * tile, 2 * tile, min(up_programs, num_sms))
    block = _Part(t.blocks_of_c * block.alone, t.blocks_of_c * block.busy)
    channels = min(r, 8) if t.convolve_apart else r
    convolve = _Part(LATENCY, 0) + _convolve(t.block_t, channels, taps, 2 * NEAR_LATENCY)
    up = block + _Part(LATENCY, 0) if t.convolve_apart else block + convolve
    clocks = _launch_clocks(programs, num_sms, _RESIDENT, down)
    if t.convolve_apart:
        clocks += _launch_clocks(programs * ceil_div(r, 8), num_sms, _RESIDENT, convolve)
    return clocks + _launch_clocks(up_programs, num_sms, _RESIDENT, up)


@functools.lru_cache(maxsize=1024)
def one_launch_tiles(
    batch: int,
    tokens: int,
    dim: int,
    r: int,
    taps: tuple[int, int],
    reach: int,
    dtype: torch.dtype,
    num_sms: int,
) -> OneLaunchTiles | None:
    """Tiles of the adapter's forward in one launch, or None where two are estimated to be faster.

    A program also reads x of the ``reach`` tokens that its own meet before and behind them, mostly
    from the second-level cache: it pays where that takes less than a launch.
    """
    block_r = max(8, next_power_of_2(r))
    if block_r > 16 or batch * tokens == 0:
        return None
    size = dtype.itemsize
    best = None
    for block_t in (16, 32, 64):
        window = min(tokens, block_t + reach)
        # float32 runs on the FMA units, whose operands are all in registers.
        most_w, block_c = (64, 32) if dtype == torch.float32 else (128, 64)
        block_w = max(16, min(most_w, next_power_of_2(window)))
        num_stages = max(2, min(6, _MOST_STAGED_BYTES // ((block_w + 16) * block_c * size)))
        programs = batch * ceil_div(tokens, block_t)
        # More than one for a multiprocessor: 25 µs on an H100 for 64 × 14² × 384, where two
        # launches take 21.
        if programs > num_sms or window * r * size > _MOST_SCRATCH_BYTES:
            continue
        busy_sms = min(programs, num_sms)
        chunks = ceil_div(window, block_w)
        down = _overlapped(
            _stream(
                window * dim * size,
                (num_stages - 1) * min(block_w, window) * block_c * size,
                busy_sms,
            )
            + _Part((chunks - 1) * LATENCY, 0),
            _project(chunks * block_w, dim, block_r, dtype),
        )
        # 32 sums of a lane of eight warps, and as many elements of the residual under way; in
        # float32 half of that, as operands are in registers.
        most_up = (4096 if dtype == torch.float32 else 8192) // block_t
        block_up = min(max(64, next_power_of_2(dim)), most_up)
        blocks_of_c = ceil_div(dim, block_up)
        at_once = 2 * block_t * block_up * size
        block = _stream(at_once, at_once, busy_sms)
        up = _Part(blocks_of_c * block.alone, blocks_of_c * block.busy)
        # Once through the first-level cache, between down and the convolution.
        part = down + _Part(4 * NEAR_LATENCY, 0) + _convolve(block_t, r, taps, NEAR_LATENCY) + up
        clocks = _launch_clocks(programs, num_sms, 1, part)
        if best is None or clocks < best.clocks:
            best = OneLaunchTiles(
                block_t, block_w, block_c, block_up, blocks_of_c, 8, num_stages, clocks
            )
    two = two_launch_clocks(batch * tokens, dim, r, taps, dtype, num_sms)
    return best if best is not None and best.clocks < two else None
