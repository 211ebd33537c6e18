"""Bytes and FLOPs of the benchmarks against counting by hand and by loops."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import roofline


def count_taps(size, kernel, stride, padding, dilation) -> int:
    outputs = range(0, size + 2 * padding - dilation * (kernel - 1), stride)
    return sum(
        0 <= first + tap * dilation - padding < size for first in outputs for tap in range(kernel)
    )


@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 3),
    padding=st.integers(0, 9),
    dilation=st.integers(1, 3),
)
def test_met_taps_are_those_that_loops_count(size, kernel, stride, padding, dilation):
    assume(size + 2 * padding > dilation * (kernel - 1))
    geometry = (size, kernel, stride, padding, dilation)
    assert roofline.met_taps(*geometry) == count_taps(*geometry)
    outputs = len(range(0, size + 2 * padding - dilation * (kernel - 1), stride))
    assert roofline.output_size(*geometry) == outputs


def test_depthwise_by_hand():
    # (2, 3, 4, 4), 3x3, "same": 12 outputs and taps meet nothing in a row of 4 but the ends: 10.
    same = {"padding": (1, 1)}
    shape = (2, 3, (4, 4), (3, 3))
    forward = roofline.depthwise("forward", *shape, **same)
    assert forward == (4 * (96 + 27 + 3 + 96), 2 * 6 * 100, 2 * 6 * 16 * 9)
    assert roofline.depthwise("dX", *shape, **same).bytes == 4 * (96 + 27 + 96)
    assert roofline.depthwise("dW", *shape, **same).bytes == 4 * (96 + 96 + 27)
    both = roofline.depthwise("forward+backward", *shape, **same)
    assert both.flops == 3 * forward.flops
    assert both.unclipped_flops == 3 * forward.unclipped_flops
    # x, weight, bias -> y; dy, x, weight -> dx, dweight, dbias.
    assert both.bytes == 4 * (96 + 30 + 96 + 96 + 96 + 27 + 96 + 30)
    half = roofline.depthwise("forward", *shape, **same, bias=False, element_size=2)
    assert half.bytes == 2 * (96 + 27 + 96)


def test_depthwise_with_stride_and_dilation():
    work = roofline.depthwise(
        "forward", 1, 1, (9, 7), (3, 5), stride=(2, 1), padding=(2, 0), dilation=(2, 1), bias=False
    )
    assert work.flops == 2 * count_taps(9, 3, 2, 2, 2) * count_taps(7, 5, 1, 0, 1)
    assert work.unclipped_flops == 2 * 5 * 3 * 15
    assert work.bytes == 4 * (63 + 15 + 15)


def test_adapter_by_hand():
    # 2 images of 1 + 2x2 tokens, C = 6, r = 3, K = 3: each of 4 outputs meets 4 taps.
    shape = (2, (2, 2), 6, 3, (3, 3))
    weights = 18 + 3 + 27 + 3 + 18 + 6
    forward = roofline.adapter("forward", *shape, prefix=1)
    projections = 2 * (2 * 10 * 6 * 3)
    assert forward.flops == projections + 2 * (2 * 3 * (16 + 1))
    assert forward.unclipped_flops == projections + 2 * (2 * 3 * (4 * 9 + 1))
    assert forward.bytes == 4 * (2 * 60 + weights)
    both = roofline.adapter("forward+backward", *shape, prefix=1)
    assert both.flops == 3 * forward.flops
    assert both.bytes == 4 * (5 * 60 + 3 * weights)
    more = roofline.adapter(
        "forward+backward", *shape, prefix=1, separate_residual=True, accumulate=True
    )
    assert more.bytes - both.bytes == 4 * 2 * 60


def test_adapter_has_no_other_direction():
    with pytest.raises(ValueError, match="got 'dX'"):
        roofline.adapter("dX", 1, (2, 2), 4, 2, (3, 3))


def test_floor_is_the_larger_time():
    work = roofline.Work(100, 30, 50)
    assert roofline.floor_seconds(work, 10, 10) == 10
    assert roofline.floor_seconds(work, 100, 10) == 3
