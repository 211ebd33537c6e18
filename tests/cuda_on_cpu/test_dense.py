"""The dense form of depthwise convolution on small maps, run by fibers, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
from form_checks import check_correlate, check_gradients
from stride_one_cases import CASES, Case, same

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16]
FLAT = ("contiguous", "cropped")
MORE = [
    same(70, 3, 7, 7, (7, 7)),  # four tiles of images, and some
    same(33, 9, 7, 7, (13, 13)),
    same(17, 2, 14, 14, (27, 27)),  # two tiles
    same(40, 1, 14, 14, (13, 13)),
    same(3, 2, 16, 16, (31, 31)),  # a few parts of either map
    same(9, 2, 2, 100, (3, 9)),
    same(18, 1, 28, 28, (31, 31)),  # several rounds of the warps
    same(2, 3, 5, 9, (4, 3), (2, 1), layout="cropped"),
    same(5, 2, 1, 13, (1, 9)),
    same(5, 2, 13, 1, (9, 1)),
    Case(3, 2, 6, 9, (3, 4), (0, 0, 0, 0)),
    Case(3, 2, 6, 9, (3, 4), (5, 3, 1, 7), (2, 1)),
    Case(2, 2, 9, 11, (3, 3), (-2, -3, -1, -4)),
    Case(64, 16, 10, 10, (7, 7), (0, 0, 0, 0)),  # outputs of a warp, far fewer than the input's
    Case(64, 9, 9, 9, (7, 7), (0, 0, 0, 0)),
]
SMALL = [
    c for c in [*CASES, *MORE]
    if c.layout in FLAT and max(c.height * c.width, c.output_shape[2] * c.output_shape[3]) <= 784
]  # fmt: skip
SMALLER = [
    c for c in SMALL
    if max(c.height * c.width, c.output_shape[2] * c.output_shape[3]) <= 256
    and c.kernel != (1, 1)
]  # fmt: skip


def run(case: Case, dtype: torch.dtype, backward: bool, form: str = "dense") -> None:
    check_correlate(form, case, dtype, backward)


def gradients(case: Case, dtype: torch.dtype, multiprocessors: int = 4, form: str = "dense"):
    return check_gradients(form, case, dtype, multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward(case, dtype):
    run(case, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_backward_input(case, dtype):
    run(case, dtype, True)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 4), (7, 8), (8, 7), (12, 16)])
def test_every_size(size):
    for kernel in ((1, 1), (3, 4), (2, 9)):
        for backward in (False, True):
            run(same(2, 2, *size, kernel), torch.float16, backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALLER, ids=str)
def test_backward_weight(case, dtype):
    gradients(case, dtype)


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 3), (6, 5), (7, 7), (5, 6), (3, 4)])
def test_vectors_end_with_the_map(size):
    """A plane alone, of no whole number of vectors: its memory ends with it."""
    case = same(1, 1, *size, (3, 3))
    for backward in (False, True):
        run(case, torch.float16, backward)
    gradients(case, torch.float16)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_groups_add_up(multiprocessors):
    """One group or many, the same bits for the same device."""
    case = same(150, 2, 7, 7, (7, 7))
    first, second = (gradients(case, torch.bfloat16, multiprocessors) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


CHOSEN = [
    same(64, 3, 7, 7, (7, 7)),
    same(64, 8, 7, 7, (7, 7), layout="channels_last"),
    same(64, 1, 14, 14, (27, 27)),
    same(64, 1, 14, 14, (3, 3)),
    same(2, 2, 20, 22, (7, 7)),
]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_what_the_operators_take(case):
    """One form or the other, as estimated; where one is refused, the other."""
    for backward in (False, True):
        run(case, torch.bfloat16, backward, form="tensor_core")
    gradients(case, torch.bfloat16, form="tensor_core")


def test_refusals_name_the_reason():
    with pytest.raises(RuntimeError, match="too large for the dense form"):
        run(same(1, 1, 29, 28, (3, 3)), torch.float16, False)
    with pytest.raises(RuntimeError, match="too large for the dense form"):
        gradients(same(1, 1, 16, 17, (3, 3)), torch.float16)
    with pytest.raises(RuntimeError, match="columns are neighbours in memory"):
        run(same(1, 8, 7, 7, (3, 3), layout="channels_last"), torch.float16, False)


def test_what_is_not_finite_stays_in_its_image():
    """Padding of an image in shared memory is not what the next one has there."""
    case = same(20, 2, 7, 7, (7, 7))
    x, weight = torch.randn(case.shape).half(), torch.randn(2, 1, 7, 7).half()
    x[3, 1] = torch.inf
    result = torch.empty_like(x)
    on_cpu.run_correlate(
        "dense", on_cpu.params(x, result, case.kernel, case.padding, (1, 1)), False, weight, None
    )
    finite = result.isfinite().all((2, 3))
    assert finite.sum() == 39
    assert not finite[3, 1]
