"""Depthwise convolution as matrix products, for the tensor cores.

For one channel, outputs are the map times a Toeplitz matrix of its taps. It is built from the taps,
which the cache holds, where the tensor cores take it from, and never stored.

Patch form: a row of the product is one patch of ROWS×BX outputs; the sum runs over the patch of
the map that their taps meet, row by row, in chunks of BLOCK_K columns. Columns start at a multiple
of VEC, so that loads of the map are vectors. More rows in a patch load an element of the map less
often (it meets all rows of the patch at once), and multiply more zeros.

Dense form: one row of the product is a whole image, for maps so small that this multiplies few
zeros, or that the kernel covers them anyway.

Backward-weight: the product of output gradients, transposed, and the map, summed over rows of all
images, holds every pair of an output column and an input column; a tap's gradient is the sum of a
diagonal. Nothing is built, and a row of the map meets ROWS kernel rows at once. Maps of up to 63
elements are multiplied whole, with the sum over images alone.

Names as in ``depthwise_direct_kernels``; strides and widths that are named ``…_v`` are in units of
VEC, which tells the compiler that they are multiples of it.
"""

import triton
import triton.language as tl

from lka_kernels.backends.triton.indexing import first_row_of_block, inside, program_index


@triton.jit
def correlate_patch_kernel(
    source,
    weight,
    bias,
    result,
    patch_rows,
    rows_of_m,
    B,
    C,
    H,
    width_v,
    OH,
    out_width_v,
    TOP,
    start_v,
    slack,
    window,
    KH,
    KW,
    first_tap,
    stride_wc,
    stride_wy,
    stride_wx,
    stride_sb_v,
    stride_sc_v,
    stride_sy_v,
    stride_sx,
    stride_rb_v,
    stride_rc_v,
    stride_ry_v,
    stride_rx,
    DY: tl.constexpr,
    DX: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result = correlation of ``source`` with the taps, + bias, by patches of ROWS×BX outputs.

    The window of a patch begins ``start_v``·VEC columns beside it, ``slack`` columns in front of
    what its taps meet, and has ``window`` columns. NARROW: offsets within a plane fit int32.
    """
    pid = program_index(WIDE)
    tiles_x = tl.cdiv(out_width_v * OUT_VEC, BX)
    x0 = (pid % tiles_x).to(tl.int32) * BX
    c = (pid // tiles_x % C).to(tl.int64)
    # Images fastest: the rows of one program lie close, so that most have the same live taps.
    m = pid // tiles_x // C * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (m % B).to(tl.int64)
    oy = first_row_of_block((m // B).to(tl.int32), DY, ROWS)
    is_row = m < rows_of_m
    n = tl.arange(0, ROWS * BX)
    r = n // BX
    nx = n % BX
    W = width_v * VEC
    from_x = x0 + start_v * VEC
    first_chunk = tl.maximum(-from_x, 0) // BLOCK_K
    chunks = tl.cdiv(tl.minimum(window, W - from_x), BLOCK_K) - first_chunk
    iy = oy - TOP
    highest = tl.max(tl.where(is_row, iy, -(2**30)), axis=0)
    lowest = tl.min(tl.where(is_row, iy, 2**30), axis=0)
    first_s = (tl.maximum(-highest, 0) + DY - 1) // DY
    end_s = tl.minimum(KH + ROWS - 1, tl.maximum(H - 1 - lowest + DY, 0) // DY)
    image = source + (b * stride_sb_v + c * stride_sc_v)[:, None] * VEC
    taps = weight + first_tap + c * stride_wc
    index: tl.constexpr = tl.int32 if NARROW else tl.int64
    sums = tl.zeros([BLOCK_M, ROWS * BX], tl.float32)
    # kx·DX of the elements of the Toeplitz matrix, and where their taps lie, for s = chunk = 0.
    i = tl.arange(0, BLOCK_K)
    column = i[:, None] - (nx + slack)[None, :]
    offsets = column * stride_wx - (r * stride_wy)[None, :]
    s = first_s
    chunk = first_chunk
    for _ in range(0, tl.maximum(end_s - first_s, 0) * tl.maximum(chunks, 0)):
        y = iy + s * DY
        x = from_x + chunk * BLOCK_K + i
        rows = tl.load(
            image
            + ((y.to(index) * stride_sy_v)[:, None] * VEC + (x.to(index) * stride_sx)[None, :]),
            mask=(is_row & inside(y, H))[:, None] & ((x >= 0) & (x < W))[None, :],
            other=0.0,
        )
        is_tap = inside(s - r, KH)[None, :]
        if DX == 1:
            is_tap = is_tap & inside(column + chunk * BLOCK_K, KW)
            at = taps + (s * stride_wy + chunk * (BLOCK_K * stride_wx)) + offsets
        else:
            kx = column + chunk * BLOCK_K
            is_tap = is_tap & inside(kx, KW * DX) & (kx % DX == 0)
            at = taps + ((s - r) * stride_wy)[None, :] + kx // DX * stride_wx
        toeplitz = tl.load(at, mask=is_tap, other=0.0)
        sums = tl.dot(rows, toeplitz, sums, input_precision=PRECISION)
        # Counted rather than divided for: each thread would divide.
        chunk += 1
        is_last = chunk == first_chunk + chunks
        s += is_last.to(tl.int32)
        chunk = tl.where(is_last, first_chunk, chunk)
    if bias is not None:
        sums += tl.load(bias + c).to(tl.float32)
    to_y = oy[:, None] + (r * DY)[None, :]
    to_x = x0 + nx
    to = result + (b * stride_rb_v + c * stride_rc_v)[:, None] * OUT_VEC
    to = to + to_y.to(tl.int64) * stride_ry_v * OUT_VEC + (to_x.to(tl.int64) * stride_rx)[None, :]
    exists = (to_y < OH) & is_row[:, None] & (to_x < out_width_v * OUT_VEC)[None, :]
    tl.store(to, sums.to(result.dtype.element_ty), mask=exists)


@triton.jit
def correlate_dense_kernel(
    source,
    weight,
    bias,
    result,
    B,
    C,
    OH,
    OW,
    TOP,
    LEFT,
    KH,
    KW,
    first_tap,
    stride_wc,
    stride_wy,
    stride_wx,
    stride_sb_v,
    stride_sc_v,
    stride_sy,
    stride_sx,
    stride_rb,
    stride_rc,
    stride_ry,
    stride_rx,
    H: tl.constexpr,
    W: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    VEC: tl.constexpr,
    FLAT: tl.constexpr,
    ALL_MEET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result = correlation of ``source`` with the taps, + bias: image by map times map by map.

    FLAT: rows of the source follow each other without a gap. ALL_MEET: a tap leads from every
    element of the map to every output. The map's size is a constant, so that to divide by it is to
    multiply; the dense form is for small maps, of which a model has few.
    """
    pid = program_index(WIDE)
    tiles_n = tl.cdiv(OH * OW, BLOCK_N)
    n = (pid % tiles_n).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (pid // tiles_n % C).to(tl.int64)
    b = pid // tiles_n // C * BLOCK_M + tl.arange(0, BLOCK_M)
    is_image = b < B
    b = b.to(tl.int64)
    is_output = n < OH * OW
    n = tl.minimum(n, OH * OW - 1)
    oy = n // OW
    ox = n % OW
    last = oy * stride_wy + ox * stride_wx
    image = source + (b * stride_sb_v + c * stride_sc_v)[:, None] * VEC
    taps = weight + first_tap + c * stride_wc
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, H * W, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = tl.minimum(k, H * W - 1)
        iy = at // W
        ix = at - iy * W
        if FLAT:
            offsets = k
        else:
            offsets = iy.to(tl.int64) * stride_sy + ix.to(tl.int64) * stride_sx
        rows = tl.load(
            image + offsets[None, :], mask=is_image[:, None] & (k < H * W)[None, :], other=0.0
        )
        # Whatever tap an element beyond the map meets, it is multiplied by zero.
        if ALL_MEET:
            first = (iy + TOP) * stride_wy + (ix + LEFT) * stride_wx
            toeplitz = tl.load(taps + (first[:, None] - last[None, :]))
        else:
            ky = (iy + TOP)[:, None] - oy[None, :]
            kx = (ix + LEFT)[:, None] - ox[None, :]
            is_tap = inside(ky, KH * DY) & inside(kx, KW * DX)
            if DY != 1:
                is_tap = is_tap & (ky % DY == 0)
                ky = ky // DY
            if DX != 1:
                is_tap = is_tap & (kx % DX == 0)
                kx = kx // DX
            toeplitz = tl.load(taps + (ky * stride_wy + kx * stride_wx), mask=is_tap, other=0.0)
        sums = tl.dot(rows, toeplitz, sums, input_precision=PRECISION)
    if bias is not None:
        sums += tl.load(bias + c).to(tl.float32)
    to = result + (b * stride_rb + c * stride_rc)[:, None]
    to = to + (oy.to(tl.int64) * stride_ry + ox.to(tl.int64) * stride_rx)[None, :]
    tl.store(
        to,
        sums.to(result.dtype.element_ty),
        mask=is_image[:, None] & is_output[None, :],
    )


@triton.jit
def backward_weight_rows_kernel(
    grad_output,
    source,
    partials,
    B,
    C,
    H,
    width_v,
    OH,
    out_width_v,
    TOP,
    start_v,
    slack,
    DY,
    DX,
    KH,
    KW,
    first_tap,
    full_width,
    full_taps,
    bias_row,
    images_per_group,
    stride_gb_v,
    stride_gc_v,
    stride_gy_v,
    stride_gx,
    stride_sb_v,
    stride_sc_v,
    stride_sy_v,
    stride_sx,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KX: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums (groups, C·full_taps + C) of the gradients of weight and bias.

    A program has one channel, ROWS kernel rows and a group of images. Its map ends in a column of
    ones, whose product with the gradient of kernel row ``bias_row`` is the gradient of the bias;
    the program that has that row goes through all rows of outputs that it meets, inside the map or
    not. NARROW: offsets within a group of images fit int32.
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(KH, ROWS)
    first_ky = pid % row_blocks * ROWS
    c = (pid // row_blocks % C).to(tl.int64)
    group = (pid // row_blocks // C).to(tl.int64)
    first_image = group * images_per_group
    images = tl.minimum(images_per_group, B - first_image).to(tl.int32)
    end_ky = tl.minimum(first_ky + ROWS, KH)
    first_y = tl.maximum(first_ky * DY - TOP, 0)
    end_y = tl.minimum(OH - TOP + (end_ky - 1) * DY, H)
    if (bias_row >= first_ky) & (bias_row < end_ky):
        first_y = tl.minimum(first_y, bias_row * DY - TOP)
        end_y = tl.maximum(end_y, OH - TOP + bias_row * DY)
    # Rows in excess meet nothing.
    height = tl.maximum(end_y - first_y, 2)
    rows = tl.where(end_y > first_y, height * images, 0)
    # k // height as the high half of a product, exact while k·height < 2^32.
    reciprocal = ((tl.cast(height, tl.int64) + 0xFFFFFFFF) // height).to(tl.uint32)
    W = width_v * VEC
    OW = out_width_v * OUT_VEC
    n = tl.arange(0, ROWS * BX)
    shift = TOP - (first_ky + n // BX) * DY
    nx = n % BX
    index: tl.constexpr = tl.int32 if NARROW else tl.int64
    g_column = shift.to(index) * stride_gy_v * OUT_VEC + nx.to(index) * stride_gx
    i = tl.arange(0, WINDOW)
    s_column = (start_v * VEC + i).to(index) * stride_sx
    ones = (i == WINDOW - 1)[None, :]
    g_image = grad_output + (first_image * stride_gb_v + c * stride_gc_v) * OUT_VEC
    s_image = source + (first_image * stride_sb_v + c * stride_sc_v) * VEC
    sums = tl.zeros([ROWS * BX, WINDOW], tl.float32)
    steps = tl.cdiv(rows, BLOCK_K)
    x0 = 0
    k0 = 0
    for _ in range(0, steps * tl.cdiv(OW, BX)):
        k = k0 + tl.arange(0, BLOCK_K)
        image = tl.umulhi(k.to(tl.uint32), reciprocal).to(tl.int32)
        iy = first_y + k - image * height
        b = image.to(index)
        is_row = k < rows
        ox = x0 + nx
        oy = iy[:, None] + shift[None, :]
        g_row = (b * stride_gb_v + iy.to(index) * stride_gy_v) * OUT_VEC
        g_tile = tl.load(
            g_image + tl.cast(x0, index) * stride_gx + (g_row[:, None] + g_column[None, :]),
            mask=is_row[:, None] & inside(oy, OH) & (ox < OW)[None, :],
            other=0.0,
        )
        ix = x0 + start_v * VEC + i
        s_row = (b * stride_sb_v + iy.to(index) * stride_sy_v) * VEC
        s_tile = tl.load(
            s_image + tl.cast(x0, index) * stride_sx + (s_row[:, None] + s_column[None, :]),
            mask=(is_row & inside(iy, H))[:, None] & ((ix >= 0) & (ix < W))[None, :],
            other=0.0,
        )
        s_tile = tl.where(ones, 1.0, s_tile).to(s_tile.dtype)
        sums = tl.dot(tl.trans(g_tile), s_tile, sums, input_precision=PRECISION)
        # Counted rather than divided for: each thread would divide.
        k0 += BLOCK_K
        is_last = k0 >= rows
        x0 += tl.where(is_last, BX, 0)
        k0 = tl.where(is_last, 0, k0)
    row = partials + group * C * (full_taps + 1)
    ky = first_ky + tl.arange(0, ROWS)
    kx = tl.arange(0, BLOCK_KX)
    # Output column nx and the input column nx + slack + kx·DX of its window meet at tap kx.
    diagonal = tl.minimum(nx[:, None] + (slack + kx * DX)[None, :], WINDOW - 1)
    by_tap = tl.reshape(tl.gather(sums, diagonal, axis=1), [ROWS, BX, BLOCK_KX])
    tl.store(
        row + c * full_taps + first_tap + ky[:, None] * full_width + kx[None, :],
        tl.sum(by_tap, axis=1),
        mask=(ky < KH)[:, None] & (kx < KW)[None, :],
    )
    by_row = tl.sum(tl.reshape(tl.sum(tl.where(ones, sums, 0.0), axis=1), [ROWS, BX]), axis=1)
    tl.store(
        row + C * full_taps + c + tl.zeros_like(ky),
        by_row,
        mask=(ky == bias_row) & (ky < KH),
    )


@triton.jit
def backward_weight_dense_kernel(
    grad_output,
    source,
    partials,
    B,
    C,
    TOP,
    LEFT,
    DY,
    DX,
    KH,
    KW,
    first_tap,
    full_width,
    full_taps,
    images_per_group,
    stride_gb,
    stride_gc,
    stride_gy,
    stride_gx,
    stride_sb,
    stride_sc,
    stride_sy,
    stride_sx,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums (groups, C·full_taps + C) of the gradients of weight and bias, for small maps.

    A program has one channel and a group of images, over which it sums the products of every
    output with every input. The last input is a one, which makes the gradient of the bias.
    """
    c = (tl.program_id(0) % C).to(tl.int64)
    group = (tl.program_id(0) // C).to(tl.int64)
    first_image = group * images_per_group
    end_image = tl.minimum(first_image + images_per_group, B)
    n = tl.arange(0, BLOCK)
    is_output = n < OH * OW
    is_input = n < H * W
    ones = (n == BLOCK - 1)[None, :]
    oy = n // OW
    ox = n % OW
    g_map = grad_output + c * stride_gc + oy.to(tl.int64) * stride_gy + ox.to(tl.int64) * stride_gx
    iy = n // W
    ix = n % W
    s_map = source + c * stride_sc + iy.to(tl.int64) * stride_sy + ix.to(tl.int64) * stride_sx
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for b0 in range(0, images_per_group, BLOCK_K):
        b = first_image + b0 + tl.arange(0, BLOCK_K)
        is_image = (b < end_image)[:, None]
        g_tile = tl.load(
            g_map[None, :] + (b * stride_gb)[:, None],
            mask=is_image & is_output[None, :],
            other=0.0,
        )
        s_tile = tl.load(
            s_map[None, :] + (b * stride_sb)[:, None],
            mask=is_image & is_input[None, :],
            other=0.0,
        )
        s_tile = tl.where(ones, 1.0, s_tile).to(s_tile.dtype)
        sums = tl.dot(tl.trans(g_tile), s_tile, sums, input_precision=PRECISION)
    row = partials + group * C * (full_taps + 1)
    # After the taps comes the bias, whose input is the one.
    for t0 in range(0, KH * KW + 1, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        ky = t // KW
        kx = t - ky * KW
        # The input that an output meets through a tap.
        at_y = oy[:, None] - TOP + (ky * DY)[None, :]
        at_x = ox[:, None] - LEFT + (kx * DX)[None, :]
        is_tap = t < KH * KW
        meets = is_tap[None, :] & inside(at_y, H) & inside(at_x, W)
        at = tl.where(meets, at_y * W + at_x, BLOCK - 1)
        meets = (meets | (t == KH * KW)[None, :]) & is_output[:, None]
        met = tl.gather(sums, at, axis=1)
        tl.store(
            row
            + tl.where(is_tap, c * full_taps + first_tap + ky * full_width + kx, C * full_taps + c),
            tl.sum(tl.where(meets, met, 0.0), axis=0),
            mask=t <= KH * KW,
        )
