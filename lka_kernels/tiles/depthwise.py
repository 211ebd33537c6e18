"""Tiles of the kernels of depthwise convolution, and which of its forms serves a call."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from lka_kernels.tiles.machine import (
    BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LAUNCH_CLOCKS,
    PRODUCTS_PER_CLOCK,
    ceil_div,
    next_power_of_2,
)

# Instructions of a lane, counted in the machine code for compute capability 9.0: an element of the
# Toeplitz matrix of the patch and the dense form, the rest of a step of either, and a multiply-add
# of the direct form with its share of everything else.
_TO_BUILD_PATCH = 12
_TO_BUILD_DENSE = 16
_TO_STEP = 60
_TO_MULTIPLY = 4
# Counted in the machine code for compute capability 9.0: instructions of a lane for a multiply-add
# of the direct form of backward-weight, and clocks for an image of one channel of the dense one.
_TO_MULTIPLY_WEIGHT = 5
_WEIGHT_DENSE_CLOCKS = 30
# An H100's memory copies 3.0 TB/s.
_MEMORY_BYTES_PER_CLOCK = 1750
# Outputs and inputs of a map that backward-weight multiplies whole: a product of 64 × 64 has the
# fewest rows that fast instructions take, and 32 registers of sums for a lane.
WEIGHT_DENSE_BLOCK = 64


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
    return products * _TO_MULTIPLY / LANES_PER_CLOCK


def _product_warps(block_m: int, block_n: int) -> int:
    # With 64 sums of a thread few registers are left for the matrix that is built.
    return 8 if block_m * block_n >= 8192 else 4


def _product_clocks(call: Correlation, rows_of_m, block_m, n_tiles, block_n, k, block_k, to_build):
    """Clocks for a product of ``rows_of_m`` × (n_tiles·block_n) with sums of ``k`` terms."""
    programs = ceil_div(rows_of_m, block_m) * n_tiles * call.channels
    lanes = 32 * _product_warps(block_m, block_n)
    # The sum of all rather than the longest: they overlap only between programs.
    each = (
        block_m * block_n * k / PRODUCTS_PER_CLOCK
        + block_m * k * call.itemsize / BYTES_PER_CLOCK
        + (block_n * k * to_build + ceil_div(k, block_k) * lanes * _TO_STEP) / LANES_PER_CLOCK
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


def _move_clocks(elements: int, itemsize: int, num_sms: int) -> float:
    """Clocks of all multiprocessors for a launch that reads and writes ``elements``."""
    return num_sms * (LAUNCH_CLOCKS + 2 * elements * itemsize / _MEMORY_BYTES_PER_CLOCK)


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
            max(64, m) * window * block_k / PRODUCTS_PER_CLOCK
            + (m + window) * block_k * itemsize / BYTES_PER_CLOCK
            + (80 + 18 * loads) * 32 * num_warps / LANES_PER_CLOCK
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


def weight_dense_fits(sizes: tuple[int, int, int, int]) -> bool:
    """Whether maps H, W and OH, OW are that small, with one more input, a one, for the bias.

    Its loads are some 128 an image, where the form by rows has (8·8 + 16) for each of 7 rows of a
    map of 7², and as its sums run over images alone there is no index to be divided.
    """
    height, width, out_height, out_width = sizes
    return height * width < WEIGHT_DENSE_BLOCK and out_height * out_width <= WEIGHT_DENSE_BLOCK


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
    return clocks < products * _TO_MULTIPLY_WEIGHT / LANES_PER_CLOCK
