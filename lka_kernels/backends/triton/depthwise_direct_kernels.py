"""Depthwise convolution by plain multiply-adds, in any layout: no map is converted or padded.

A program has BLOCK_C channels and BLOCK_P positions: one channel and many positions where maps are
contiguous, channels in the lanes where they are channels_last. Positions of all images stand in one
row, so that small maps leave no lane idle.

Names: B images, C channels, H×W the map that is read, OH×OW the one that goes with it, KH×KW the
taps that can touch the map (the others are clipped before the launch), DY, DX the dilation, TOP and
LEFT the padding in front of the first of these taps; it is negative where the map is cropped.
Backward-input is the same correlation with the taps in reverse order: weight strides are negative
then, and ``first_tap`` is the offset of the last tap.
"""

import triton
import triton.language as tl

from lka_kernels.backends.triton.indexing import first_row_of_block, inside, program_index


@triton.jit
def correlate_direct_kernel(
    source,
    weight,
    bias,
    result,
    positions,
    row_blocks,
    C,
    H,
    W,
    OH,
    OW,
    TOP,
    LEFT,
    DY,
    DX,
    KH,
    first_tap,
    stride_wc,
    stride_wy,
    stride_wx,
    stride_sb,
    stride_sc,
    stride_sy,
    stride_sx,
    stride_rb,
    stride_rc,
    stride_ry,
    stride_rx,
    KW: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result = correlation of ``source`` with the taps, + bias.

    A position is a column of ROWS outputs, so that an element of the source is loaded once for
    all of them: ``row_blocks`` such columns make one column of the map.
    """
    pid = program_index(WIDE)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = (pid % blocks_c).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pid // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    ox = (p % OW).to(tl.int32)
    block = (p // OW % row_blocks).to(tl.int32)
    b = (p // OW // row_blocks).to(tl.int64)
    oy = first_row_of_block(block, DY, ROWS)
    is_channel = c < C
    is_position = p < positions
    channel = c.to(tl.int64)
    ix = ox - LEFT
    start = source + (b * stride_sb + ix.to(tl.int64) * stride_sx)[:, None]
    start += (channel * stride_sc)[None, :]
    taps = weight + first_tap + channel * stride_wc
    step_x = tl.cast(stride_sx, tl.int64) * DX
    # A tuple rather than one more dimension: the layout of a row's sums is that of its loads.
    sums = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * ROWS
    for s in range(0, KH + ROWS - 1):
        iy = oy - TOP + s * DY
        row = start + (iy.to(tl.int64) * stride_sy)[:, None]
        row_exists = is_position & inside(iy, H)
        for kx0 in range(0, KW, UNROLL):
            # Unrolled, so that the loads of several taps are under way together.
            for j in tl.static_range(UNROLL):
                kx = kx0 + j
                at = ix + kx * DX
                exists = row_exists & inside(at, W)
                is_tap = is_channel
                if KW % UNROLL != 0:
                    exists = exists & (kx < KW)
                    is_tap = is_tap & (kx < KW)
                value = tl.load(
                    row + kx * step_x, mask=exists[:, None] & is_channel[None, :], other=0.0
                ).to(tl.float32)
                added = ()
                for r in tl.static_range(ROWS):
                    tap = tl.load(
                        taps + ((s - r) * stride_wy + kx * stride_wx),
                        mask=is_tap & (s >= r) & (s < KH + r),
                        other=0.0,
                    )
                    added += (sums[r] + value * tap.to(tl.float32)[None, :],)
                sums = added
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    column = result + (b * stride_rb + ox.to(tl.int64) * stride_rx)[:, None]
    column += (channel * stride_rc)[None, :]
    for r in tl.static_range(ROWS):
        y = oy + r * DY
        tl.store(
            column + (y.to(tl.int64) * stride_ry)[:, None],
            (sums[r] + offset).to(result.dtype.element_ty),
            mask=(is_position & (y < OH))[:, None] & is_channel[None, :],
        )


@triton.jit
def backward_weight_direct_kernel(
    grad_output,
    source,
    partials,
    B,
    C,
    H,
    W,
    OH,
    OW,
    TOP,
    LEFT,
    DY,
    DX,
    KH,
    KW,
    first_tap,
    full_width,
    full_taps,
    bias_row,
    images_per_group,
    stride_gb,
    stride_gc,
    stride_gy,
    stride_gx,
    stride_sb,
    stride_sc,
    stride_sy,
    stride_sx,
    ROWS: tl.constexpr,
    BLOCK_KX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Partial sums (groups, C·full_taps + C) of the gradients of weight and bias.

    A program has BLOCK_C channels, ROWS×BLOCK_KX taps and a group of images, of which it takes
    BLOCK_P positions at a time. Each loads ROWS gradients and BLOCK_KX inputs, all of which meet,
    and keeps its own sums; they are added at the end. The program that has kernel row ``bias_row``
    goes through all outputs that this row meets, inside the map or not, and adds them for the bias.
    """
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_x = tl.cdiv(KW, BLOCK_KX)
    blocks_y = tl.cdiv(KH, ROWS)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks_c
    first_kx = pid % blocks_x * BLOCK_KX
    first_ky = pid // blocks_x % blocks_y * ROWS
    group = (pid // blocks_x // blocks_y).to(tl.int64)
    first_image = group * images_per_group
    images = tl.minimum(images_per_group, B - first_image)
    end_ky = tl.minimum(first_ky + ROWS, KH)
    first_y = tl.maximum(first_ky * DY - TOP, 0)
    end_y = tl.minimum(OH - TOP + (end_ky - 1) * DY, H)
    has_bias = (first_kx == 0) & (bias_row >= first_ky) & (bias_row < end_ky)
    if has_bias:
        first_y = tl.minimum(first_y, bias_row * DY - TOP)
        end_y = tl.maximum(end_y, OH - TOP + bias_row * DY)
    height = tl.maximum(end_y - first_y, 1)
    images = images.to(tl.int64 if WIDE else tl.int32)
    positions = tl.where(end_y > first_y, images * height * OW, 0)
    is_channel = c < C
    channel = c.to(tl.int64)
    g_image = grad_output + first_image * stride_gb + (channel * stride_gc)[None, :]
    s_image = source + first_image * stride_sb + (channel * stride_sc)[None, :]
    step_x = tl.cast(stride_sx, tl.int64) * DX
    # Tuples rather than more dimensions: the layout of the sums is that of the loads.
    sums = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * (ROWS * BLOCK_KX)
    bias_sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, positions, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        is_position = p < positions
        ox = (p % OW).to(tl.int32)
        iy = first_y + (p // OW % height).to(tl.int32)
        b = (p // OW // height).to(tl.int64)
        g_column = g_image + (b * stride_gb + ox.to(tl.int64) * stride_gx)[:, None]
        ix = ox - LEFT + first_kx * DX
        s_row = b * stride_sb + iy.to(tl.int64) * stride_sy + ix.to(tl.int64) * stride_sx
        s_row = s_image + s_row[:, None]
        row_exists = is_position & inside(iy, H)
        grads = ()
        for r in tl.static_range(ROWS):
            oy = iy + TOP - (first_ky + r) * DY
            exists = is_position & inside(oy, OH) & (first_ky + r < KH)
            grad = tl.load(
                g_column + (oy.to(tl.int64) * stride_gy)[:, None],
                mask=exists[:, None] & is_channel[None, :],
                other=0.0,
            ).to(tl.float32)
            grads += (grad,)
            bias_sums += tl.where(has_bias & (first_ky + r == bias_row), grad, 0.0)
        by_row = ()
        for j in tl.static_range(BLOCK_KX):
            exists = row_exists & inside(ix + j * DX, W) & (first_kx + j < KW)
            value = tl.load(
                s_row + j * step_x, mask=exists[:, None] & is_channel[None, :], other=0.0
            ).to(tl.float32)
            for r in tl.static_range(ROWS):
                by_row += (sums[j * ROWS + r] + grads[r] * value,)
        sums = by_row
    row = partials + group * C * (full_taps + 1)
    for j in tl.static_range(BLOCK_KX):
        for r in tl.static_range(ROWS):
            tap = first_tap + (first_ky + r) * full_width + first_kx + j
            tl.store(
                row + channel * full_taps + tap,
                tl.sum(sums[j * ROWS + r], axis=0),
                mask=is_channel & (first_ky + r < KH) & (first_kx + j < KW),
            )
    tl.store(row + C * full_taps + channel, tl.sum(bias_sums, axis=0), mask=is_channel & has_bias)
