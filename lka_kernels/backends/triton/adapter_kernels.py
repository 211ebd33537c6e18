"""The kernels of the fused adapter.

Tokens of all images stand in one row, numbered m = b·T + t with t = 0 … T - 1 (prefix tokens first,
then the grid row by row), and a program takes BLOCK_T of them: no program is idle because an image
is smaller than a tile. x, y and their gradients have any strides. The rank-r tensors z, a, c and
their gradients are channel-major, (B, r, T): a tap of the convolution then reads neighbouring
tokens from neighbouring addresses.

Forward: ``down`` reads x once; ``up`` convolves (or reads what launches of depthwise convolution
have left of the grid), and writes y once; few tokens take one launch
(``adapter_one_launch_kernel``). Backward: ``up_backward`` reads grad_y once, ``convolve_backward``
or launches of depthwise convolution work on r channels, ``down_backward`` reads x once and writes
grad_x. Each leaves partial sums of weight gradients, one row for every program (for large ranks,
``weight_backward`` does), which ``partial_sums.py`` adds in a fixed order.

What is read once is marked to leave the cache first, so that what the next launch reads (the rank-r
tensors, the partial sums) stays.

Names in this file: M tokens in all, T of them an image, P prefix tokens, H×W the grid, C the width,
R the rank, KH×KW the kernel, D its dilation, TOP and LEFT its padding. BLOCK_R is a power of two
that holds R. The first tap that can touch the grid is KY0, KX0; KY1, KX1 end them.
"""

import triton
import triton.language as tl

from lka_kernels.backends.triton.activation import activate, slope
from lka_kernels.backends.triton.dropout import dropout_factors


@triton.jit
def _tokens_for_dot(e, dtype: tl.constexpr, PAD: tl.constexpr):
    """Transpose [R, tokens] in float32; with PAD, zeros follow every channel: [tokens, 2·R].

    A product takes no fewer than 16 terms of a sum. To ``dtype`` it goes last: on compute
    capability 10.0 Triton 3.8 fails to compile a product whose operand is itself a reshaped tensor.
    """
    if PAD:
        e = tl.join(e, tl.zeros_like(e))
        e = e.permute(1, 0, 2).reshape(e.shape[1], 2 * e.shape[0])
    else:
        e = tl.trans(e)
    return e.to(dtype)


@triton.jit
def _channels_for_dot(R: tl.constexpr, BLOCK_R: tl.constexpr, PAD: tl.constexpr):
    """The channel of every column of ``_tokens_for_dot``, and whether it is one."""
    if PAD:
        k = tl.arange(0, 2 * BLOCK_R)
        channel = k // 2
        valid = (k % 2 == 0) & (channel < R)
    else:
        channel = tl.arange(0, BLOCK_R)
        valid = channel < R
    return channel, valid


@triton.jit
def image_offsets(m, T, stride_b, stride_t):
    """Offsets, in int64, of the first channel of tokens m."""
    b = m // T
    return b.to(tl.int64) * stride_b + (m - b * T).to(tl.int64) * stride_t


@triton.jit
def rank_offsets(m, r, T, R):
    """Offsets [channels, tokens] into a tensor (B, R, T)."""
    b = m // T
    return (b.to(tl.int64) * R * T + (m - b * T))[None, :] + r.to(tl.int64)[:, None] * T


@triton.jit
def project_down(
    rows,
    weight,
    bias,
    is_token,
    C,
    stride_xc,
    R: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [channels, tokens] = weight·xᵀ + bias, from pointers to the first channel of each token."""
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros([is_token.shape[0], BLOCK_R], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x_tile = tl.load(
            rows[:, None] + c.to(tl.int64)[None, :] * stride_xc,
            mask=is_token[:, None] & (c < C)[None, :],
            other=0.0,
            eviction_policy=EVICTION,
        )
        w_tile = tl.load(
            weight + r[None, :] * C + c[:, None],
            mask=(r < R)[None, :] & (c < C)[:, None],
            other=0.0,
        )
        sums = tl.dot(x_tile, w_tile, sums, input_precision=PRECISION)
    if bias is not None:
        sums += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    return tl.trans(sums)


@triton.jit
def down_kernel(
    x,
    weight,
    bias,
    z,
    a,
    M,
    T,
    C,
    stride_xb,
    stride_xt,
    stride_xc,
    R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = x·weightᵀ + bias and a = act(z); ``a`` is None where the activation comes later."""
    m = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    rows = x + image_offsets(m, T, stride_xb, stride_xt)
    result = project_down(
        rows, weight, bias, m < M, C, stride_xc, R, "evict_first", BLOCK_C, BLOCK_R, PRECISION
    )
    to = rank_offsets(m, r, T, R)
    valid = (r < R)[:, None] & (m < M)[None, :]
    tl.store(z + to, result.to(z.dtype.element_ty), mask=valid)
    if a is not None:
        # Of z as it is stored, so that backward sees the same argument.
        rounded = result.to(z.dtype.element_ty).to(tl.float32)
        tl.store(a + to, activate(rounded, ACTIVATION).to(a.dtype.element_ty), mask=valid)


@triton.jit
def _convolve(
    source,
    weight,
    offsets,
    t,
    is_token,
    r,
    P,
    H,
    W,
    R: tl.constexpr,
    TOP,
    LEFT,
    D,
    KY0,
    KY1,
    KX0,
    KX1,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    FLIP: tl.constexpr,
):
    """Sums [channels, tokens] over the taps; with FLIP of the transposed convolution.

    Channels r of tokens t of their image lie at ``offsets`` [channels, tokens] of the source, and
    neighbouring tokens side by side. PREFIX is None without prefix tokens; CENTER is the tap,
    ky·KW + kx, that they meet in mode "center_tap", or -1 for none. WHOLE_ROW: UNROLL taps are all
    that can touch.
    """
    n = t - P
    iy = n // W
    ix = n - iy * W
    on_grid = is_token & (n >= 0)
    valid_r = r < R
    taps = weight + r * (KH * KW)
    step = -D if FLIP else D
    sums = tl.zeros([r.shape[0], t.shape[0]], tl.float32)
    for ky in range(KY0, KY1):
        dy = ky * D - TOP
        if FLIP:
            dy = -dy
        row_exists = on_grid & (iy + dy >= 0) & (iy + dy < H)
        for kx0 in range(KX0, KX1, UNROLL):
            dx = kx0 * D - LEFT
            if FLIP:
                dx = -dx
            # Unrolled taps differ by constants from here on: their addresses need no arithmetic.
            first_value = source + offsets + (dy * W + dx)
            first_tap = taps + (ky * KW + kx0)
            first_x = ix + dx
            for j in tl.static_range(UNROLL):
                exists = row_exists & (first_x + j * step >= 0) & (first_x + j * step < W)
                has_tap = valid_r
                if not WHOLE_ROW:
                    exists = exists & (kx0 + j < KX1)
                    has_tap = has_tap & (kx0 + j < KX1)
                value = tl.load(
                    first_value + j * step, mask=exists[None, :] & valid_r[:, None], other=0.0
                )
                tap = tl.load(first_tap + j, mask=has_tap, other=0.0).to(tl.float32)
                sums += value.to(tl.float32) * tap[:, None]
    if PREFIX is not None:
        sums += _prefix_sums(
            source, weight, offsets, is_token & (n < 0), r, R, KH * KW, PREFIX, CENTER
        )
    return sums


@triton.jit
def _prefix_sums(
    source,
    weight,
    offsets,
    is_prefix,
    r,
    R: tl.constexpr,
    TAPS: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
):
    """What prefix tokens meet, [channels, tokens]: one tap, themselves, or nothing; 0 for others.

    Either way it is its own transpose: the same for the gradient.
    """
    valid = is_prefix[None, :] & (r < R)[:, None]
    if PREFIX == "skip":
        sums = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32)
    elif CENTER >= 0:
        tap = tl.load(weight + r * TAPS + CENTER, mask=r < R, other=0.0).to(tl.float32)
        sums = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32) * tap[:, None]
    else:
        sums = tl.zeros(offsets.shape, tl.float32)
    return sums


@triton.jit
def convolve_with_bias(
    source,
    weight,
    bias,
    offsets,
    t,
    is_token,
    r,
    P,
    H,
    W,
    R: tl.constexpr,
    TOP,
    LEFT,
    D,
    KY0,
    KY1,
    KX0,
    KX1,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
):
    sums = _convolve(
        source, weight, offsets, t, is_token, r, P, H, W, R, TOP, LEFT, D, KY0, KY1, KX0, KX1,
        KH, KW, UNROLL, WHOLE_ROW, PREFIX, CENTER, False,
    )  # fmt: skip
    if bias is not None:
        b = tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
        if PREFIX == "skip":
            b = tl.where((t >= P)[None, :], b, 0.0)
        sums += b
    return sums


@triton.jit
def project_up(
    sums,
    m,
    is_token,
    first_channel,
    weight,
    bias,
    residual,
    y,
    seed,
    threshold,
    keep_factor,
    scale,
    T,
    C,
    P,
    stride_yb,
    stride_yt,
    stride_yc,
    stride_resb,
    stride_rest,
    stride_resc,
    R: tl.constexpr,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PAD: tl.constexpr,
    BLOCKS_OF_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write BLOCKS_OF_C blocks of channels of y for c = ``sums`` [channels, tokens].

    STAGES of the loop over them, or None for those of the kernel.
    """
    r = tl.arange(0, BLOCK_R)
    valid = (r < R)[:, None] & is_token[None, :]
    e = activate(sums, ACTIVATION)
    if seed is not None:
        e *= dropout_factors(seed, m.to(tl.int64), threshold, keep_factor, R, BLOCK_R)
    # Channels beyond R may hold anything but must not be NaN times zero.
    operand = _tokens_for_dot(tl.where(valid, e, 0.0), weight.dtype.element_ty, PAD)
    k, is_channel = _channels_for_dot(R, BLOCK_R, PAD)
    to = y + image_offsets(m, T, stride_yb, stride_yt)[:, None]
    if residual is not None:
        rest = residual + image_offsets(m, T, stride_resb, stride_rest)[:, None]
    for i in tl.range(0, BLOCKS_OF_C, num_stages=STAGES):
        channel = first_channel + i * BLOCK_C + tl.arange(0, BLOCK_C)
        w_tile = tl.load(
            weight + channel[None, :] * R + k[:, None],
            mask=is_channel[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        result = tl.dot(operand, w_tile, input_precision=PRECISION)
        if bias is not None:
            b = tl.load(bias + channel, mask=channel < C, other=0.0)
            result += b.to(tl.float32)[None, :]
        result *= scale
        if PREFIX == "zero":
            result = tl.where((m % T >= P)[:, None], result, 0.0)
        mask = is_token[:, None] & (channel < C)[None, :]
        if residual is not None:
            at = rest + channel.to(tl.int64)[None, :] * stride_resc
            rest_tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
            result += rest_tile.to(tl.float32)
        tl.store(
            to + channel.to(tl.int64)[None, :] * stride_yc,
            result.to(y.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def up_kernel(
    source,
    conv_weight,
    conv_bias,
    c,
    weight,
    bias,
    residual,
    y,
    seed,
    threshold,
    keep_factor,
    scale,
    M,
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
    CONVOLVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PAD: tl.constexpr,
    BLOCKS_OF_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = residual + scale·(dropout(act(c))·weightᵀ + bias) for BLOCKS_OF_C blocks of channels.

    With CONVOLVE, c is computed from ``source`` and kept for backward; otherwise it is read, and
    only that of prefix tokens is computed and kept.
    """
    width: tl.constexpr = BLOCKS_OF_C * BLOCK_C
    splits = tl.cdiv(C, width)
    split = tl.program_id(0) % splits
    m = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    offsets = rank_offsets(m, r, T, R)
    valid = (r < R)[:, None] & (m < M)[None, :]
    if CONVOLVE:
        sums = convolve_with_bias(
            source, conv_weight, conv_bias, offsets, m % T, m < M, r, P, H, W, R, TOP, LEFT, D,
            KY0, KY1, KX0, KX1, KH, KW, UNROLL, WHOLE_ROW, PREFIX, CENTER,
        )  # fmt: skip
        rounded = sums.to(c.dtype.element_ty)
        if split == 0:
            tl.store(c + offsets, rounded, mask=valid)
        sums = rounded.to(tl.float32)  # backward sees c as it is stored
    elif PREFIX is not None:
        is_prefix = (m < M) & (m % T < P)
        own = _prefix_sums(source, conv_weight, offsets, is_prefix, r, R, KH * KW, PREFIX, CENTER)
        if PREFIX != "skip" and conv_bias is not None:
            own += tl.load(conv_bias + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
        rounded = own.to(c.dtype.element_ty)
        if split == 0:
            tl.store(c + offsets, rounded, mask=valid & is_prefix[None, :])
        # Not what is being stored: no program may wait for another.
        rest = tl.load(c + offsets, mask=valid & (m % T >= P)[None, :], other=0.0)
        sums = tl.where(is_prefix[None, :], rounded, rest).to(tl.float32)
    else:
        sums = tl.load(c + offsets, mask=valid, other=0.0).to(tl.float32)
    project_up(
        sums, m, m < M, split * width, weight, bias, residual, y, seed, threshold, keep_factor,
        scale, T, C, P, stride_yb, stride_yt, stride_yc, stride_resb, stride_rest, stride_resc,
        R, PREFIX, ACTIVATION, PAD, BLOCKS_OF_C, BLOCK_C, BLOCK_R, PRECISION, None,
    )  # fmt: skip


@triton.jit
def up_backward_kernel(
    grad_y,
    c,
    z,
    weight,
    grad_c,
    a,
    weight_partials,
    bias_partials,
    conv_bias_partials,
    seed,
    threshold,
    keep_factor,
    scale,
    M,
    T,
    C,
    P,
    stride_gb,
    stride_gt,
    stride_gc,
    R: tl.constexpr,
    PREFIX: tl.constexpr,
    BEFORE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_c, and partial sums of the gradients of weight (C, R), bias (C) and conv bias (R).

    What is None is not asked for, or left to ``weight_backward_kernel``. ``a`` = act(z) is for
    launches of depthwise convolution.
    """
    pid = tl.program_id(0)
    m = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    offsets = rank_offsets(m, r, T, R)
    valid = (r < R)[:, None] & (m < M)[None, :]
    if a is not None:
        values = activate(tl.load(z + offsets, mask=valid, other=0.0).to(tl.float32), BEFORE)
        tl.store(a + offsets, values.to(a.dtype.element_ty), mask=valid)
    if weight_partials is not None:
        e = activate(tl.load(c + offsets, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
        if seed is not None:
            e *= dropout_factors(seed, m.to(tl.int64), threshold, keep_factor, R, BLOCK_R)
        operand = tl.trans(tl.where(valid, e, 0.0).to(weight.dtype.element_ty))
    has_grad = m < M
    if PREFIX == "zero":
        has_grad &= m % T >= P
    rows = grad_y + image_offsets(m, T, stride_gb, stride_gt)[:, None]
    grad_e = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        g = tl.load(
            rows + channel.to(tl.int64)[None, :] * stride_gc,
            mask=has_grad[:, None] & (channel < C)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        at = channel[:, None] * R + r[None, :]
        mask = (channel < C)[:, None] & (r < R)[None, :]
        if grad_c is not None:
            w_tile = tl.load(weight + at, mask=mask, other=0.0)
            grad_e = tl.dot(g, w_tile, grad_e, input_precision=PRECISION)
        if weight_partials is not None:
            product = tl.dot(tl.trans(g), operand, input_precision=PRECISION)
            own = weight_partials + pid.to(tl.int64) * (C * R)
            tl.store(own + at, product * scale, mask=mask)
        if bias_partials is not None:
            total = tl.sum(g.to(tl.float32), axis=0)
            own = bias_partials + pid.to(tl.int64) * C
            tl.store(own + channel, total * scale, mask=channel < C)
    if grad_c is not None:
        result = tl.trans(grad_e) * scale
        # Dropout and slope again rather than kept: the loop has better use for registers.
        if seed is not None:
            result *= dropout_factors(seed, m.to(tl.int64), threshold, keep_factor, R, BLOCK_R)
        if ACTIVATION != "none":
            conv_sums = tl.load(c + offsets, mask=valid, other=0.0).to(tl.float32)
            result *= slope(conv_sums, ACTIVATION)
        result = tl.where(valid, result, 0.0).to(grad_c.dtype.element_ty)
        tl.store(grad_c + offsets, result, mask=valid)
        if conv_bias_partials is not None:
            terms = result.to(tl.float32)
            if PREFIX == "skip":
                terms = tl.where((m % T >= P)[None, :], terms, 0.0)
            own = conv_bias_partials + pid.to(tl.int64) * R
            tl.store(own + r, tl.sum(terms, axis=1), mask=r < R)


@triton.jit
def weight_backward_kernel(
    rows,
    columns,
    partials,
    seed,
    threshold,
    keep_factor,
    scale,
    tokens_per_group,
    M,
    T,
    C,
    P,
    stride_b,
    stride_t,
    stride_c,
    stride_pc,
    stride_pr,
    R: tl.constexpr,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of rowsᵀ·e, for rows (B, T, C) and e = dropout(act(columns)), (B, R, T).

    The gradient of a projection's weight, where the rank is so large that partial sums for every
    tile would cost more than to read the rows again. One program has BLOCK_C channels and one group
    of tokens.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(0) // blocks_c
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    first = group * tokens_per_group
    end = tl.minimum(first + tokens_per_group, M)
    for m0 in range(first, end, BLOCK_T):
        m = m0 + tl.arange(0, BLOCK_T)
        has_grad = m < end
        if PREFIX == "zero":
            has_grad &= m % T >= P
        at = image_offsets(m, T, stride_b, stride_t)[:, None]
        g = tl.load(
            rows + at + channel.to(tl.int64)[None, :] * stride_c,
            mask=has_grad[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        valid = (r < R)[:, None] & (m < end)[None, :]
        e = tl.load(columns + rank_offsets(m, r, T, R), mask=valid, other=0.0)
        if ACTIVATION != "none" or seed is not None:
            e = activate(e.to(tl.float32), ACTIVATION)
            if seed is not None:
                e *= dropout_factors(seed, m.to(tl.int64), threshold, keep_factor, R, BLOCK_R)
            e = tl.where(valid, e, 0.0)
        operand = tl.trans(e.to(g.dtype))
        sums = tl.dot(tl.trans(g), operand, sums, input_precision=PRECISION)
    to = partials + group.to(tl.int64) * (C * R)
    to += channel[:, None] * stride_pc + r[None, :] * stride_pr
    tl.store(to, sums * scale, mask=(channel < C)[:, None] & (r < R)[None, :])


@triton.jit
def _convolve_backward_input(
    index,
    grad_c,
    z,
    weight,
    grad_z,
    M,
    T,
    P,
    H,
    W,
    R: tl.constexpr,
    TOP,
    LEFT,
    D,
    KY0,
    KY1,
    KX0,
    KX1,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """grad_z = act'(z)·(transposed convolution of grad_c), for one block of channels and tokens."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    m = index // blocks_r * BLOCK_T + tl.arange(0, BLOCK_T)
    r = index % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets = rank_offsets(m, r, T, R)
    sums = _convolve(
        grad_c, weight, offsets, m % T, m < M, r, P, H, W, R, TOP, LEFT, D, KY0, KY1, KX0, KX1,
        KH, KW, UNROLL, WHOLE_ROW, PREFIX, CENTER, True,
    )  # fmt: skip
    valid = (r < R)[:, None] & (m < M)[None, :]
    if ACTIVATION != "none":
        values = tl.load(z + offsets, mask=valid, other=0.0).to(tl.float32)
        sums *= slope(values, ACTIVATION)
    tl.store(grad_z + offsets, sums.to(grad_z.dtype.element_ty), mask=valid)


@triton.jit
def _convolve_backward_weight(
    index,
    grad_c,
    z,
    partials,
    tokens_per_group,
    M,
    T,
    P,
    H,
    W,
    R: tl.constexpr,
    TOP,
    LEFT,
    D,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KX: tl.constexpr,
):
    """Partial sums (groups, R, KH, KW) of the weight's gradient.

    One program has one channel, one kernel row, BLOCK_KX of its taps and one group of tokens; it
    adds over the lanes of a tile once, at the end.
    """
    blocks_x: tl.constexpr = (KW + BLOCK_KX - 1) // BLOCK_KX
    kx = index % blocks_x * BLOCK_KX + tl.arange(0, BLOCK_KX)
    ky = index // blocks_x % KH
    r = index // (blocks_x * KH) % R
    group = index // (blocks_x * KH) // R
    dy = ky * D - TOP
    dx = kx * D - LEFT
    sums = tl.zeros([BLOCK_KX, BLOCK_T], tl.float32)
    first = group * tokens_per_group
    end = tl.minimum(first + tokens_per_group, M)
    for m0 in range(first, end, BLOCK_T):
        m = m0 + tl.arange(0, BLOCK_T)
        in_group = m < end
        b = m // T
        t = m - b * T
        n = t - P
        iy = n // W
        ix = n - iy * W
        offsets = (b.to(tl.int64) * R + r) * T + t
        a = tl.load(z + offsets, mask=in_group, other=0.0).to(tl.float32)
        a = tl.where(in_group, activate(a, ACTIVATION), 0.0)
        # The input at (iy, ix) meets tap (ky, kx) on its way to the output at (iy - dy, ix - dx).
        exists = (in_group & (n >= 0) & (iy - dy >= 0) & (iy - dy < H))[None, :]
        to_x = ix[None, :] - dx[:, None]
        exists = exists & (to_x >= 0) & (to_x < W)
        shift = (dy * W + dx)[:, None]
        if PREFIX == "center_tap":
            is_prefix = (in_group & (n < 0))[None, :]
            exists = exists | (is_prefix & (ky * KW + kx == CENTER)[:, None])
            shift = tl.where(is_prefix, 0, shift)
        g = tl.load(grad_c + offsets[None, :] - shift, mask=exists & (kx < KW)[:, None], other=0.0)
        sums += a[None, :] * g.to(tl.float32)
    to = (group.to(tl.int64) * R + r) * (KH * KW) + ky * KW + kx
    tl.store(partials + to, tl.sum(sums, axis=1), mask=kx < KW)


@triton.jit
def convolve_backward_kernel(
    grad_c,
    z,
    weight,
    grad_z,
    partials,
    input_programs,
    tokens_per_group,
    M,
    T,
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
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_KX: tl.constexpr,
):
    """The first ``input_programs`` write grad_z, the others partial sums of grad weight.

    One launch for both, as neither needs the other's result. grad_z or partials may be None.
    """
    pid = tl.program_id(0)
    if pid < input_programs:
        if grad_z is not None:
            _convolve_backward_input(
                pid, grad_c, z, weight, grad_z, M, T, P, H, W, R, TOP, LEFT, D,
                KY0, KY1, KX0, KX1, KH, KW, UNROLL, WHOLE_ROW, PREFIX, CENTER,
                ACTIVATION, BLOCK_T, BLOCK_R,
            )  # fmt: skip
    else:
        if partials is not None:
            _convolve_backward_weight(
                pid - input_programs, grad_c, z, partials, tokens_per_group, M, T, P, H, W, R,
                TOP, LEFT, D, KH, KW, PREFIX, CENTER, ACTIVATION, BLOCK_T, BLOCK_KX,
            )  # fmt: skip


@triton.jit
def prefix_taps_kernel(
    grad_c,
    source,
    partials,
    B,
    T,
    P,
    R,
    TAPS,
    BLOCK_T: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """A row of partial sums (R, TAPS) of the taps' gradients: what prefix tokens add.

    They meet the tap CENTER alone, for which one program adds over all of them in a fixed order.
    """
    r = tl.program_id(0)
    sums = tl.zeros([BLOCK_T], tl.float32)
    for i0 in range(0, B * P, BLOCK_T):
        i = i0 + tl.arange(0, BLOCK_T)
        b = i // P
        at = (b.to(tl.int64) * R + r) * T + (i - b * P)
        value = tl.load(source + at, mask=i < B * P, other=0.0).to(tl.float32)
        sums += value * tl.load(grad_c + at, mask=i < B * P, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0)
    for tap0 in range(0, TAPS, BLOCK_TAPS):
        tap = tap0 + tl.arange(0, BLOCK_TAPS)
        tl.store(partials + r * TAPS + tap, tl.where(tap == CENTER, total, 0.0), mask=tap < TAPS)


@triton.jit
def down_backward_kernel(
    grad_z,
    grad_c,
    conv_weight,
    z,
    x,
    grad_y,
    weight,
    grad_x,
    weight_partials,
    bias_partials,
    M,
    T,
    C,
    P,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_yb,
    stride_yt,
    stride_yc,
    stride_gb,
    stride_gt,
    stride_gc,
    R: tl.constexpr,
    TAPS: tl.constexpr,
    PREFIX: tl.constexpr,
    CENTER: tl.constexpr,
    FINISH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_x = grad_z·weight (+ grad_y), and partial sums of grad weight (R, C) and grad bias (R).

    What is None is not asked for, or left to ``weight_backward_kernel``; ``grad_y`` is None unless
    x is its own residual. With FINISH, ``grad_z`` holds the gradient of a on the grid, as depthwise
    convolution left it, and becomes that of z: in place, as no other program reads it before.
    """
    pid = tl.program_id(0)
    m = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    valid = (r < R)[:, None] & (m < M)[None, :]
    offsets = rank_offsets(m, r, T, R)
    if FINISH:
        if PREFIX is not None:
            t = m % T
            sums = tl.load(grad_z + offsets, mask=valid & (t >= P)[None, :], other=0.0)
            sums = sums.to(tl.float32) + _prefix_sums(
                grad_c, conv_weight, offsets, (m < M) & (t < P), r, R, TAPS, PREFIX, CENTER
            )
        else:
            sums = tl.load(grad_z + offsets, mask=valid, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            sums *= slope(tl.load(z + offsets, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
        g = tl.where(valid, sums, 0.0).to(grad_z.dtype.element_ty)
        tl.store(grad_z + offsets, g, mask=valid)
    else:
        g = tl.load(grad_z + offsets, mask=valid, other=0.0)
    if bias_partials is not None:
        own = bias_partials + pid.to(tl.int64) * R
        tl.store(own + r, tl.sum(g.to(tl.float32), axis=1), mask=r < R)
    g_of_token = tl.trans(g)
    operand = _tokens_for_dot(g.to(tl.float32), weight.dtype.element_ty, PAD)
    k, is_channel = _channels_for_dot(R, BLOCK_R, PAD)
    x_rows = x + image_offsets(m, T, stride_xb, stride_xt)[:, None]
    for c0 in range(0, C, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        mask = (m < M)[:, None] & (channel < C)[None, :]
        if weight_partials is not None:
            x_tile = tl.load(
                x_rows + channel.to(tl.int64)[None, :] * stride_xc,
                mask=mask,
                other=0.0,
                eviction_policy="evict_first",
            )
            product = tl.dot(tl.trans(x_tile), g_of_token, input_precision=PRECISION)
            at = r[None, :] * C + channel[:, None]
            own = weight_partials + pid.to(tl.int64) * (R * C)
            tl.store(own + at, product, mask=(channel < C)[:, None] & (r < R)[None, :])
        if grad_x is not None:
            w_tile = tl.load(
                weight + k[:, None] * C + channel[None, :],
                mask=is_channel[:, None] & (channel < C)[None, :],
                other=0.0,
            )
            result = tl.dot(operand, w_tile, input_precision=PRECISION)
            if grad_y is not None:
                at = grad_y + image_offsets(m, T, stride_yb, stride_yt)[:, None]
                at += channel.to(tl.int64)[None, :] * stride_yc
                result += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            to = grad_x + image_offsets(m, T, stride_gb, stride_gt)[:, None]
            to += channel.to(tl.int64)[None, :] * stride_gc
            tl.store(to, result.to(grad_x.dtype.element_ty), mask=mask)
