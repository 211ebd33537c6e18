"""The adapter's forward in one launch, for so few tokens that a second launch costs more.

A program has BLOCK_T neighbouring tokens of one image. It computes z for them and for all tokens
of the image that their convolution can meet, a range of its tokens too. Other programs compute
these as well: none waits for another. z goes through a scratch of the program's own; a barrier of
its threads stands between what they write and what they read.

Names as in ``adapter_kernels``.
"""

import triton
import triton.language as tl

from lka_kernels.backends.triton.activation import activate
from lka_kernels.backends.triton.adapter_kernels import (
    convolve_with_bias,
    image_offsets,
    project_down,
    project_up,
    rank_offsets,
)


@triton.jit
def forward_kernel(
    x,
    down_weight,
    down_bias,
    z,
    scratch,
    conv_weight,
    conv_bias,
    c,
    up_weight,
    up_bias,
    residual,
    y,
    seed,
    threshold,
    keep_factor,
    scale,
    before,
    after,
    T,
    C,
    P,
    H,
    W,
    TOP,
    LEFT,
    D,
    KY0,
    KY1,
    KX0,
    KX1,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_yb,
    stride_yt,
    stride_yc,
    stride_resb,
    stride_rest,
    stride_resc,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    PAD: tl.constexpr,
    BLOCKS_OF_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_UP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y, and z and c for backward; PRE and POST are the activations around the convolution.

    Tokens meet no other than from ``before`` in front of them to ``after`` behind. ``scratch`` has
    R rows of before + BLOCK_T + after for every program.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    b = pid // tiles
    first = pid % tiles * BLOCK_T
    end = tl.minimum(first + BLOCK_T, T)
    start = tl.maximum(first - before, 0)
    stop = tl.minimum(end + after, T)
    width = before + BLOCK_T + after
    r = tl.arange(0, BLOCK_R)
    own = scratch + pid.to(tl.int64) * (R * width)
    for w0 in range(start, stop, BLOCK_W):
        t = w0 + tl.arange(0, BLOCK_W)
        m = b * T + t
        is_token = t < stop
        rows = x + image_offsets(m, T, stride_xb, stride_xt)
        # The programs beside this one read x too, and the residual may be x: let it stay.
        result = project_down(
            rows, down_weight, down_bias, is_token, C, stride_xc, R, "", BLOCK_C, BLOCK_R, PRECISION
        ).to(z.dtype.element_ty)
        valid = (r < R)[:, None] & is_token[None, :]
        is_own = (t >= first) & (t < end)
        tl.store(z + rank_offsets(m, r, T, R), result, mask=valid & is_own[None, :])
        # Rounded, as where z and a go through memory from launch to launch.
        result = activate(result.to(tl.float32), PRE).to(z.dtype.element_ty)
        tl.store(own + r[:, None] * width + (t - start)[None, :], result, mask=valid)
    tl.debug_barrier()
    t = first + tl.arange(0, BLOCK_T)
    m = b * T + t
    is_token = t < T
    sums = convolve_with_bias(
        own, conv_weight, conv_bias, r[:, None] * width + (t - start)[None, :], t, is_token, r,
        P, H, W, R, TOP, LEFT, D, KY0, KY1, KX0, KX1, KH, KW, UNROLL, WHOLE_ROW, PREFIX, CENTER,
    )  # fmt: skip
    rounded = sums.to(c.dtype.element_ty)
    tl.store(c + rank_offsets(m, r, T, R), rounded, mask=(r < R)[:, None] & is_token[None, :])
    project_up(
        rounded.to(tl.float32), m, is_token, 0, up_weight, up_bias, residual, y, seed, threshold,
        keep_factor, scale, T, C, P, stride_yb, stride_yt, stride_yc, stride_resb, stride_rest,
        stride_resc, R, PREFIX, POST, PAD, BLOCKS_OF_C, BLOCK_UP, BLOCK_R, PRECISION, 1,
    )  # fmt: skip
