"""The ordered sum that ends every backward pass: partial sums of weight gradients to gradients."""

import triton
import triton.language as tl

from lka_kernels.backends.triton.indexing import inside


@triton.jit
def _sum_rows(
    block,
    partials,
    rows,
    stride,
    size,
    total,
    first_ky,
    first_kx,
    KH,
    KW,
    full_width,
    full_taps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One block of total (size,) = the sum of partials (rows, size), in a fixed order."""
    j = block * BLOCK + tl.arange(0, BLOCK)
    exists = j < size
    written = exists
    if full_taps is not None:
        tap = (j % full_taps).to(tl.int32)
        written &= inside(tap // full_width - first_ky, KH)
        written &= inside(tap % full_width - first_kx, KW)
    i = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for i0 in range(0, rows, ROWS):
        at = (i0 + i).to(tl.int64)[:, None] * stride + j[None, :]
        mask = (i0 + i < rows)[:, None] & written[None, :]
        sums += tl.load(partials + at, mask=mask, other=0.0)
    tl.store(total + j, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=exists)


@triton.jit
def _sum_rows_if_mine(
    block, partials, rows, stride, size, total, first_ky, first_kx, KH, KW, full_width, full_taps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``_sum_rows`` if ``block`` is one of this total's; returns the block in the next total."""
    if total is not None:
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_rows(
                block, partials, rows, stride, size, total,
                first_ky, first_kx, KH, KW, full_width, full_taps, BLOCK, ROWS,
            )  # fmt: skip
        block -= blocks
    return block


@triton.jit
def sum_partials_kernel(
    partials_0,
    rows_0,
    stride_0,
    size_0,
    total_0,
    partials_1,
    rows_1,
    stride_1,
    size_1,
    total_1,
    partials_2,
    rows_2,
    stride_2,
    size_2,
    total_2,
    partials_3,
    rows_3,
    stride_3,
    size_3,
    total_3,
    partials_4,
    rows_4,
    stride_4,
    size_4,
    total_4,
    partials_5,
    rows_5,
    stride_5,
    size_5,
    total_5,
    first_ky,
    first_kx,
    KH,
    KW,
    full_width,
    full_taps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Up to six totals (size,) of partial sums (rows, size) in one launch; None is left out.

    ``stride`` is that of the rows. With ``full_taps``, total_0 is the gradient of kernels of so
    many taps, of which KH×KW that begin at (first_ky, first_kx) touch the map: for all others
    nothing was written, and their gradient is 0.
    """
    block = tl.program_id(0).to(tl.int64)
    block = _sum_rows_if_mine(
        block, partials_0, rows_0, stride_0, size_0, total_0,
        first_ky, first_kx, KH, KW, full_width, full_taps, BLOCK, ROWS,
    )  # fmt: skip
    block = _sum_rows_if_mine(
        block, partials_1, rows_1, stride_1, size_1, total_1,
        None, None, None, None, None, None, BLOCK, ROWS,
    )  # fmt: skip
    block = _sum_rows_if_mine(
        block, partials_2, rows_2, stride_2, size_2, total_2,
        None, None, None, None, None, None, BLOCK, ROWS,
    )  # fmt: skip
    block = _sum_rows_if_mine(
        block, partials_3, rows_3, stride_3, size_3, total_3,
        None, None, None, None, None, None, BLOCK, ROWS,
    )  # fmt: skip
    block = _sum_rows_if_mine(
        block, partials_4, rows_4, stride_4, size_4, total_4,
        None, None, None, None, None, None, BLOCK, ROWS,
    )  # fmt: skip
    _sum_rows_if_mine(
        block, partials_5, rows_5, stride_5, size_5, total_5,
        None, None, None, None, None, None, BLOCK, ROWS,
    )  # fmt: skip
