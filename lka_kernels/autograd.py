"""Gradients: autograd Functions around the registered operators.

The operators stay outside of autograd, so that selective checkpointing and export see the real
forward and backward kernels. Depthwise convolution is linear in each argument, so the derivative
of each of its three operators is again one of the three (a fourth gives both gradients at once
where they are not to be differentiated again): with y = conv(x, w) and <·,·> the inner
product, <dy, conv(x, w)> = <backward_input(dy, w), x> = <backward_weight(dy, x), w>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import ops
from lka_kernels.backends import reference


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call; within a backward pass, with create_graph=True only."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator would take longer than the rest
            if t is not None and t.requires_grad:
                return True
    return False


def depthwise_conv2d(input, weight, bias, stride, padding, dilation, channels_last, backend):
    """conv(input, weight) + bias."""
    arguments = (input, weight, bias, stride, padding, dilation, channels_last)
    if records(input, weight, bias):
        return DepthwiseConv2d.apply(*arguments, backend)
    return ops.DEPTHWISE[backend].forward(*arguments)


def backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last, backend
):
    """grad_input from grad_output and weight."""
    arguments = (grad_output, weight, input_size, stride, padding, dilation, channels_last)
    if records(grad_output, weight):
        return BackwardInput.apply(*arguments, backend)
    return ops.DEPTHWISE[backend].backward_input(*arguments)


def backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation, channels_last, backend
):
    """(grad_weight, grad_bias) from grad_output and input."""
    arguments = (grad_output, input, kernel_size, stride, padding, dilation)
    if records(grad_output, input):
        return BackwardWeight.apply(*arguments, channels_last, backend)
    return ops.DEPTHWISE[backend].backward_weight(*arguments)


class DepthwiseConv2d(torch.autograd.Function):
    """y = conv(input, weight) + bias."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, channels_last, backend):
        ctx.geometry = (stride, padding, dilation)
        ctx.channels_last = channels_last
        ctx.backend = backend
        ctx.input_size = input.shape[2:]
        ctx.kernel_size = weight.shape[2:]
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        return ops.DEPTHWISE[backend].forward(
            input, weight, bias, stride, padding, dilation, channels_last
        )

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        both = ops.DEPTHWISE[ctx.backend].backward if need_input and need_weight else None
        if both is not None and not records(grad_output, input, weight):
            grad_input, grad_weight, grad_bias = both(
                grad_output, input, weight, *ctx.geometry, ctx.channels_last
            )
            return grad_input, grad_weight, grad_bias if need_bias else None, *(None,) * 5
        if need_input:
            grad_input = backward_input(
                grad_output,
                weight,
                ctx.input_size,
                *ctx.geometry,
                ctx.channels_last,
                ctx.backend,
            )
        if need_weight:
            grad_weight, grad_bias = backward_weight(
                grad_output,
                input,
                ctx.kernel_size,
                *ctx.geometry,
                ctx.channels_last,
                ctx.backend,
            )
        elif need_bias:
            grad_bias = grad_output.sum((0, 2, 3))
        return (
            grad_input,
            grad_weight,
            grad_bias if need_bias else None,
            *(None,) * 5,
        )


class BackwardInput(torch.autograd.Function):
    """grad_input from grad_output and weight."""

    @staticmethod
    def forward(
        ctx, grad_output, weight, input_size, stride, padding, dilation, channels_last, backend
    ):
        ctx.geometry = (stride, padding, dilation)
        ctx.channels_last = channels_last
        ctx.backend = backend
        ctx.kernel_size = weight.shape[2:]
        ctx.save_for_backward(grad_output, weight)
        return ops.DEPTHWISE[backend].backward_input(
            grad_output, weight, input_size, stride, padding, dilation, channels_last
        )

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, weight = ctx.saved_tensors
        need_grad_output, need_weight = ctx.needs_input_grad[:2]
        grad_grad_output = grad_weight = None
        if need_grad_output:
            grad_grad_output = depthwise_conv2d(
                grad_grad_input,
                weight,
                None,
                *ctx.geometry,
                ctx.channels_last,
                ctx.backend,
            )
        if need_weight:
            grad_weight, _ = backward_weight(
                grad_output,
                grad_grad_input,
                ctx.kernel_size,
                *ctx.geometry,
                ctx.channels_last,
                ctx.backend,
            )
        return grad_grad_output, grad_weight, *(None,) * 6


class BackwardWeight(torch.autograd.Function):
    """(grad_weight, grad_bias) from grad_output and input."""

    @staticmethod
    def forward(
        ctx, grad_output, input, kernel_size, stride, padding, dilation, channels_last, backend
    ):
        ctx.geometry = (stride, padding, dilation)
        ctx.channels_last = channels_last
        ctx.backend = backend
        ctx.save_for_backward(grad_output, input)
        ctx.set_materialize_grads(False)
        return ops.DEPTHWISE[backend].backward_weight(
            grad_output, input, kernel_size, stride, padding, dilation
        )

    @staticmethod
    def backward(ctx, grad_grad_weight, grad_grad_bias):
        grad_output, input = ctx.saved_tensors
        need_grad_output, need_input = ctx.needs_input_grad[:2]
        grad_grad_output = grad_input = None
        common = (*ctx.geometry, ctx.channels_last, ctx.backend)
        if need_grad_output:
            if grad_grad_weight is not None:
                grad_grad_output = depthwise_conv2d(
                    input, grad_grad_weight, grad_grad_bias, *common
                )
            elif grad_grad_bias is not None:
                grad_grad_output = grad_grad_bias[:, None, None].expand_as(grad_output)
        if need_input and grad_grad_weight is not None:
            grad_input = backward_input(grad_output, grad_grad_weight, input.shape[2:], *common)
        return grad_grad_output, grad_input, *(None,) * 6


# Differentiable tensor arguments of the adapter, in the order of its operators.
_NUM_ADAPTER_TENSORS = 8


class LargeKernelAdapter(torch.autograd.Function):
    """The fused adapter.

    Arguments are the tensors of ``reference.large_kernel_adapter`` and, in one tuple, as each costs
    time, its options, the backend, and whether x is its own residual: the residual is then None,
    and the backward operator adds grad_output to grad_x, which spares autograd a pass over three
    tensors.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        down_weight,
        down_bias,
        conv_weight,
        conv_bias,
        up_weight,
        up_bias,
        residual,
        seed,
        call,
    ):
        grid_size, options, backend, own_residual = ctx.call = call
        weights = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
        y, z, c = ops.ADAPTER[backend].forward(
            x, *weights, x if own_residual else residual, seed, *grid_size, *options
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, seed, z, c)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        grid_size, options, backend, own_residual = ctx.call
        if grad_output is None:
            return (None,) * (_NUM_ADAPTER_TENSORS + 2)
        x, *weights, seed, z, c = ctx.saved_tensors
        *output_mask, need_residual, _, _ = ctx.needs_input_grad
        grad_residual = grad_output if need_residual else None
        if True not in output_mask:  # then it is the residual that wants its gradient
            return (*(None,) * len(output_mask), grad_residual, None, None)
        if torch.is_grad_enabled():
            tensors = (x, *weights)
            grads = _differentiable_adapter_backward(
                grad_output, tensors, seed, grid_size, options, output_mask
            )
            if own_residual and output_mask[0]:
                grads[0] = grads[0] + grad_output
        else:
            grads = ops.ADAPTER[backend].backward(
                grad_output,
                x,
                z,
                c,
                *weights,
                seed,
                *grid_size,
                *options,
                own_residual,
                output_mask,
            )
            if False in output_mask:
                grads = [
                    grad if asked else None for grad, asked in zip(grads, output_mask, strict=True)
                ]
        return (*grads, grad_residual, None, None)


def _differentiable_adapter_backward(grad_output, tensors, seed, grid_size, options, output_mask):
    """Gradients that can be differentiated again, through the reference.

    Second derivatives of an adapter are rare (meta-learning, gradient penalties), so they are
    served by plain PyTorch, which replays the same dropout stream.
    """
    # Views keep arguments that are one and the same tensor apart.
    arguments = [None if t is None else t.view_as(t) for t in tensors]
    output = reference.large_kernel_adapter(*arguments, None, seed, grid_size, *options)
    wanted = [a for a, asked in zip(arguments, output_mask, strict=True) if asked]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(found) if asked else None for asked in output_mask]


def large_kernel_adapter(x, *rest) -> Tensor:
    """Apply the fused adapter: the arguments of ``reference.large_kernel_adapter``, the backend."""
    *weights, residual, seed, grid_size = rest[: _NUM_ADAPTER_TENSORS + 1]
    *options, backend = rest[_NUM_ADAPTER_TENSORS + 1 :]
    if records(x, *weights, residual):
        own_residual = residual is x
        if own_residual:
            residual = None
        call = grid_size, tuple(options), backend, own_residual
        return LargeKernelAdapter.apply(x, *weights, residual, seed, call)
    return ops.ADAPTER[backend].forward(x, *weights, residual, seed, *grid_size, *options)[0]
