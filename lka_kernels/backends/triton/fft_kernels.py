"""What stands around the transforms of ``torch.fft``: one pass over each tensor in between.

``spread`` writes what is transformed, ``multiply`` or ``multiply_and_sum`` makes the product of two
spectra, ``gather`` takes the result out of the inverse transform. Spectra are seen as pairs of
float32, the real part first. Transforms are not scaled; whoever multiplies scales the product.
"""

import triton
import triton.language as tl

from lka_kernels.backends.triton.indexing import inside, program_index


@triton.jit
def _complex(pointer, i, exists):
    """Real and imaginary part of the elements ``i``, loaded as pairs."""
    part = tl.arange(0, 2)
    pairs = tl.load(pointer + i[:, None] * 2 + part[None, :], mask=exists[:, None], other=0.0)
    return tl.split(pairs)


@triton.jit
def _store_complex(pointer, i, real, imaginary, exists):
    part = tl.arange(0, 2)
    pairs = tl.join(real, imaginary)
    tl.store(pointer + i[:, None] * 2 + part[None, :], pairs, mask=exists[:, None])


@triton.jit
def _block_of_planes(C, positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The image, channels and positions of a program; blocks of positions are fastest."""
    pid = tl.program_id(0)
    blocks_p = tl.cdiv(positions, BLOCK_P)
    blocks_c = tl.cdiv(C, BLOCK_C)
    p = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // blocks_p // blocks_c).to(tl.int64), c, p


@triton.jit
def spread_kernel(
    source,
    result,
    C,
    H,
    W,
    FY,
    FX,
    SHIFT_Y,
    SHIFT_X,
    STEP_Y,
    STEP_X,
    stride_sb,
    stride_sc,
    stride_sy,
    stride_sx,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """result[b, c, (y·STEP_Y + SHIFT_Y) mod FY, …] = source[b, c, y, x]; zeros everywhere else.

    Zero padding has the shift 0 and the step 1; a strided gradient its stride as the step; a
    kernel its dilation as the step, and is rolled by the shift, which lies between -FY and FY.
    ``result`` (B, C, FY, FX) is contiguous, in float32.
    """
    b, c, p = _block_of_planes(C, FY * FX, BLOCK_C, BLOCK_P)
    fy = p // FX - SHIFT_Y
    fx = p % FX - SHIFT_X
    fy = tl.where(fy < 0, fy + FY, tl.where(fy >= FY, fy - FY, fy))
    fx = tl.where(fx < 0, fx + FX, tl.where(fx >= FX, fx - FX, fx))
    y = fy // STEP_Y
    x = fx // STEP_X
    hit = (y < H) & (x < W) & (y * STEP_Y == fy) & (x * STEP_X == fx)
    is_position = p < FY * FX
    channel = c.to(tl.int64)
    at = b * stride_sb + channel[:, None] * stride_sc
    at += (y.to(tl.int64) * stride_sy + x.to(tl.int64) * stride_sx)[None, :]
    value = tl.load(
        source + at,
        mask=(c < C)[:, None] & (hit & is_position)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    to = (b * C + channel)[:, None] * tl.cast(FY * FX, tl.int64) + p[None, :]
    tl.store(result + to, value.to(tl.float32), mask=(c < C)[:, None] & is_position[None, :])


@triton.jit
def multiply_kernel(
    spectra,
    weight,
    result,
    B,
    row,
    scale,
    CONJUGATE: tl.constexpr,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result = scale·spectra·weight, or with CONJUGATE times weight's conjugate.

    ``spectra`` and ``result`` are (B, row) and may be the same, ``weight`` is (row,). A program
    loads its part of ``weight`` once for IMAGES images, whose loads are under way together.
    """
    pid = program_index(WIDE)
    blocks = tl.cdiv(row, BLOCK)
    i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    first = pid // blocks * IMAGES
    w_real, w_imaginary = _complex(weight, i, i < row)
    w_real *= scale
    w_imaginary *= scale
    if CONJUGATE:
        w_imaginary = -w_imaginary
    floats = tl.cast(row, tl.int64) * 2
    for j in tl.static_range(IMAGES):
        image = floats * (first + j)
        exists = (i < row) & (first + j < B)
        real, imaginary = _complex(spectra + image, i, exists)
        _store_complex(
            result + image,
            i,
            real * w_real - imaginary * w_imaginary,
            real * w_imaginary + imaginary * w_real,
            exists,
        )


@triton.jit
def multiply_and_sum_kernel(
    spectra,
    grad_spectra,
    result,
    grad_bias,
    B,
    row,
    frequencies,
    scale,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result (row,) = scale · the sum over images of spectra·conj(grad_spectra), first to last.

    The first of a channel's ``frequencies`` is the sum of its plane: the bias's gradient.
    """
    i = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    total_real = tl.zeros([BLOCK], tl.float32)
    total_imaginary = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    floats = tl.cast(row, tl.int64) * 2
    for first in range(0, B, IMAGES):
        for j in tl.static_range(IMAGES):
            image = floats * (first + j)
            exists = (i < row) & (first + j < B)
            real, imaginary = _complex(spectra + image, i, exists)
            g_real, g_imaginary = _complex(grad_spectra + image, i, exists)
            total_real += real * g_real + imaginary * g_imaginary
            total_imaginary += imaginary * g_real - real * g_imaginary
            bias += g_real
    _store_complex(result, i, total_real * scale, total_imaginary * scale, i < row)
    channel = i // frequencies
    tl.store(
        grad_bias + channel,
        bias.to(grad_bias.dtype.element_ty),
        mask=(i < row) & (channel * frequencies == i),
    )


@triton.jit
def gather_kernel(
    source,
    bias,
    result,
    C,
    H,
    W,
    FIRST_Y,
    FIRST_X,
    END_Y,
    END_X,
    FY,
    FX,
    SHIFT_Y,
    SHIFT_X,
    STEP_Y,
    STEP_X,
    stride_sb,
    stride_sc,
    stride_sy,
    stride_sx,
    stride_rb,
    stride_rc,
    stride_ry,
    stride_rx,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """result[b, c, y, x] = source[b, c, (y·STEP_Y + SHIFT_Y) mod FY, …] + bias[c].

    Rows from FIRST_Y to END_Y and columns from FIRST_X to END_X; 0 elsewhere, where no tap meets
    the map. Bias may be None.
    """
    b, c, p = _block_of_planes(C, H * W, BLOCK_C, BLOCK_P)
    y = p // W
    x = p % W
    fy = y * STEP_Y + SHIFT_Y
    fx = x * STEP_X + SHIFT_X
    fy = tl.where(fy < 0, fy + FY, fy).to(tl.int64)
    fx = tl.where(fx < 0, fx + FX, fx).to(tl.int64)
    is_there = inside(y - FIRST_Y, END_Y - FIRST_Y) & inside(x - FIRST_X, END_X - FIRST_X)
    channel = c.to(tl.int64)
    at = b * stride_sb + channel[:, None] * stride_sc + (fy * stride_sy + fx * stride_sx)[None, :]
    is_channel = (c < C)[:, None]
    is_position = (p < H * W)[None, :]
    value = tl.load(
        source + at,
        mask=is_channel & is_position & is_there[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    if bias is not None:
        value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    to = b * stride_rb + channel[:, None] * stride_rc
    to += (y.to(tl.int64) * stride_ry + x.to(tl.int64) * stride_rx)[None, :]
    tl.store(result + to, value.to(result.dtype.element_ty), mask=is_channel & is_position)
