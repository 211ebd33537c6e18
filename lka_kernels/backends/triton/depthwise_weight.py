"""The launches of depthwise backward-weight: partial sums in one of three forms, then their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import tiles
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
from lka_kernels.backends.triton.launch import Launch
from lka_kernels.backends.triton.partial_sums import PartialSums


class _Call(NamedTuple):
    """What the forms share."""

    grad_output: Tensor
    input: Tensor
    rows: Taps
    columns: Taps
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    more_rows: int = 0  # of partial sums, behind those of the groups

    @property
    def taps(self) -> tuple[int, int]:
        return self.rows.count, self.columns.count

    @property
    def sizes(self) -> tuple[int, ...]:
        """H, W, OH, OW."""
        return (*self.input.shape[2:], *self.grad_output.shape[2:])

    @property
    def correlation(self) -> tiles.Correlation:
        """The sizes as those of forward."""
        batch, channels = self.input.shape[:2]
        vector = vector_of(self.input)
        return tiles.Correlation(
            batch=batch,
            channels=channels,
            size=self.sizes[:2],
            out_size=self.sizes[2:],
            taps=self.taps,
            dilation=self.dilation,
            vector=vector,
            slack=-self.columns.before % vector,
            itemsize=self.input.element_size(),
            num_sms=tiles.multiprocessors(self.input.device),
        )

    @property
    def tiles_of_rows(self) -> tiles.WeightGemmTiles | None:
        sizes = self.correlation
        return tiles.weight_gemm_tiles(
            self.taps, self.dilation[1], sizes.vector, sizes.slack, self.sizes[3], sizes.itemsize
        )

    def described_taps(self) -> tuple[int, ...]:
        """KH, KW, first_tap, full_width, full_taps of a kernel."""
        height, width = self.kernel_size
        return (*self.taps, self.rows.first * width + self.columns.first, width, height * width)

    @property
    def bias_row(self) -> int:
        """The kernel row whose outputs are all those that it meets on the map, if there is one."""
        return min(max(round(self.rows.before / self.dilation[0]), 0), self.rows.count - 1)

    def groups(self, programs: int, most_images: int = INT32_END) -> tuple[int, int, Tensor]:
        """Images of a group, how many groups, their partial sums; ``programs`` has one group."""
        batch, channels = self.input.shape[:2]
        num_sms = tiles.multiprocessors(self.input.device)
        images = tiles.ceil_div(batch, tiles.weight_groups(programs, batch, num_sms))
        images = min(images, most_images)
        groups = tiles.ceil_div(batch, images)
        row = channels * (self.kernel_size[0] * self.kernel_size[1] + 1)
        rows = groups + self.more_rows
        return images, groups, self.input.new_empty((rows, row), dtype=torch.float32)


def _plan_direct(call: _Call) -> Launch:
    batch, channels = call.input.shape[:2]
    height, _, out_height, out_width = call.sizes
    t = tiles.direct_weight_tiles(channels, call.taps, channels_in_lanes(call.input))
    programs = (
        tiles.ceil_div(channels, t.block_c)
        * tiles.ceil_div(call.taps[1], t.unroll)
        * tiles.ceil_div(call.taps[0], t.rows)
    )
    images, groups, partials = call.groups(programs)
    return Launch(
        direct.backward_weight_direct_kernel,
        programs * groups,
        (
            call.grad_output,
            call.input,
            partials,
            batch,
            channels,
            *call.sizes,
            call.rows.before,
            call.columns.before,
            *call.dilation,
            *call.described_taps(),
            call.bias_row,
            images,
            *call.grad_output.stride(),
            *call.input.stride(),
        ),
        {
            "ROWS": t.rows,
            "BLOCK_KX": t.unroll,
            "BLOCK_P": t.block_p,
            "BLOCK_C": t.block_c,
            "WIDE": images * (height + out_height) * out_width + t.block_p >= INT32_END,
        },
        t.num_warps,
        3,
    )


def _plan_rows(call: _Call) -> Launch | None:
    """None where the kernel is too wide, or the map too high."""
    batch, channels = call.input.shape[:2]
    height, width, out_height, out_width = call.sizes
    vector, out_vector = vector_of(call.input), vector_of(call.grad_output)
    slack = -call.columns.before % vector
    t = call.tiles_of_rows
    # The kernel divides row numbers by the rows of an image, at most this many, as one product.
    span = height + out_height
    most_images = (2**32 // span - 64) // span
    if t is None or most_images < 1:
        return None
    programs = channels * tiles.ceil_div(call.taps[0], t.rows)
    images, groups, partials = call.groups(programs, most_images)
    largest = max(extent(call.grad_output, images), extent(call.input, images))
    return Launch(
        gemm.backward_weight_rows_kernel,
        programs * groups,
        (
            call.grad_output,
            call.input,
            partials,
            batch,
            channels,
            height,
            width // vector,
            out_height,
            out_width // out_vector,
            call.rows.before,
            (-call.columns.before - slack) // vector,
            slack,
            *call.dilation,
            *call.described_taps(),
            call.bias_row,
            images,
            *in_vectors(call.grad_output.stride(), out_vector),
            *in_vectors(call.input.stride(), vector),
        ),
        {
            "VEC": vector,
            "OUT_VEC": out_vector,
            "ROWS": t.rows,
            "BX": t.bx,
            "WINDOW": t.window,
            "BLOCK_K": t.block_k,
            "BLOCK_KX": tiles.next_power_of_2(call.taps[1]),
            "NARROW": largest < INT32_END,
            "PRECISION": precision(call.input.dtype),
        },
        t.num_warps,
        3,
    )


def _plan_dense(call: _Call) -> Launch | None:
    """None where the maps are too large."""
    batch, channels = call.input.shape[:2]
    if not tiles.weight_dense_fits(call.sizes):
        return None
    images, groups, partials = call.groups(channels)
    return Launch(
        gemm.backward_weight_dense_kernel,
        channels * groups,
        (
            call.grad_output,
            call.input,
            partials,
            batch,
            channels,
            call.rows.before,
            call.columns.before,
            *call.dilation,
            *call.described_taps(),
            images,
            *call.grad_output.stride(),
            *call.input.stride(),
        ),
        {
            **dict(zip(("H", "W", "OH", "OW"), call.sizes, strict=True)),
            "BLOCK": tiles.WEIGHT_DENSE_BLOCK,
            # Sums of fewer than 16 terms the matrix instructions do not have.
            "BLOCK_K": max(16, min(32, tiles.next_power_of_2(images))),
            "BLOCK_T": 64,
            "PRECISION": precision(call.input.dtype),
        },
        4,
        3,
    )


def _moved(call: _Call, form: str) -> tuple[_Call, list[Launch]]:
    """The call on planes and the launches that move channels_last maps there, where this pays."""
    moves = channels_in_lanes(call.input), channels_in_lanes(call.grad_output)
    sixteen_bit = call.input.dtype != torch.float32
    if not any(moves) or not (form == "gemm" or (form == "auto" and sixteen_bit)):
        return call, []
    if form != "gemm":
        sizes = call._replace(input=as_planes(call.input, "meta"))
        correlation = sizes.correlation._replace(num_sms=tiles.multiprocessors(call.input.device))
        if not tiles.weight_moves(correlation, sizes.tiles_of_rows, moves):
            return call, []
    # An expanded gradient, as that of a sum, has neither channels nor columns side by side.
    input, grad_output = (
        t if channels_in_lanes(t) or t.stride(3) == 1 else t.contiguous()
        for t in (call.input, call.grad_output)
    )
    planes = call._replace(input=as_planes(input), grad_output=as_planes(grad_output))
    return planes, [*move(input, planes.input), *move(grad_output, planes.grad_output)]


def _plan_partials(call: _Call, form: str) -> Launch:
    if form == "auto":
        contiguous = call.input.stride(3) == 1 and call.grad_output.stride(3) == 1
        form = "gemm" if contiguous and call.input.dtype != torch.float32 else "direct"
    launch = None
    if form in ("dense", "gemm"):
        launch = _plan_dense(call)
    if launch is None and form in ("rows", "gemm"):
        launch = _plan_rows(call)
    return _plan_direct(call) if launch is None else launch


def plan_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size,
    stride,
    padding,
    dilation,
    form: str = "auto",
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of the backward-weight operator, and the gradients of weight and bias.

    A call that does not fit the form asked for takes the direct one.
    """
    channels = input.shape[1]
    grad_weight = input.new_empty((channels, 1, *kernel_size))
    grad_bias = input.new_empty((channels,))
    if grad_output.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return [], (grad_weight, grad_bias)
    sums = PartialSums()
    launches, partials = plan_partial_sums(
        sums, grad_weight, grad_output, input, padding, dilation, form
    )
    sums.add(partials[:, grad_weight.numel() :], grad_bias)
    return [*launches, *sums.launches()], (grad_weight, grad_bias)


def plan_partial_sums(
    sums: PartialSums,
    grad_weight: Tensor,
    grad_output: Tensor,
    input: Tensor,
    padding,
    dilation,
    form: str = "auto",
    more_rows: int = 0,
) -> tuple[list[Launch], Tensor]:
    """The launches that leave partial sums of ``grad_weight`` (C, 1, kH, kW), added to ``sums``.

    Also the partial sums (rows, C·kH·kW + C): of the weight's gradient, which are the first total
    of ``sums``, and behind them those of the bias's. The last ``more_rows`` rows are left to the
    caller to fill.
    """
    kernel_size = grad_weight.shape[2:]
    rows, columns = (
        taps_that_touch(
            input.shape[2 + i], grad_output.shape[2 + i], kernel_size[i], padding[i], dilation[i]
        )
        for i in (0, 1)
    )
    call = _Call(grad_output, input, rows, columns, tuple(kernel_size), tuple(dilation), more_rows)
    call, moves = _moved(call, form)
    launch = _plan_partials(call, form)
    partials = launch.arguments[2]
    sums.add_taps(
        partials[:, : grad_weight.numel()],
        grad_weight,
        (rows.first, columns.first),
        call.taps,
    )
    return [*moves, launch], partials
