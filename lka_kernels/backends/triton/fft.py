"""Depthwise convolution through torch.fft on a GPU, with one kernel between any two transforms.

The transforms, their sizes and the products are those of ``backends/fft.py``: Y = X·conj(W),
dX = dY·W, dW = sum over the batch of X·conj(dY). Here padding, conversion to float32 and the zeros
between strided elements are one pass; so are product and scale; and so are crop, stride, bias,
memory format and conversion to the dtype of the result.

``steps_…`` describe a call as launches and transforms, and run each at once through the argument
``run``, as a transform's result decides what follows. With a ``run`` that only remembers, and
tensors on the meta device, they are compiled and their bytes are counted without a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import ops, tiles
from lka_kernels.backends.triton import fft_kernels as kernels
from lka_kernels.backends.triton.launch import Launch, Transform
from lka_kernels.backends.triton.replay import remembered
from lka_kernels.backends.triton.run import run as run_launches
from lka_kernels.checks import depthwise_output_size
from lka_kernels.fft_plan import DimensionPlan, plan_dimension


class _Call(NamedTuple):
    """A transform's geometry and what to do with its steps."""

    rows: DimensionPlan
    columns: DimensionPlan
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    run: object

    @property
    def fft_size(self) -> tuple[int, int]:
        return self.rows.fft_size, self.columns.fft_size

    @property
    def scale(self) -> float:
        """Of a transform there and back."""
        return 1.0 / (self.rows.fft_size * self.columns.fft_size)

    def transform(self, source: Tensor, shift=(0, 0), step=(1, 1)) -> Tensor:
        """The spectrum (B, C, FY, FX/2 + 1, 2) of what ``spread_kernel`` makes of ``source``."""
        batch, channels, height, width = source.shape
        spread = source.new_empty((batch, channels, *self.fft_size), dtype=torch.float32)
        in_lanes = source.stride(1) == 1 and source.stride(3) != 1
        blocks, constants = _blocks(spread.shape, in_lanes)
        self.run(
            Launch(
                kernels.spread_kernel,
                batch * blocks,
                (
                    source,
                    spread,
                    channels,
                    height,
                    width,
                    *self.fft_size,
                    *shift,
                    *step,
                    *source.stride(),
                ),
                constants,
                4,
                3,
            )
        )
        spectrum = torch.view_as_real(torch.fft.rfft2(spread).contiguous())
        self.run(Transform(spread, spectrum, inverse=False))
        return spectrum

    def transform_weight(self, weight: Tensor) -> Tensor:
        """The spectrum of the taps that touch, rolled by the padding."""
        kept = weight[
            None,
            :,
            0,
            self.rows.first_tap : self.rows.last_tap,
            self.columns.first_tap : self.columns.last_tap,
        ]
        shift = (self.rows.first_shift, self.columns.first_shift)
        return self.transform(kept, shift, self.dilation)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """The inverse transform (B, C, FY, FX), not scaled: torch would take a pass to scale it."""
        result = torch.fft.irfft2(
            torch.view_as_complex(spectrum), s=self.fft_size, norm="forward"
        ).contiguous()
        self.run(Transform(spectrum, result, inverse=True))
        return result

    def multiply(self, spectra: Tensor, weight: Tensor, *, conjugate: bool) -> Tensor:
        """The scaled product, in place."""
        batch, row = spectra.shape[0], weight.numel() // 2
        block, images = tiles.product_tiles(row, batch, tiles.multiprocessors(spectra.device))
        programs = tiles.ceil_div(row, block) * tiles.ceil_div(batch, images)
        self.run(
            Launch(
                kernels.multiply_kernel,
                programs,
                (spectra, weight, spectra, batch, row, self.scale),
                {
                    "CONJUGATE": conjugate,
                    "BLOCK": block,
                    "IMAGES": images,
                    "WIDE": _wide(row, block, programs),
                },
                4,
                3,
            )
        )
        return spectra

    def multiply_and_sum(
        self, spectra: Tensor, grad_spectra: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The scaled sum of products (1, C, …), and the bias's gradient in ``dtype``."""
        batch, channels = spectra.shape[:2]
        row = spectra[0].numel() // 2
        result = torch.empty_like(spectra[:1])
        grad_bias = spectra.new_empty((channels,), dtype=dtype)
        block = tiles.product_sum_block(row, tiles.multiprocessors(spectra.device))
        programs = tiles.ceil_div(row, block)
        self.run(
            Launch(
                kernels.multiply_and_sum_kernel,
                programs,
                (
                    spectra,
                    grad_spectra,
                    result,
                    grad_bias,
                    batch,
                    row,
                    row // channels,
                    self.scale,
                ),
                {
                    "BLOCK": block,
                    "IMAGES": min(4, tiles.next_power_of_2(batch)),
                    "WIDE": _wide(row, block, programs),
                },
                4,
                3,
            )
        )
        return result, grad_bias

    def gather(self, full: Tensor, result: Tensor, bias=None, step=(1, 1), taps=False) -> Tensor:
        """Fill ``result`` from the inverse transform ``full``; with ``taps``, with those kept."""
        batch, channels, height, width = result.shape
        shift, first, end = (0, 0), (0, 0), (height, width)
        if taps:
            step = self.dilation
            shift = (-self.padding[0], -self.padding[1])
            first = (self.rows.first_tap, self.columns.first_tap)
            end = (self.rows.last_tap, self.columns.last_tap)
        else:  # what is read of it, so that its bytes can be counted
            full = full[:, :, : (height - 1) * step[0] + 1, : (width - 1) * step[1] + 1]
        in_lanes = result.stride(1) == 1 and result.stride(3) != 1
        blocks, constants = _blocks(result.shape, in_lanes)
        self.run(
            Launch(
                kernels.gather_kernel,
                batch * blocks,
                (
                    full,
                    bias,
                    result,
                    channels,
                    height,
                    width,
                    *first,
                    *end,
                    *self.fft_size,
                    *shift,
                    *step,
                    *full.stride(),
                    *result.stride(),
                ),
                constants,
                4,
                3,
            )
        )
        return result


def _describe(input_size, output_size, kernel_size, stride, padding, dilation, run) -> _Call:
    return _Call(
        *(
            plan_dimension(
                input_size[i], output_size[i], kernel_size[i], stride[i], padding[i], dilation[i]
            )
            for i in (0, 1)
        ),
        stride=tuple(stride),
        dilation=tuple(dilation),
        padding=tuple(padding[:2]),
        run=run,
    )


def _blocks(shape, in_lanes: bool) -> tuple[int, dict]:
    """Programs for an image of (B, C, h, w), and the block of each."""
    _, channels, height, width = shape
    block_c, block_p = tiles.plane_tiles(channels, height * width, in_lanes)
    blocks = tiles.ceil_div(channels, block_c) * tiles.ceil_div(height * width, block_p)
    return blocks, {"BLOCK_C": block_c, "BLOCK_P": block_p}


def _wide(row: int, block: int, programs: int) -> bool:
    return 2 * (row + block) >= 2**31 or programs * block >= 2**31


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    return torch.empty(
        (*like.shape[:2], *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=ops.memory_format(channels_last),
    )


def steps_forward(
    input, weight, bias, stride, padding, dilation, channels_last: bool, run
) -> Tensor:
    """Forward: four launches and three transforms."""
    size = depthwise_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    output = _empty(input, size, channels_last)
    if output.numel() == 0:
        return output
    call = _describe(input.shape[2:], size, weight.shape[2:], stride, padding, dilation, run)
    product = call.multiply(call.transform(input), call.transform_weight(weight), conjugate=True)
    bias = None if bias is None else bias.contiguous()
    return call.gather(call.inverse(product), output, bias, call.stride)


def steps_backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last: bool, run
) -> Tensor:
    """Backward-input: four launches and three transforms."""
    grad_input = _empty(grad_output, input_size, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    size = grad_output.shape[2:]
    call = _describe(input_size, size, weight.shape[2:], stride, padding, dilation, run)
    product = call.multiply(
        call.transform(grad_output, step=call.stride),
        call.transform_weight(weight),
        conjugate=False,
    )
    return call.gather(call.inverse(product), grad_input)


def steps_backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation, run
) -> tuple[Tensor, Tensor]:
    """Backward-weight: four launches and three transforms, the last one not of a batch."""
    channels = input.shape[1]
    if grad_output.numel() == 0:
        return input.new_zeros((channels, 1, *kernel_size)), input.new_zeros((channels,))
    size = grad_output.shape[2:]
    call = _describe(input.shape[2:], size, kernel_size, stride, padding, dilation, run)
    product, grad_bias = call.multiply_and_sum(
        call.transform(input), call.transform(grad_output, step=call.stride), input.dtype
    )
    grad_weight = input.new_empty((1, channels, *kernel_size))
    call.gather(call.inverse(product), grad_weight, taps=True)
    return grad_weight.view(channels, 1, *kernel_size), grad_bias


def _run(step: Launch | Transform) -> None:
    if isinstance(step, Launch):
        run_launches([step], step.arguments[0].device)


@remembered("fft forward")
def forward(*arguments) -> Tensor:
    """Schema ``depthwise_conv2d_forward``."""
    return steps_forward(*arguments, _run)


@remembered("fft backward_input")
def backward_input(*arguments) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``."""
    return steps_backward_input(*arguments, _run)


@remembered("fft backward_weight")
def backward_weight(*arguments) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``."""
    return steps_backward_weight(*arguments, _run)
