"""Sizes of the FFT convolution: pure functions of shapes, no tensors.

Write out[m] = sum_k w[k] x[m·s + k·d - p] for one dimension with R inputs, K taps, stride s,
dilation d and padding p before and q after. A circular correlation of length F equals it as long
as no index outside [0, R) wraps onto one inside: F >= R + p and F >= R + q. For "same" padding
that is R + K/2 rather than the R + K - 1 of a full linear convolution, because the wrap falls on
cropped positions.
"""

from __future__ import annotations

from typing import NamedTuple


class DimensionPlan(NamedTuple):
    """How one dimension is transformed."""

    fft_size: int  # F, a product of 2, 3, 5 and 7
    first_tap: int  # taps [first_tap, last_tap) can touch the map; the others are dropped
    last_tap: int
    first_shift: int  # shift of the first kept tap, first_tap * dilation - padding


def good_size(minimum: int) -> int:
    """The smallest 2^a·3^b·5^c·7^d that is at least ``minimum`` (and at least 1)."""
    size = max(minimum, 1)
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def touching_taps(
    input_size: int, output_size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[int, int]:
    """Range [first, last) outside of which no tap meets an input element for any output.

    Tap k of output m reads input m·stride + k·dilation - padding. The shifts that can reach
    [0, R) run from -(output_size - 1)·stride to R - 1; (0, 0) if no tap can. With a stride, a tap
    within the range may still step over the map.
    """
    lowest_shift = -(output_size - 1) * stride
    first = max(0, -((-(lowest_shift + padding)) // dilation))
    last = min(kernel, (input_size - 1 + padding) // dilation + 1)
    return (first, last) if first < last else (0, 0)


def plan_dimension(
    input_size: int,
    output_size: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
) -> DimensionPlan:
    """The transform of one dimension; all sizes are positive."""
    first, last = touching_taps(input_size, output_size, kernel, stride, padding, dilation)
    first_shift = first * dilation - padding
    last_shift = (last - 1) * dilation - padding if last > first else first_shift
    output_span = (output_size - 1) * stride + 1
    # Reads run from first_shift to output_span - 1 + last_shift.
    minimum = max(
        input_size + max(0, -first_shift),
        output_span + max(0, last_shift),
        input_size,
        last_shift - first_shift + 1,
    )
    return DimensionPlan(good_size(minimum), first, last, first_shift)
