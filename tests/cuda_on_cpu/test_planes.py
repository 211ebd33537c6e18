"""Depthwise convolution with planes in shared memory, run by fibers, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
from form_checks import check_correlate, check_gradients
from stride_one_cases import CASES, Case, same

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16]
MORE = [
    same(2, 5, 56, 56, (7, 7)),  # a map of four strips, channels left over
    same(1, 2, 56, 56, (31, 31)),
    same(1, 1, 70, 80, (3, 3)),  # ten tiles of columns
    same(1, 1, 130, 20, (5, 5)),  # bands of rows
    same(1, 1, 260, 4, (3, 3)),  # bands because of their number of rows alone
    same(1, 2, 90, 180, (7, 7)),
    same(2, 8, 40, 50, (7, 7), layout="channels_last"),
    same(2, 8, 90, 60, (5, 7), layout="channels_last"),
    same(3, 16, 7, 7, (7, 7), layout="channels_last"),
    same(1, 8, 5, 9, (4, 3), (2, 1), layout="channels_last"),
    same(1, 3, 12, 30, (3, 5), (2, 3)),
    same(1, 2, 9, 40, (1, 17)),
    Case(2, 3, 12, 16, (5, 5), (4, 4, 0, 0)),
    Case(2, 8, 12, 16, (5, 5), (1, 0, 0, 4), layout="channels_last"),
    Case(2, 2, 30, 9, (5, 3), (-3, 0, -2, 1)),
]


def served(case: Case) -> bool:
    """Rows, or pixels of eight channels."""
    if case.padding[1] < 0:
        return False
    if case.layout == "channels_last":
        return case.channels % 8 == 0
    return case.layout in ("contiguous", "cropped")


SERVED = [case for case in [*CASES, *MORE] if served(case)]
# Enough planes that several images share a warp's slots, with a last step of fewer.
MANY = [
    same(65, 136, 3, 3, (3, 3)),
    same(66, 65, 4, 6, (5, 3)),
    same(70, 128, 3, 3, (3, 3), layout="channels_last"),
    same(69, 64, 5, 4, (3, 3), layout="channels_last"),
]
DIRECTIONS = ("forward", "backward_input", "backward_weight")


def without_memory(case: Case, layout: str = "contiguous"):
    """A call that can be planned."""
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    maps = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=format)
        for shape in (case.shape, case.output_shape)
    ]
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    call.input.data = call.output.data = 1024
    return call


def run(case: Case, dtype: torch.dtype, backward: bool) -> None:
    check_correlate("plane", case, dtype, backward)


def gradients(case: Case, dtype: torch.dtype, multiprocessors: int = 4):
    return check_gradients("plane", case, dtype, multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_forward(case, dtype):
    run(case, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_backward_input(case, dtype):
    left = case.dilation[1] * (case.kernel[1] - 1) - case.padding[1]
    if left < 0:
        pytest.skip("the correlation is cropped")
    run(case, dtype, True)


@pytest.mark.parametrize("case", MANY, ids=str)
def test_images_side_by_side(case):
    for direction in DIRECTIONS:
        assert on_cpu.plane_images(without_memory(case, case.layout), direction) > 1
    for backward in (False, True):
        run(case, torch.bfloat16, backward)


@pytest.mark.parametrize("kernel", [(56, 1), (97, 1), (125, 1), (3, 3)])
def test_slots_are_of_the_image_they_are_taken_for(kernel):
    """Also where many rows of results meet few of the source, which leave room for many images."""
    for height in range(kernel[0], 241, 3):
        unpadded = Case(64, 1024, height, 8, kernel, (0, 0, 0, 0))
        assert on_cpu.plane_images(without_memory(unpadded), "backward_input") >= 0
        padded = Case(64, 1024, 7, 8, (7, 1), (height, 0, height, 0))
        assert on_cpu.plane_images(without_memory(padded), "forward") >= 0


@pytest.mark.parametrize("side", [20, 24])
@pytest.mark.parametrize("kernel", [27, 31])
def test_no_batch_is_refused_that_a_smaller_one_is_not(side, kernel):
    for batch in (1, 256, 1024, 4096):
        case = same(batch, 8, side, side, (kernel, kernel))
        call = without_memory(case, "channels_last")
        assert on_cpu.plane_images(call, "forward") > 0


@pytest.mark.parametrize("width", [1, 2, 3, 8, 15, 17, 33, 66])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_width(width, layout):
    for kernel in ((1, 1), (3, 4), (2, 9)):
        for backward in (False, True):
            run(same(2, 8, 3, width, kernel, layout=layout), torch.float16, backward)


def refusal(case: Case) -> str | None:
    """Why there is no weight gradient, before taps that touch nothing are cut off."""
    if case.kernel[0] > 15 or case.kernel[1] > 8:
        return "more than 15 rows or 8 columns"
    if case.padding[1] % case.dilation[1] != 0 or case.padding[1] // case.dilation[1] > 7:
        return "no kernel column meets"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in [*SERVED, *MANY] if refusal(c) is None], ids=str)
def test_backward_weight(case, dtype):
    gradients(case, dtype)


@pytest.mark.parametrize("case", [same(1, 2, 40, 40, (17, 3)), same(1, 2, 40, 40, (3, 9))], ids=str)
def test_weight_gradients_of_large_kernels_are_refused(case):
    with pytest.raises(RuntimeError, match=refusal(case)):
        gradients(case, torch.float16)


def test_weight_gradients_need_a_column_for_the_bias():
    case = Case(1, 2, 6, 6, (3, 3), (9, 8, 0, 7))
    with pytest.raises(RuntimeError, match=refusal(case)):
        gradients(case, torch.float16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_groups_add_up(multiprocessors, layout):
    """One group or many, the same bits for the same device."""
    case = same(70, 64, 7, 7, (7, 7), layout=layout)
    first, second = (gradients(case, torch.bfloat16, multiprocessors) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_refusals_name_the_reason():
    with pytest.raises(RuntimeError, match="neither rows of columns nor pixels"):
        run(same(1, 3, 7, 7, (3, 3), layout="channels_last"), torch.float16, False)
    with pytest.raises(RuntimeError, match="padding in front of the columns is negative"):
        run(Case(1, 1, 9, 11, (3, 3), (0, -1, 0, 0)), torch.float16, False)
    with pytest.raises(RuntimeError, match="do not fit shared memory"):
        run(same(1, 1, 16, 2000, (3, 3)), torch.float16, False)


def test_what_is_not_finite_stays_in_its_image():
    """Rows of an image in shared memory are not those of the next one."""
    case = same(64, 70, 7, 7, (7, 7))
    assert on_cpu.plane_images(without_memory(case), "forward") > 1
    x, weight = torch.randn(case.shape).half(), torch.randn(70, 1, 7, 7).half()
    x[3, 1] = torch.inf
    result = torch.empty_like(x)
    on_cpu.run_correlate(
        "plane", on_cpu.params(x, result, case.kernel, case.padding, (1, 1)), False, weight, None
    )
    finite = result.isfinite().all((2, 3))
    assert finite.sum() == 64 * 70 - 1
    assert not finite[3, 1]
