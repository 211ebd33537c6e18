"""Depthwise convolution on a GPU: which kernels are launched, with which arguments.

``plan_forward``, ``plan_backward_input`` and ``plan_backward_weight`` describe the launches without
running them: from tensors on the meta device too, which is how they are compiled without a GPU.
Each takes the arguments of its operator and a form: "direct", "patch" and "dense" of forward and
backward-input, "direct", "rows" and "dense" of backward-weight; "gemm" is the best of all but the
direct one, and "auto" decides by sizes (``lka_kernels/tiles``). Both move channels_last maps to
planes for the tensor cores, "auto" in 16-bit types and where this pays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import ops, tiles
from lka_kernels.backends.triton import depthwise_direct_kernels as direct
from lka_kernels.backends.triton import depthwise_gemm_kernels as gemm
from lka_kernels.backends.triton.depthwise_geometry import (
    INT32_END,
    Taps,
    channels_in_lanes,
    extent,
    in_vectors,
    precision,
    taps_that_touch,
    vector_of,
)
from lka_kernels.backends.triton.depthwise_planes import as_planes, move
from lka_kernels.backends.triton.depthwise_weight import plan_backward_weight
from lka_kernels.backends.triton.launch import Launch
from lka_kernels.backends.triton.replay import remembered
from lka_kernels.backends.triton.run import run
from lka_kernels.checks import depthwise_output_size


class _Correlate(NamedTuple):
    """result[y, x] = sum of source[y - top + ky·DY, x - left + kx·DX]·tap[ky, kx] + bias."""

    source: Tensor
    weight: Tensor
    bias: Tensor | None
    result: Tensor
    rows: Taps
    columns: Taps
    dilation: tuple[int, int]
    first_tap: int
    tap_strides: tuple[int, int, int]
    reverse: bool

    def sizes(self) -> tiles.Correlation:
        vector = vector_of(self.source)
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
    if channels_in_lanes(source):
        # Small, and then neighbouring lanes read neighbouring taps.
        weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    bias = None if bias is None else bias.contiguous()
    rows, columns = (
        taps_that_touch(source.shape[2 + i], result.shape[2 + i], taps, before, dilation[i])
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
    in_lanes = channels_in_lanes(call.source)
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
            "WIDE": positions + t.block_p >= INT32_END,
        },
        t.num_warps,
        3,
    )


def _plan_patch(call: _Correlate, sizes: tiles.Correlation) -> Launch:
    t = tiles.patch_tiles(sizes)
    vector, out_vector = vector_of(call.source), vector_of(call.result)
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
            rows_of_m,
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
            *in_vectors(call.source.stride(), vector),
            *in_vectors(call.result.stride(), out_vector),
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
            "WIDE": rows_of_m + t.block_m >= INT32_END,
            "NARROW": extent(call.source, 0) < INT32_END,
            "PRECISION": precision(call.source.dtype),
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
            "WIDE": sizes.batch + t.block_m >= INT32_END,
            "PRECISION": precision(call.source.dtype),
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


def plan_correlation(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    *,
    reverse: bool,
    form: str = "auto",
) -> list[Launch]:
    """The launches that fill ``result`` (B, C, OH, OW) from ``source`` (B, C, H, W).

    ``padding`` is (top, left); ``reverse`` takes the taps from the last to the first. channels_last
    maps are moved to planes where this pays.
    """
    geometry = (*padding, dilation)
    call = _describe(source, weight, bias, result, *geometry, reverse)
    moves = channels_in_lanes(source), channels_in_lanes(result)
    sixteen_bit = source.dtype != torch.float32
    if moves[0] and result.numel() and (form == "gemm" or (form == "auto" and sixteen_bit)):
        sizes = call._replace(source=as_planes(source, "meta")).sizes()
        sizes = sizes._replace(num_sms=tiles.multiprocessors(source.device))
        if form == "gemm" or tiles.correlation_moves(sizes, *moves):
            planes = as_planes(source), as_planes(result)
            on_planes = _describe(planes[0], weight, bias, planes[1], *geometry, reverse)
            return [
                *move(source, planes[0]),
                *_plan_correlate(on_planes, "gemm"),
                *move(planes[1], result),
            ]
    return _plan_correlate(call, form)


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
    launches = plan_correlation(
        input, weight, bias, output, (top, left), dilation, reverse=False, form=form
    )
    return launches, output


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
    launches = plan_correlation(
        grad_output, weight, None, grad_input, (top, left), dilation, reverse=True, form=form
    )
    return launches, grad_input


@remembered("depthwise forward", torch.backends.cudnn.conv)
def forward(input: Tensor, *arguments) -> Tensor:
    """Schema ``depthwise_conv2d_forward``, and a form."""
    launches, output = plan_forward(input, *arguments)
    run(launches, input.device)
    return output


@remembered("depthwise backward_input", torch.backends.cudnn.conv)
def backward_input(grad_output: Tensor, *arguments) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``, and a form."""
    launches, grad_input = plan_backward_input(grad_output, *arguments)
    run(launches, grad_output.device)
    return grad_input


@remembered("depthwise backward_weight", torch.backends.cudnn.conv)
def backward_weight(grad_output: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``, and a form."""
    launches, grads = plan_backward_weight(grad_output, *arguments)
    run(launches, grad_output.device)
    return grads
