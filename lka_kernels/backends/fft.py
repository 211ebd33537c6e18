"""Depthwise convolution through torch.fft: forward, backward-input and backward-weight.

Runs on every device that has torch.fft. The kernel is stored rolled by its padding, so that the
wanted outputs start at index 0 and the crop is a slice. With X, W, Y the real transforms,
Y = X·conj(W), dX = dY·W and dW = sum over the batch of X·conj(dY).

Conjugates are taken at once (``conj_physical``): inside a graph of torch.compile the dispatch key
that resolves the lazy ``conj()`` is excluded, and the operator would silently multiply by W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import ops
from lka_kernels.checks import depthwise_output_size
from lka_kernels.fft_plan import DimensionPlan, plan_dimension


def _plan(input_size, output_size, kernel_size, stride, padding, dilation):
    return tuple(
        plan_dimension(
            input_size[i], output_size[i], kernel_size[i], stride[i], padding[i], dilation[i]
        )
        for i in (0, 1)
    )


def _fft_size(plan: tuple[DimensionPlan, DimensionPlan]) -> tuple[int, int]:
    return plan[0].fft_size, plan[1].fft_size


def _tap_indices(plan: DimensionPlan, dilation: int, device) -> Tensor:
    """Where each kept tap stands in the rolled kernel."""
    taps = torch.arange(plan.last_tap - plan.first_tap, device=device)
    return (taps * dilation + plan.first_shift) % plan.fft_size


def _transform(x: Tensor, plan, stride=(1, 1)) -> Tensor:
    """Real transform of (B, C, h, w) in the accumulation dtype, zeros between strided elements."""
    x = x.to(ops.accumulation_dtype(x.dtype))
    if stride != (1, 1):
        height, width = x.shape[2:]
        spread = x.new_zeros(
            *x.shape[:2], (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
        )
        spread[:, :, :: stride[0], :: stride[1]] = x
        x = spread
    return torch.fft.rfft2(x.contiguous(), s=_fft_size(plan))


def _transform_weight(weight: Tensor, plan, dilation) -> Tensor:
    rows, columns = plan
    kept = weight[:, 0, rows.first_tap : rows.last_tap, columns.first_tap : columns.last_tap]
    kept = kept.to(ops.accumulation_dtype(weight.dtype))
    rolled = kept.new_zeros(weight.shape[0], *_fft_size(plan))
    at_rows = _tap_indices(rows, dilation[0], weight.device)
    at_columns = _tap_indices(columns, dilation[1], weight.device)
    rolled[:, at_rows[:, None], at_columns[None, :]] = kept
    return torch.fft.rfft2(rolled)


def _finish(result: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # Not contiguous(): where sizes of 1 make it a no-op, its strides are not those of the fake.
    finished = torch.empty(
        result.shape,
        dtype=dtype,
        device=result.device,
        memory_format=ops.memory_format(channels_last),
    )
    return finished.copy_(result)


def _empty_batch(input_or_grad: Tensor) -> bool:
    return input_or_grad.shape[0] == 0


def forward(input, weight, bias, stride, padding, dilation, channels_last) -> Tensor:
    """Schema ``depthwise_conv2d_forward``."""
    stride = tuple(stride)
    output_size = depthwise_output_size(
        input.shape[2:], weight.shape[2:], stride, padding, dilation
    )
    if _empty_batch(input):
        return _finish(input.new_zeros(0, input.shape[1], *output_size), input.dtype, channels_last)
    plan = _plan(input.shape[2:], output_size, weight.shape[2:], stride, padding, dilation)
    product = _transform(input, plan)
    product *= _transform_weight(weight, plan, dilation).conj_physical_()
    full = torch.fft.irfft2(product, s=_fft_size(plan))
    last_row = (output_size[0] - 1) * stride[0] + 1
    last_column = (output_size[1] - 1) * stride[1] + 1
    output = full[:, :, : last_row : stride[0], : last_column : stride[1]]
    if bias is not None:
        output = output + bias[:, None, None].to(output.dtype)
    return _finish(output, input.dtype, channels_last)


def backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last
) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``."""
    stride = tuple(stride)
    if _empty_batch(grad_output):
        grad = grad_output.new_zeros(*grad_output.shape[:2], *input_size)
        return _finish(grad, grad_output.dtype, channels_last)
    plan = _plan(input_size, grad_output.shape[2:], weight.shape[2:], stride, padding, dilation)
    product = _transform(grad_output, plan, stride)
    product *= _transform_weight(weight, plan, dilation)
    full = torch.fft.irfft2(product, s=_fft_size(plan))
    return _finish(full[:, :, : input_size[0], : input_size[1]], grad_output.dtype, channels_last)


def backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``."""
    stride = tuple(stride)
    channels = input.shape[1]
    grad_weight = input.new_zeros(channels, 1, *kernel_size)
    accumulate = ops.accumulation_dtype(input.dtype)
    grad_bias = grad_output.sum((0, 2, 3), dtype=accumulate).to(input.dtype)
    if _empty_batch(input):
        return grad_weight, grad_bias
    plan = _plan(input.shape[2:], grad_output.shape[2:], kernel_size, stride, padding, dilation)
    rows, columns = plan
    product = _transform(grad_output, plan, stride).conj_physical_()
    product *= _transform(input, plan)
    full = torch.fft.irfft2(product.sum(0), s=_fft_size(plan))
    at_rows = _tap_indices(rows, dilation[0], input.device)
    at_columns = _tap_indices(columns, dilation[1], input.device)
    grad_weight[:, 0, rows.first_tap : rows.last_tap, columns.first_tap : columns.last_tap] = full[
        :, at_rows[:, None], at_columns[None, :]
    ].to(input.dtype)
    return grad_weight, grad_bias


for _direction, _function in (
    ("forward", forward),
    ("backward_input", backward_input),
    ("backward_weight", backward_weight),
):
    ops.LIBRARY.impl(f"depthwise_conv2d_{_direction}_fft", _function, "CompositeExplicitAutograd")
