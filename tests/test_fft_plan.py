"""Sizes of the FFT convolution against brute force."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lka_kernels.fft_plan import good_size, plan_dimension, touching_taps


def _is_good(n):
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


def test_good_size_is_the_smallest():
    good = [n for n in range(1, 2200) if _is_good(n)]
    for minimum in range(-1, 2000):
        assert good_size(minimum) == next(n for n in good if n >= minimum)


@pytest.mark.parametrize(
    ("minimum", "size"), [(11, 12), (13, 14), (71, 72), (127, 128), (211, 216)]
)
def test_good_size_known(minimum, size):
    assert good_size(minimum) == size


@st.composite
def dimensions(draw):
    """(input, output, kernel, stride, padding, dilation) of one dimension of a convolution."""
    kernel, stride, dilation = (draw(st.integers(1, n)) for n in (20, 5, 4))
    extent = dilation * (kernel - 1) + 1
    size, padding = draw(st.integers(1, 30)), draw(st.integers(0, 40))
    after = draw(st.sampled_from((padding, padding + 1)))
    size = max(size, extent - padding - after)
    output = (size + padding + after - extent) // stride + 1
    return size, output, kernel, stride, padding, dilation


@settings(max_examples=400)
@given(dimensions())
def test_touching_taps_against_brute_force(dimension):
    size, output, kernel, stride, padding, dilation = dimension
    touching = [
        k
        for k in range(kernel)
        if any(0 <= m * stride + k * dilation - padding < size for m in range(output))
    ]
    first, last = touching_taps(*dimension)
    if not touching:  # with a stride, every output may step over the map
        assert (first, last) == (0, 0) or stride > 1
    else:
        # One range: with a stride, taps inside it may still fall between elements.
        assert first <= touching[0]
        assert last > touching[-1]
        if stride == 1:
            assert (first, last) == (touching[0], touching[-1] + 1)


@settings(max_examples=400)
@given(dimensions())
def test_no_wanted_read_wraps_onto_the_map(dimension):
    size, output, _, stride, padding, dilation = dimension
    plan = plan_dimension(*dimension)
    assert _is_good(plan.fft_size)
    assert plan.fft_size >= size
    assert plan.first_shift == plan.first_tap * dilation - padding
    for m in range(output):
        for k in range(plan.first_tap, plan.last_tap):
            index = m * stride + k * dilation - padding
            # The circular transform reads index mod F: an element of the map exactly where the
            # convolution reads one.
            wrapped = index % plan.fft_size
            assert (wrapped < size) == (0 <= index < size)
    # Kept taps stand in different places of the rolled kernel.
    places = {
        (k * dilation - padding) % plan.fft_size for k in range(plan.first_tap, plan.last_tap)
    }
    assert len(places) == plan.last_tap - plan.first_tap


def test_same_padding_needs_half_a_kernel_beyond_the_map():
    # 56 + 15 rather than 56 + 30, which would be 90.
    assert plan_dimension(56, 56, 31, 1, 15, 1) == (72, 0, 31, -15)


def test_taps_beyond_the_map_are_dropped():
    plan = plan_dimension(7, 7, 31, 1, 15, 1)
    assert (plan.first_tap, plan.last_tap, plan.fft_size) == (9, 22, 14)
