"""Move maps between channels_last and planes, for kernels that read rows in vectors."""

import triton
import triton.language as tl

from lka_kernels.backends.triton.indexing import program_index


@triton.jit
def move_planes_kernel(
    source,
    result,
    C,
    W,
    N,
    stride_b,
    stride_y,
    stride_x,
    TO_PLANES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Copy (B, C, N) from ``source`` to ``result``, N = H·W positions.

    One of the two, the result with TO_PLANES, is contiguous; of the other the channels are, and the
    strides are those of its images, rows and columns.
    """
    pid = program_index(WIDE)
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_p = tl.cdiv(N, BLOCK_P)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pid // blocks_c % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (pid // blocks_c // blocks_p).to(tl.int64)
    y = p // W
    x = p - y * W
    in_lanes = (b * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None]
    in_lanes = in_lanes + c[None, :]
    in_planes = b * C * N + (c.to(tl.int64) * N)[None, :] + p[:, None]
    mask = (p < N)[:, None] & (c < C)[None, :]
    if TO_PLANES:
        tl.store(result + in_planes, tl.load(source + in_lanes, mask=mask), mask=mask)
    else:
        tl.store(result + in_lanes, tl.load(source + in_planes, mask=mask), mask=mask)
