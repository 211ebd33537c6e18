"""Depthwise convolution on a GPU: which kernels are launched, with which arguments.

``plan_forward``, ``plan_backward_input`` and ``plan_backward_weight`` describe the launches without
running them: from tensors on the meta device too, which is how they are compiled without a GPU.
Each takes the arguments of its operator and a form: "direct"; of forward and backward-input also
"patch" and "dense", of all "gemm", which is the better of these; "auto" decides by sizes
(``lka_kernels/tiles.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import ops, tiles
from lka_kernels.backends.triton import depthwise_direct_kernels as direct
from lka_kernels.backends.triton import depthwise_gemm_kernels as gemm
from lka_kernels.backends.triton.launch import Launch, run
from lka_kernels.checks import depthwise_output_size

_INT32_END = 2**31


class _Taps(NamedTuple):
    """The taps of one dimension that some output meets on the map; all others are left out."""

    first: int
    count: int
    before: int  # padding in front of the first tap; negative where the map is cropped


def _taps_that_touch(size: int, out_size: int, taps: int, before: int, dilation: int) -> _Taps:
    first = max(0, tiles.ceil_div(before - (out_size - 1), dilation))
    end = min(taps, (size - 1 + before) // dilation + 1)
    # One tap is kept where none touches: the kernels then need no such case.
    first = min(first, taps - 1)
    return _Taps(first, max(1, end - first), before - first * dilation)


def _vector(t: Tensor) -> int:
    """Elements, up to 16 bytes, of which rows, planes and images of ``t`` are multiples."""
    vector = 16 // t.element_size()
    if t.shape[3] > 1 and t.stride(3) != 1:
        return 1
    while any(n % vector for n in (t.shape[3], *t.stride()[:3])):
        vector //= 2
    return vector


def _extent(t: Tensor, images: int) -> int:
    """More than the offsets within a plane, or within ``images`` images of a channel."""
    return images * t.stride(0) + 2 * t.shape[2] * t.stride(2) + 2 * t.shape[3] * t.stride(3)


def _channels_in_lanes(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(3) != 1


def _precision(dtype: torch.dtype) -> str:
    # Only float32 has a choice, and obeys the switch that torch's own convolutions obey.
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


class _Correlate(NamedTuple):
    """result[y, x] = sum of source[y - top + ky·DY, x - left + kx·DX]·tap[ky, kx] + bias."""

    source: Tensor
    weight: Tensor
    bias: Tensor | None
    result: Tensor
    rows: _Taps
    columns: _Taps
    dilation: tuple[int, int]
    first_tap: int
    tap_strides: tuple[int, int, int]
    reverse: bool

    def sizes(self) -> tiles.Correlation:
        vector = _vector(self.source)
        return tiles.Correlation(
            batch=self.source.shape[0],
            channels=self.source.shape[1],
            size=tuple(self.source.shape[2:]),
            out_size=tuple(self.result.shape[2:]),
            taps=(self.rows.count, self.columns.count),
            dilation=self.dilation,
            vector=vector,
            slack=-self.columns.before % vector,
            itemsize=self.source.element_size(),
            num_sms=tiles.multiprocessors(self.source.device),
        )


def _describe(source, weight, bias, result, top, left, dilation, reverse: bool) -> _Correlate:
    """Clip the taps and, with ``reverse``, take them from the last to the first."""
    dilation = tuple(dilation)
    _, _, kernel_height, kernel_width = weight.shape
    if _channels_in_lanes(source):
        # Small, and then neighbouring lanes read neighbouring taps.
        weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    rows, columns = (
        _taps_that_touch(source.shape[2 + i], result.shape[2 + i], taps, before, dilation[i])
        for i, (taps, before) in enumerate(((kernel_height, top), (kernel_width, left)))
    )
    stride_c, _, stride_y, stride_x = weight.stride()
    ky, kx = rows.first, columns.first
    if reverse:
        ky, kx = kernel_height - 1 - ky, kernel_width - 1 - kx
    sign = -1 if reverse else 1
    return _Correlate(
        source,
        weight,
        bias,
        result,
        rows,
        columns,
        dilation,
        ky * stride_y + kx * stride_x,
        (stride_c, sign * stride_y, sign * stride_x),
        reverse,
    )


def _plan_direct(call: _Correlate, sizes: tiles.Correlation) -> Launch:
    in_lanes = _channels_in_lanes(call.source)
    rows = tiles.direct_rows(sizes.taps[0])
    row_blocks = call.dilation[0] * tiles.ceil_div(
        tiles.ceil_div(sizes.out_size[0], call.dilation[0]), rows
    )
    positions = sizes.batch * row_blocks * sizes.out_size[1]
    t = tiles.direct_tiles(positions, sizes.channels, sizes.taps, in_lanes, sizes.num_sms)
    return Launch(
        direct.correlate_direct_kernel,
        tiles.ceil_div(positions, t.block_p) * tiles.ceil_div(sizes.channels, t.block_c),
        (
            call.source,
            call.weight,
            call.bias,
            call.result,
            positions,
            row_blocks,
            sizes.channels,
            *sizes.size,
            *sizes.out_size,
            call.rows.before,
            call.columns.before,
            *call.dilation,
            sizes.taps[0],
            call.first_tap,
            *call.tap_strides,
            *call.source.stride(),
            *call.result.stride(),
        ),
        {
            "KW": sizes.taps[1],
            "UNROLL": t.unroll,
            "ROWS": t.rows,
            "BLOCK_P": t.block_p,
            "BLOCK_C": t.block_c,
            "WIDE": positions + t.block_p >= _INT32_END,
        },
        t.num_warps,
        3,
    )


def _in_vectors(strides: tuple[int, ...], vector: int) -> tuple[int, ...]:
    """Strides (b, c, y) in units of ``vector`` and the stride of a column as it is."""
    return (*(stride // vector for stride in strides[:3]), strides[3])


def _plan_patch(call: _Correlate, sizes: tiles.Correlation) -> Launch:
    t = tiles.patch_tiles(sizes)
    vector, out_vector = _vector(call.source), _vector(call.result)
    patch_rows = call.dilation[0] * tiles.ceil_div(
        tiles.ceil_div(sizes.out_size[0], call.dilation[0]), t.rows
    )
    rows_of_m = patch_rows * sizes.batch
    return Launch(
        gemm.correlate_patch_kernel,
        tiles.ceil_div(rows_of_m, t.block_m)
        * tiles.ceil_div(sizes.out_size[1], t.bx)
        * sizes.channels,
        (
            call.source,
            call.weight,
            call.bias,
            call.result,
            patch_rows,
            sizes.batch,
            sizes.channels,
            sizes.size[0],
            sizes.size[1] // vector,
            sizes.out_size[0],
            sizes.out_size[1] // out_vector,
            call.rows.before,
            (-call.columns.before - sizes.slack) // vector,
            sizes.slack,
            t.window,
            *sizes.taps,
            call.first_tap,
            *call.tap_strides,
            *_in_vectors(call.source.stride(), vector),
            *_in_vectors(call.result.stride(), out_vector),
        ),
        {
            "DY": call.dilation[0],
            "DX": call.dilation[1],
            "VEC": vector,
            "OUT_VEC": out_vector,
            "ROWS": t.rows,
            "BX": t.bx,
            "BLOCK_M": t.block_m,
            "BLOCK_K": t.block_k,
            "WIDE": rows_of_m + t.block_m >= _INT32_END,
            "NARROW": _extent(call.source, 0) < _INT32_END,
            "PRECISION": _precision(call.source.dtype),
        },
        t.num_warps,
        3,
    )


def _plan_dense(call: _Correlate, sizes: tiles.Correlation) -> Launch:
    t = tiles.dense_tiles(sizes)
    stride_b, stride_c, stride_y, stride_x = call.source.stride()
    flat = stride_x == 1 and (stride_y == sizes.size[1] or sizes.size[0] == 1)
    vector = 1
    if flat:
        vector = 16 // call.source.element_size()
        while stride_b % vector or stride_c % vector:
            vector //= 2
    outputs = sizes.out_size[0] * sizes.out_size[1]
    # From the first element to the last output and from the last element to the first output.
    all_meet = call.dilation == (1, 1) and all(
        taps.before - (out_size - 1) >= 0 and size - 1 + taps.before < taps.count
        for taps, size, out_size in zip(
            (call.rows, call.columns), sizes.size, sizes.out_size, strict=True
        )
    )
    return Launch(
        gemm.correlate_dense_kernel,
        tiles.ceil_div(sizes.batch, t.block_m)
        * tiles.ceil_div(outputs, t.block_n)
        * sizes.channels,
        (
            call.source,
            call.weight,
            call.bias,
            call.result,
            sizes.batch,
            sizes.channels,
            *sizes.out_size,
            call.rows.before,
            call.columns.before,
            *sizes.taps,
            call.first_tap,
            *call.tap_strides,
            stride_b // vector,
            stride_c // vector,
            stride_y,
            stride_x,
            *call.result.stride(),
        ),
        {
            "DY": call.dilation[0],
            "DX": call.dilation[1],
            "H": sizes.size[0],
            "W": sizes.size[1],
            "VEC": vector,
            "FLAT": flat,
            "ALL_MEET": all_meet,
            "BLOCK_M": t.block_m,
            "BLOCK_N": t.block_n,
            "BLOCK_K": t.block_k,
            "WIDE": sizes.batch + t.block_m >= _INT32_END,
            "PRECISION": _precision(call.source.dtype),
        },
        t.num_warps,
        3,
    )


_CORRELATE = {"direct": _plan_direct, "patch": _plan_patch, "dense": _plan_dense}


def _plan_correlate(call: _Correlate, form: str) -> list[Launch]:
    if call.result.numel() == 0:
        return []
    sizes = call.sizes()
    if form == "auto":
        contiguous = call.source.stride(3) == 1 or sizes.size[1] == 1
        form = tiles.correlation_form(sizes, call.source.dtype, contiguous)
    elif form == "gemm":
        form = tiles.gemm_form(sizes)
    return [_CORRELATE[form](call, sizes)]


def plan_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    channels_last: bool,
    form: str = "auto",
) -> tuple[list[Launch], Tensor]:
    """The launches of the forward operator, and the result they fill."""
    size = depthwise_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    output = torch.empty(
        (*input.shape[:2], *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=ops.memory_format(channels_last),
    )
    top, left = padding[:2]
    call = _describe(input, weight, bias, output, top, left, dilation, reverse=False)
    return _plan_correlate(call, form), output


def plan_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size,
    stride,
    padding,
    dilation,
    channels_last: bool,
    form: str = "auto",
) -> tuple[list[Launch], Tensor]:
    """The launches of the backward-input operator, and the result they fill."""
    grad_input = torch.empty(
        (*grad_output.shape[:2], *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=ops.memory_format(channels_last),
    )
    # The input at y meets tap ky on its way to the output at y + top - ky·DY.
    top, left = (dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in (0, 1))
    call = _describe(grad_output, weight, None, grad_input, top, left, dilation, reverse=True)
    return _plan_correlate(call, form), grad_input


def plan_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size,
    stride,
    padding,
    dilation,
    form: str = "auto",
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of the backward-weight operator, and the gradients of weight and bias."""
    batch, channels, height, width = input.shape
    out_height, out_width = grad_output.shape[2:]
    kernel_height, kernel_width = kernel_size
    grad_weight = input.new_empty((channels, 1, kernel_height, kernel_width))
    grad_bias = input.new_empty((channels,))
    if grad_output.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return [], (grad_weight, grad_bias)
    rows = _taps_that_touch(height, out_height, kernel_height, padding[0], dilation[0])
    columns = _taps_that_touch(width, out_width, kernel_width, padding[1], dilation[1])
    taps = (rows.count, columns.count)
    full_taps = kernel_height * kernel_width
    num_sms = tiles.multiprocessors(input.device)
    vector, out_vector = _vector(input), _vector(grad_output)
    slack = -columns.before % vector
    # The kernel row whose outputs are all those that it meets on the map, if there is one.
    bias_row = min(max(round(rows.before / dilation[0]), 0), rows.count - 1)
    gemm_tiles = None
    contiguous = input.stride(3) == 1 and grad_output.stride(3) == 1
    # The kernel divides row numbers by the rows of an image, at most this many, as one product.
    span = height + out_height
    most_images = (2**32 // span - 64) // span
    wanted = form == "gemm" or (form == "auto" and contiguous and input.dtype != torch.float32)
    if wanted and most_images >= 1:
        gemm_tiles = tiles.weight_gemm_tiles(
            taps, dilation[1], vector, slack, out_width, input.element_size()
        )
    in_lanes = _channels_in_lanes(input)
    if gemm_tiles is None:
        t = tiles.direct_weight_tiles(channels, taps, in_lanes)
        programs = (
            tiles.ceil_div(channels, t.block_c)
            * tiles.ceil_div(taps[1], t.unroll)
            * tiles.ceil_div(taps[0], t.rows)
        )
    else:
        programs = channels * tiles.ceil_div(taps[0], gemm_tiles.rows)
    images = tiles.ceil_div(batch, tiles.weight_groups(programs, batch, num_sms))
    if gemm_tiles is not None:
        images = min(images, most_images)
    groups = tiles.ceil_div(batch, images)
    partials = input.new_empty((groups, channels * (full_taps + 1)), dtype=torch.float32)
    described = (*taps, rows.first * kernel_width + columns.first, kernel_width, full_taps)
    if gemm_tiles is None:
        launch = Launch(
            direct.backward_weight_direct_kernel,
            programs * groups,
            (
                grad_output,
                input,
                partials,
                batch,
                channels,
                height,
                width,
                out_height,
                out_width,
                rows.before,
                columns.before,
                *dilation,
                *described,
                bias_row,
                images,
                *grad_output.stride(),
                *input.stride(),
            ),
            {
                "ROWS": t.rows,
                "BLOCK_KX": t.unroll,
                "BLOCK_P": t.block_p,
                "BLOCK_C": t.block_c,
                "WIDE": images * (height + out_height) * out_width + t.block_p >= _INT32_END,
            },
            t.num_warps,
            3,
        )
    else:
        t = gemm_tiles
        launch = Launch(
            gemm.backward_weight_gemm_kernel,
            programs * groups,
            (
                grad_output,
                input,
                partials,
                batch,
                channels,
                height,
                width // vector,
                out_height,
                out_width // out_vector,
                rows.before,
                (-columns.before - slack) // vector,
                slack,
                *dilation,
                *described,
                bias_row,
                images,
                *_in_vectors(grad_output.stride(), out_vector),
                *_in_vectors(input.stride(), vector),
            ),
            {
                "VEC": vector,
                "OUT_VEC": out_vector,
                "ROWS": t.rows,
                "BX": t.bx,
                "WINDOW": t.window,
                "BLOCK_K": t.block_k,
                "BLOCK_KX": tiles.next_power_of_2(taps[1]),
                "NARROW": max(_extent(grad_output, images), _extent(input, images)) < _INT32_END,
                "PRECISION": _precision(input.dtype),
            },
            t.num_warps,
            3,
        )
    block = 128
    total = Launch(
        direct.sum_partials_kernel,
        tiles.ceil_div(channels * (full_taps + 1), block),
        (
            partials,
            groups,
            grad_weight,
            grad_bias,
            channels,
            rows.first,
            columns.first,
            *taps,
            kernel_width,
            full_taps,
        ),
        {"BLOCK": block, "GROUPS": min(16, tiles.next_power_of_2(groups))},
        4,
        3,
    )
    return [launch, total], (grad_weight, grad_bias)


def forward(input: Tensor, *arguments) -> Tensor:
    """Schema ``depthwise_conv2d_forward``, and a form."""
    launches, output = plan_forward(input, *arguments)
    run(launches, input.device)
    return output


def backward_input(grad_output: Tensor, *arguments) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``, and a form."""
    launches, grad_input = plan_backward_input(grad_output, *arguments)
    run(launches, grad_output.device)
    return grad_input


def backward_weight(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``, and a form."""
    launches, grads = plan_backward_weight(grad_output, *arguments)
    run(launches, grad_output.device)
    return grads
