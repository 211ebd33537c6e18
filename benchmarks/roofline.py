"""Bytes and FLOPs that a case cannot do without: pure functions of numbers, no torch.

A multiply-add counts as two FLOPs; biases, activations and the residual's addition are not
counted, as they are a few per element. Each tensor is read or written once: what an implementation
reads twice is its own affair.

"Clipped" FLOPs count the products whose input element exists; "unclipped" FLOPs count all taps of
every output, those that meet padding too. The floor uses the clipped ones, which cannot be avoided;
publications mostly quote unclipped ones.
"""

from __future__ import annotations

from typing import NamedTuple

DIRECTIONS = ("forward", "dX", "dW", "forward+backward")


class Work(NamedTuple):
    """What a case cannot do without."""

    bytes: int
    flops: int  # clipped
    unclipped_flops: int


def floor_seconds(work: Work, bytes_per_second: float, flops_per_second: float) -> float:
    """The larger of the time to move the bytes and the time to multiply."""
    return max(work.bytes / bytes_per_second, work.flops / flops_per_second)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs of one dimension, ``padding`` at both ends."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def met_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs (output, tap) of one dimension whose input element exists.

    Output m and tap k meet element m·stride + k·dilation - padding. In two dimensions the counts
    multiply.
    """
    outputs = output_size(size, kernel, stride, padding, dilation)
    count = 0
    for tap in range(kernel):
        shift = tap * dilation - padding
        # Outputs with 0 <= m·stride + shift < size.
        first = max(0, -(shift // stride))
        last = min(outputs, (size - 1 - shift) // stride + 1)
        count += max(0, last - first)
    return count


def depthwise(
    direction: str,
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    bias: bool = True,
    element_size: int = 4,
) -> Work:
    """One depthwise convolution, or its gradients, on (batch, channels, *size).

    Args:
        direction: "forward"; "dX", the gradient of the input alone; "dW", that of the weight
            alone; "forward+backward", all of them, the gradients in one pass over grad_output.
        element_size: bytes of an element of every tensor.
    """
    dimensions = list(zip(size, kernel, stride, padding, dilation, strict=True))
    outputs = [output_size(*d) for d in dimensions]
    planes = batch * channels
    met = planes * met_taps(*dimensions[0]) * met_taps(*dimensions[1])
    every = planes * outputs[0] * outputs[1] * kernel[0] * kernel[1]
    x = planes * size[0] * size[1]
    y = planes * outputs[0] * outputs[1]
    weight = channels * kernel[0] * kernel[1]
    with_bias = weight + (channels if bias else 0)
    elements, products = {
        "forward": (x + with_bias + y, 1),
        "dX": (y + weight + x, 1),
        "dW": (y + x + weight, 1),
        # x, weight, bias -> y; then y's gradient, x, weight -> their gradients.
        "forward+backward": ((x + with_bias + y) + (y + x + weight) + (x + with_bias), 3),
    }[direction]
    return Work(elements * element_size, 2 * products * met, 2 * products * every)


def adapter(
    direction: str,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    rank: int,
    kernel: tuple[int, int],
    *,
    prefix: int = 0,
    dilation: int = 1,
    separate_residual: bool = False,
    accumulate: bool = False,
    element_size: int = 4,
) -> Work:
    """The large kernel adapter on (batch, prefix + H·W, dim), biases everywhere.

    With NC the bytes of x: forward moves 2NC, or 3NC with ``separate_residual`` (a residual that
    is x itself is read with it). Backward reads dy and x and writes dx, 3NC, or 4NC with
    ``accumulate`` (dx is added to one that is there). What is kept from forward to backward is
    not counted: it could be computed again.

    Args:
        direction: "forward" or "forward+backward".
        prefix: prefix tokens, which meet the centre tap alone.
    """
    tokens = batch * (prefix + grid[0] * grid[1])
    padding = [dilation * (k - 1) // 2 for k in kernel]
    met, every = 1, 1
    for size, taps, pad in zip(grid, kernel, padding, strict=True):
        met *= met_taps(size, taps, 1, pad, dilation)
        every *= size * taps
    met = batch * rank * (met + prefix)
    every = batch * rank * (every + prefix)
    weights = 2 * rank * dim + rank * kernel[0] * kernel[1] + 2 * rank + dim
    x = tokens * dim
    project = 2 * tokens * dim * rank
    moved = (2 + separate_residual) * x + weights
    # Down and up once each.
    flops, unclipped = 2 * project + 2 * met, 2 * project + 2 * every
    if direction == "forward+backward":
        # Weights are read again and their gradients written.
        moved += (3 + accumulate) * x + 2 * weights
        # The gradients of both projections: inputs and weights.
        flops += 4 * project + 4 * met
        unclipped += 4 * project + 4 * every
    elif direction != "forward":
        raise ValueError(f"direction must be 'forward' or 'forward+backward'; got {direction!r}")
    return Work(moved * element_size, flops, unclipped)
