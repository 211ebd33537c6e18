"""Tile sizes of the Triton kernels: pure functions of shape, dtype and number of multiprocessors.

Each number is reasoned, or measured where that is said, and the reason stands beside it.
``docs/kernel-notes.md`` has the estimates they lead to and what was measured on an H100.
"""

from __future__ import annotations

import functools
import itertools
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
# A program that convolves its own tokens loads the map once for every tap. On an H100 (bfloat16)
# all programs together made about a million of these loads in a microsecond, where a launch of
# depthwise convolution, which loads a row once for all of its taps, took 5 of them at least:
# forward 30 µs against 33 with 4.9 million loads (14²+1 tokens), 134 against 87 with 79 million
# (56²). Backward has two convolutions, of which that of the taps' gradient took 2 to 4 times more:
# 110 µs against 90, 518 against 183.
_MOST_LOADS_OF_TAPS = {"forward": 6_000_000, "backward": 1_500_000}


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


# What a multiprocessor of an H100 does in a clock, for choosing between forms: multiply-adds of the
# tensor cores in 16-bit types (half of the published peak, which nothing without asynchronous
# copies of whole tiles reaches), other instructions by lane, bytes from the second-level cache.
_PRODUCTS_PER_CLOCK = 1024
_LANES_PER_CLOCK = 128
_BYTES_PER_CLOCK = 64
# Instructions of a lane, counted in the machine code for compute capability 9.0: an element of the
# Toeplitz matrix of the patch and the dense form, the rest of a step of either, and a multiply-add
# of the direct form with its share of everything else.
_TO_BUILD_PATCH = 12
_TO_BUILD_DENSE = 16
_TO_STEP = 60
_TO_MULTIPLY = 4


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


# In clocks of an H100 at 1.7 GHz. What a launch adds on the device, to start and to wait for the
# one before, is 2 µs, as in docs/kernel-notes.md. The time of the host comes on top where it is not
# ahead of the device. A load waits for memory as long as _LATENCY, for the first-level cache
# _NEAR_LATENCY; all multiprocessors together read the second-level cache at 5.5 TB/s.
_LAUNCH_CLOCKS = 3400
_LATENCY = 800
_NEAR_LATENCY = 100
_CHIP_BYTES_PER_CLOCK = 3200
# Programs that share a multiprocessor and hide what each waits for.
_RESIDENT = 4
# What 8.6 and 8.9 give a program is 99 KiB; what is copied ahead leaves some for exchanges.
_MOST_STAGED_BYTES = 80 * 1024
# z of a program's tokens and of all that they meet, which is to stay in the first-level cache.
_MOST_SCRATCH_BYTES = 16 * 1024


class _Part(NamedTuple):
    """Clocks of a part of a program: until it is done alone, and how long it keeps others away."""

    alone: float
    busy: float

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.alone + other.alone, self.busy + other.busy)


def _stream(num_bytes: int, in_flight: int, busy_sms: int) -> _Part:
    """``num_bytes`` read or written, of which ``in_flight`` are waited for at a time."""
    rate = min(_BYTES_PER_CLOCK, _CHIP_BYTES_PER_CLOCK / busy_sms)
    return _Part(_LATENCY + num_bytes / min(rate, in_flight / _LATENCY), num_bytes / rate)


def _project(tokens: int, dim: int, block_r: int, dtype: torch.dtype) -> _Part:
    """tokens × dim × block_r multiply-adds."""
    rate = _LANES_PER_CLOCK if dtype == torch.float32 else _PRODUCTS_PER_CLOCK
    clocks = tokens * dim * block_r / rate
    return _Part(clocks, clocks)


def _convolve(tokens: int, r: int, taps: tuple[int, int], latency: int) -> _Part:
    """5 instructions a tap; all loads of a kernel row are under way together."""
    busy = 5 * tokens * r * taps[0] * taps[1] / _LANES_PER_CLOCK
    return _Part(taps[0] * latency + busy, busy)


def _launch_clocks(programs: int, num_sms: int, resident: int, part: _Part) -> float:
    """Clocks of a launch whose programs are all ``part``."""
    each = ceil_div(programs, num_sms)
    return _LAUNCH_CLOCKS + max(ceil_div(each, resident) * part.alone, each * part.busy)


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
    convolve = _Part(_LATENCY, 0) + _convolve(t.block_t, channels, taps, 2 * _NEAR_LATENCY)
    up = block + _Part(_LATENCY, 0) if t.convolve_apart else block + convolve
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
            + _Part((chunks - 1) * _LATENCY, 0),
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
        part = down + _Part(4 * _NEAR_LATENCY, 0) + _convolve(block_t, r, taps, _NEAR_LATENCY) + up
        clocks = _launch_clocks(programs, num_sms, 1, part)
        if best is None or clocks < best.clocks:
            best = OneLaunchTiles(
                block_t, block_w, block_c, block_up, blocks_of_c, 8, num_stages, clocks
            )
    two = two_launch_clocks(batch * tokens, dim, r, taps, dtype, num_sms)
    return best if best is not None and best.clocks < two else None


class Correlation(NamedTuple):
    """The sizes of one depthwise correlation, forward or backward-input.

    ``taps`` are those that can touch the map. ``vector`` elements are loaded at once, and a window
    starts ``slack`` columns too early, at a multiple of them.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    taps: tuple[int, int]
    dilation: tuple[int, int]
    vector: int
    slack: int
    itemsize: int
    num_sms: int


class DirectTiles(NamedTuple):
    """Of ``correlate_direct_kernel`` and ``backward_weight_direct_kernel``."""

    rows: int
    unroll: int
    block_p: int
    block_c: int
    num_warps: int


class PatchTiles(NamedTuple):
    """Of ``correlate_patch_kernel``; ``clocks`` of a multiprocessor are estimated for a call."""

    rows: int
    bx: int
    window: int
    block_m: int
    block_k: int
    num_warps: int
    clocks: float


class DenseTiles(NamedTuple):
    """Of ``correlate_dense_kernel``; ``clocks`` of a multiprocessor are estimated for a call."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    clocks: float


class WeightGemmTiles(NamedTuple):
    """Of ``backward_weight_gemm_kernel``; ``clocks`` are estimated for a row of one channel."""

    rows: int
    bx: int
    window: int
    block_k: int
    num_warps: int
    clocks: float


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _evenly(n: int, most: int) -> int:
    """The size of the fewest equal parts of ``n`` that are not above ``most``."""
    return ceil_div(n, ceil_div(n, most))


def _row_blocks(height: int, dilation: int, rows: int) -> int:
    """Blocks of ``rows`` rows ``dilation`` apart that cover ``height`` rows."""
    return dilation * ceil_div(ceil_div(height, dilation), rows)


def direct_rows(taps: int) -> int:
    """Outputs in a column that share what they load of the map.

    Four sums of a row of taps each: with eight, registers hold fewer positions of a thread, which
    share the taps. One or two kernel rows have nothing to share, or little.
    """
    return 1 if taps == 1 else 2 if taps <= 3 else 4


def _block_of_channels(channels: int, channels_last: bool) -> int:
    # 64 channels are a line of the cache in 16-bit types, two in float32.
    return min(64, next_power_of_2(channels)) if channels_last else 1


def direct_tiles(
    positions: int, channels: int, taps: tuple[int, int], channels_last: bool, num_sms: int
) -> DirectTiles:
    """Tiles of forward and backward-input; ``positions`` columns of ``direct_rows`` outputs."""
    block_c = _block_of_channels(channels, channels_last)
    # Four positions of a thread share the taps that it loads; sums of 16 outputs are 16 registers.
    block = 512
    while block > 128 and ceil_div(positions * channels, block) < 2 * num_sms:
        block //= 2
    return DirectTiles(
        rows=direct_rows(taps[0]),
        # All loads of an unrolled row are under way together; longer rows take it in pieces.
        unroll=_evenly(taps[1], 8),
        block_p=max(1, block // block_c),
        block_c=block_c,
        num_warps=4,
    )


def direct_weight_tiles(channels: int, taps: tuple[int, int], channels_last: bool) -> DirectTiles:
    """Tiles of backward-weight: ``rows``×``unroll`` taps a program.

    4 + 8 loads serve 32 multiply-adds, whose sums are 32 registers for every position of a thread.
    """
    block_c = _block_of_channels(channels, channels_last)
    return DirectTiles(
        rows=_evenly(taps[0], 4),
        unroll=_evenly(taps[1], 8),
        block_p=max(1, 256 // block_c),
        block_c=block_c,
        num_warps=4,
    )


def direct_clocks(call: Correlation) -> float:
    """Clocks of a multiprocessor for the direct form, estimated."""
    rows = direct_rows(call.taps[0])
    outputs = _row_blocks(call.out_size[0], call.dilation[0], rows) * rows * call.out_size[1]
    products = outputs * (call.taps[0] + rows - 1) * call.taps[1] * call.batch * call.channels
    return products * _TO_MULTIPLY / _LANES_PER_CLOCK


def _product_warps(block_m: int, block_n: int) -> int:
    # With 64 sums of a thread few registers are left for the matrix that is built.
    return 8 if block_m * block_n >= 8192 else 4


def _product_clocks(call: Correlation, rows_of_m, block_m, n_tiles, block_n, k, block_k, to_build):
    """Clocks for a product of ``rows_of_m`` × (n_tiles·block_n) with sums of ``k`` terms."""
    programs = ceil_div(rows_of_m, block_m) * n_tiles * call.channels
    lanes = 32 * _product_warps(block_m, block_n)
    # The sum of all rather than the longest: they overlap only between programs.
    each = (
        block_m * block_n * k / _PRODUCTS_PER_CLOCK
        + block_m * k * call.itemsize / _BYTES_PER_CLOCK
        + (block_n * k * to_build + ceil_div(k, block_k) * lanes * _TO_STEP) / _LANES_PER_CLOCK
    )
    return max(programs, call.num_sms) * each


@functools.lru_cache(maxsize=1024)
def patch_tiles(call: Correlation) -> PatchTiles:
    """The patch and block with the least estimated clocks."""
    best = None
    for rows, bx in itertools.product((1, 2, 4, 8), (8, 16, 32, 64)):
        # Narrower products leave the matrix instructions idle, wider ones need more registers.
        if not 16 <= rows * bx <= 128 or rows > next_power_of_2(call.out_size[0]):
            continue
        extent = bx + (call.taps[1] - 1) * call.dilation[1] + call.slack
        window = ceil_div(extent, 16) * 16
        rows_of_m = call.batch * _row_blocks(call.out_size[0], call.dilation[0], rows)
        # Chunks that lie outside the map are skipped.
        columns = min(window, ceil_div(call.size[1], 16) * 16)
        k = (call.taps[0] + rows - 1) * columns
        # 64 would leave registers and shared memory for one program on a multiprocessor; while
        # one builds the next chunk of its matrix, others must have products to make.
        block_k = 32 if window % 32 == 0 else 16
        for block_m in (16, 32, 64, 128, 256):
            # Measured on an H100 for 7×7: 238 µs with 256 rows and eight warps, 214 with 128 and
            # four, on 56² × 192; larger kernels share what they build among more rows.
            if block_m == 256 and call.taps[1] <= 13:
                continue
            lanes = 32 * _product_warps(block_m, rows * bx)
            # At most eight loads of a lane: each has an address of its own in two registers.
            if block_m * rows * bx > 16384 or block_m * block_k > 8 * call.vector * lanes:
                continue
            clocks = _product_clocks(
                call,
                rows_of_m,
                block_m,
                ceil_div(call.out_size[1], bx),
                rows * bx,
                k,
                block_k,
                _TO_BUILD_PATCH,
            )
            if best is None or clocks < best.clocks:
                best = PatchTiles(
                    rows=rows,
                    bx=bx,
                    window=window,
                    block_m=block_m,
                    block_k=block_k,
                    num_warps=_product_warps(block_m, rows * bx),
                    clocks=clocks,
                )
    return best


@functools.lru_cache(maxsize=1024)
def dense_tiles(call: Correlation) -> DenseTiles:
    """The block with the least estimated clocks."""
    inputs = call.size[0] * call.size[1]
    outputs = call.out_size[0] * call.out_size[1]
    block_k = 32 if inputs > 16 else 16
    best = None
    for block_m, block_n in itertools.product((16, 32, 64, 128, 256), (16, 32, 64, 128)):
        if block_m * block_n > 16384:
            continue
        clocks = _product_clocks(
            call,
            call.batch,
            block_m,
            ceil_div(outputs, block_n),
            block_n,
            ceil_div(inputs, block_k) * block_k,
            block_k,
            _TO_BUILD_DENSE,
        )
        if best is None or clocks < best.clocks:
            best = DenseTiles(
                block_m=block_m,
                block_n=block_n,
                block_k=block_k,
                num_warps=_product_warps(block_m, block_n),
                clocks=clocks,
            )
    return best


def gemm_form(call: Correlation) -> str:
    """ "patch" or "dense", whichever is estimated to take less."""
    return "dense" if dense_tiles(call).clocks < patch_tiles(call).clocks else "patch"


def correlation_form(call: Correlation, dtype: torch.dtype, contiguous: bool) -> str:
    """The form of forward and backward-input: "direct", "patch" or "dense".

    Only contiguous rows make vectors for the tensor cores, and float32 products would be rounded
    to tf32 there, which is left to those who ask for it.
    """
    if not contiguous or dtype == torch.float32:
        return "direct"
    form = gemm_form(call)
    clocks = (dense_tiles if form == "dense" else patch_tiles)(call).clocks
    return form if clocks < direct_clocks(call) else "direct"


def move_tiles(channels: int, positions: int) -> tuple[int, int]:
    """Channels and positions of a program that moves maps between channels_last and planes.

    64 channels or positions are a line of the cache in 16-bit types; 32 elements a thread.
    """
    block_c = min(64, next_power_of_2(channels))
    return block_c, min(4096 // block_c, next_power_of_2(positions))


# An H100's memory copies 3.0 TB/s.
_MEMORY_BYTES_PER_CLOCK = 1750


def _move_clocks(elements: int, itemsize: int, num_sms: int) -> float:
    """Clocks of all multiprocessors for a launch that reads and writes ``elements``."""
    return num_sms * (_LAUNCH_CLOCKS + 2 * elements * itemsize / _MEMORY_BYTES_PER_CLOCK)


def correlation_moves(call: Correlation, source_moves: bool, result_moves: bool) -> bool:
    """Whether to move channels_last maps to planes for the tensor cores, and the result back.

    ``call`` is that on planes. The direct form needs no move, and multiplies on the FMA units.
    """
    clocks = min(dense_tiles(call).clocks, patch_tiles(call).clocks)
    images = call.batch * call.channels
    for moves, (height, width) in ((source_moves, call.size), (result_moves, call.out_size)):
        if moves:
            clocks += _move_clocks(images * height * width, call.itemsize, call.num_sms)
    return clocks < direct_clocks(call)


@functools.lru_cache(maxsize=1024)
def weight_gemm_tiles(
    taps: tuple[int, int], dilation: int, vector: int, slack: int, out_width: int, itemsize: int
) -> WeightGemmTiles | None:
    """Tiles of backward-weight as a matrix product; None where the kernel is too wide for it."""
    best = None
    for rows, bx, block_k in itertools.product((1, 2, 4, 8, 16), (8, 16, 32, 64), (32, 64)):
        # One more column for the ones that sum the bias's gradient.
        extent = bx + (taps[1] - 1) * dilation + slack + 1
        window = max(16, next_power_of_2(extent))
        m = rows * bx
        # The sums are registers: 64 a thread, 128 where nothing less holds the window.
        if not 16 <= m <= 128 or m * window > 16384 or window > 512:
            continue
        num_warps = 8 if m * window > 8192 else 4
        # Shared memory holds three steps of four programs on a multiprocessor.
        if block_k == 64 and 12 * (m + window) * block_k * itemsize > 220_000:
            continue
        loads = (m + window) * block_k / (vector * 32 * num_warps)
        if loads > 16 and block_k == 64:
            continue
        # Products of fewer than 64 rows take older, slower instructions on an H100. A lane makes
        # about 18 instructions for a load, counted in the machine code, and 80 for a step.
        each = (
            max(64, m) * window * block_k / _PRODUCTS_PER_CLOCK
            + (m + window) * block_k * itemsize / _BYTES_PER_CLOCK
            + (80 + 18 * loads) * 32 * num_warps / _LANES_PER_CLOCK
        )
        clocks = each * ceil_div(taps[0], rows) * ceil_div(out_width, bx) / block_k
        if best is None or clocks < best.clocks:
            best = WeightGemmTiles(rows, bx, window, block_k, num_warps, clocks)
    return best


def weight_groups(programs: int, batch: int, num_sms: int) -> int:
    """Parts of the batch that backward-weight sums apart, for ``programs`` in one part.

    Four programs for every multiprocessor hide what each waits for; more would only make more
    partial sums.
    """
    return max(1, min(batch, ceil_div(4 * num_sms, programs)))


# Outputs and inputs of a map that backward-weight multiplies whole: a product of 64 × 64 has the
# fewest rows that fast instructions take, and 32 registers of sums for a lane.
WEIGHT_DENSE_BLOCK = 64


def weight_dense_fits(sizes: tuple[int, int, int, int]) -> bool:
    """Whether maps H, W and OH, OW are that small, with one more input, a one, for the bias.

    Its loads are some 128 an image, where the form by rows has (8·8 + 16) for each of 7 rows of a
    map of 7², and as its sums run over images alone there is no index to be divided.
    """
    height, width, out_height, out_width = sizes
    return height * width < WEIGHT_DENSE_BLOCK and out_height * out_width <= WEIGHT_DENSE_BLOCK


# Counted in the machine code for compute capability 9.0: instructions of a lane for a multiply-add
# of the direct form of backward-weight, and clocks for an image of one channel of the dense one.
_TO_MULTIPLY_WEIGHT = 5
_WEIGHT_DENSE_CLOCKS = 30


def weight_moves(
    call: Correlation, tiles_of_rows: WeightGemmTiles | None, moves: tuple[bool, bool]
) -> bool:
    """Whether backward-weight moves channels_last maps, as ``correlation_moves`` has it.

    ``moves``: whether the input and the gradient of the output have to.
    """
    images = call.batch * call.channels
    if weight_dense_fits((*call.size, *call.out_size)):
        clocks = images * _WEIGHT_DENSE_CLOCKS
    elif tiles_of_rows is not None:
        clocks = images * call.size[0] * tiles_of_rows.clocks
    else:
        return False
    for does, (height, width) in zip(moves, (call.size, call.out_size), strict=True):
        if does:
            clocks += _move_clocks(images * height * width, call.itemsize, call.num_sms)
    outputs = images * call.out_size[0] * call.out_size[1]
    products = outputs * call.taps[0] * call.taps[1]
    return clocks < products * _TO_MULTIPLY_WEIGHT / _LANES_PER_CLOCK


def plane_tiles(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """Channels and positions of a program that moves planes between memory formats.

    A position is divided into row and column once for all channels of a program. One of the two
    tensors always has its planes contiguous: 32 positions are a line of the cache. Of the other,
    with channels_last, 32 channels are one in float32. 1024 elements are 8 a thread.
    """
    block_c = min(32 if channels_last else 4, next_power_of_2(channels))
    return block_c, min(1024 // block_c, max(16, next_power_of_2(positions)))


def product_tiles(row: int, batch: int, num_sms: int) -> tuple[int, int]:
    """Frequencies and images of a program that multiplies the spectra of images by one.

    Four images load the factor once and have their loads under way together, as long as every
    multiprocessor has programs enough to fill its memory's queue.
    """
    block, images = 256, min(4, next_power_of_2(batch))
    while images > 1 and ceil_div(row, block) * ceil_div(batch, images) < 8 * num_sms:
        images //= 2
    return block, images


def product_sum_block(row: int, num_sms: int) -> int:
    """Frequencies of a program that sums the products of all images: 1 or 2 a thread."""
    return 256 if ceil_div(row, 256) >= 4 * num_sms else 128


def sum_tiles(rows: int) -> tuple[int, int]:
    """Elements and rows at a time of a program that adds ``rows`` rows of partial sums.

    16 loads of a thread are under way together; with few rows, all of them. A program waits for one
    such step after the other: 784 rows in steps of 32 took 19 µs on an H100, 1568 took 36. 16
    elements are two sectors of the cache.
    """
    at_a_time = min(128, next_power_of_2(rows))
    return min(512, 2048 // at_a_time), at_a_time
