"""Tile sizes of the Triton kernels: pure functions of shape, dtype and number of multiprocessors.

None of these numbers has been measured on a GPU yet; each is reasoned, and the reason stands beside
it. ``docs/kernel-notes.md`` has the estimates they lead to.
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
    """Of ``backward_weight_gemm_kernel``."""

    rows: int
    bx: int
    window: int
    block_k: int
    num_warps: int


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


@functools.lru_cache(maxsize=1024)
def weight_gemm_tiles(
    taps: tuple[int, int], dilation: int, vector: int, slack: int, out_width: int, itemsize: int
) -> WeightGemmTiles | None:
    """Tiles of backward-weight as a matrix product; None where the kernel is too wide for it."""
    best, least = None, None
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
        if least is None or clocks < least:
            least = clocks
            best = WeightGemmTiles(rows, bx, window, block_k, num_warps)
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

    16 loads of a thread are under way together; with few rows, all of them.
    """
    at_a_time = min(32, next_power_of_2(rows))
    return min(512, 2048 // at_a_time), at_a_time
