"""Depthwise convolution by Fourier transforms in shared memory, run by fibers, against float64."""

from __future__ import annotations

import math

import on_cpu
import pytest
import torch
from stride_one_cases import CASES, LAYOUTS, Case, same, spread
from torch import Tensor

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One of each size of a transform, and two whose rows and columns differ.
SIZES = [
    same(1, 1, 5, 5, (7, 7)),
    same(2, 3, 13, 12, (7, 7)),
    same(1, 2, 20, 19, (9, 9)),
    same(1, 2, 25, 25, (14, 13)),
    same(1, 1, 33, 37, (21, 21)),
    same(1, 1, 49, 50, (27, 28)),
    same(1, 1, 80, 75, (31, 41)),
    same(1, 1, 112, 109, (31, 39)),
    same(1, 2, 112, 3, (33, 3)),
    same(1, 2, 4, 113, (2, 28)),
]
IMPOSSIBLE = Case(2, 3, 6, 7, (2, 1), (0, 0, 30, 40))  # rows and columns of outputs without a tap


def check(result: Tensor, truth: Tensor, terms: int) -> None:
    """Rounded once, and sums whose errors follow the largest of a map."""
    eps = torch.finfo(result.dtype).eps
    scale = max(math.sqrt(terms), truth.abs().max().item())
    allowed = truth.abs() * eps / 2 + 5 * torch.finfo(torch.float32).eps * scale
    error = (result.double() - truth).abs()
    assert error.isfinite().all(), "elements that are not finite, or were never written"
    worst = (error - allowed).max()
    assert worst <= 0, f"{error.max():.3g} from the truth, {worst:.3g} more than allowed"


def run(case: Case, dtype: torch.dtype, backward: bool, result_layout: str, bias: bool = True):
    """Check one direction of a case; every element between those of the maps is NaN."""
    generator = torch.Generator().manual_seed(0)
    shape, out_shape = case.shape, case.output_shape
    weight = torch.randn(case.channels, 1, *case.kernel, generator=generator).to(dtype)
    source = torch.randn(out_shape if backward else shape, generator=generator).to(dtype)
    given = spread(source, case.layout)
    unwritten = torch.full(shape if backward else out_shape, torch.nan).to(dtype)
    result = spread(unwritten, result_layout)
    geometry = (case.kernel, case.padding, case.dilation)
    if backward:
        on_cpu.fft_correlate(on_cpu.params(result, given, *geometry), True, weight, None)
        truth = case.backward_input(source.double(), weight.double())
    else:
        b = torch.randn(case.channels, generator=generator).to(dtype) if bias else None
        on_cpu.fft_correlate(on_cpu.params(given, result, *geometry), False, weight, b)
        truth = case.forward(source.double(), weight.double(), None if b is None else b.double())
    check(result, truth, math.prod(case.kernel))
    outside = result._base
    if outside is not None:  # nothing was written between the elements
        assert outside.isnan().sum() == outside.numel() - result.numel()
    return result


def gradients(case: Case, dtype, grad_layout: str, multiprocessors: int = 4) -> list[Tensor]:
    """Gradients of weight and bias, checked; elements between those of the maps are NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    grad_output = torch.randn(case.output_shape, generator=generator).to(dtype)
    maps = (spread(x, case.layout), spread(grad_output, grad_layout))
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    shapes = ((case.channels, 1, *case.kernel), (case.channels,))
    results = [torch.full(shape, torch.nan).to(dtype) for shape in shapes]
    on_cpu.fft_weight_gradient(call, *results, multiprocessors)
    truths = case.backward_weight(grad_output.double(), x.double())
    for result, truth in zip(results, truths, strict=True):
        check(result, truth, grad_output[:, 0].numel())
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_input(case, backward, dtype):
    run(case, dtype, backward, "contiguous" if case.layout == "cropped" else case.layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_weight(case, dtype):
    gradients(case, dtype, "contiguous" if case.layout == "cropped" else case.layout)


@pytest.mark.parametrize("case", [*SIZES, IMPOSSIBLE], ids=str)
def test_every_size(case):
    for backward in (False, True):
        run(case, torch.float32, backward, "contiguous")
    gradients(case, torch.float32, "contiguous")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("result_layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 17])
def test_layouts(layout, result_layout, channels, dtype):
    case = Case(3, channels, 10, 13, (5, 4), (2, 1, 2, 2), layout=layout)
    for backward in (False, True):
        run(case, dtype, backward, result_layout, bias=False)
    gradients(case, dtype, result_layout)


@pytest.mark.parametrize("size", [*range(1, 18), 31, 33, 47, 49])
def test_every_height_and_width(size):
    """All numbers of rows of a pair, and of columns, that may be missing."""
    for case in (same(2, 1, size, 6, (4, 3)), same(1, 2, 7, size, (3, 6), (1, 2))):
        for backward in (False, True):
            run(case, torch.float32, backward, "contiguous")
        gradients(case, torch.float32, "contiguous")


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 17])
def test_blocks_of_several_planes(batch):
    """Images, or channels where there are fewer images than a block has planes."""
    for layout in ("contiguous", "channels_last"):
        case = same(batch, 18 - batch, 6, 5, (5, 3), layout=layout)
        for backward in (False, True):
            run(case, torch.bfloat16, backward, layout)
        gradients(case, torch.bfloat16, layout)


def test_cropped_by_negative_padding():
    case = Case(2, 2, 12, 40, (3, 3), (-2, -3, -1, -4))
    for backward in (False, True):
        run(case, torch.float16, backward, "contiguous")
    gradients(case, torch.float16, "contiguous")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_groups_add_up(multiprocessors, dtype):
    """One group or many: the same within rounding, and the same bits for the same device."""
    for layout in ("contiguous", "channels_last"):
        case = same(19, 3, 11, 10, (7, 7), layout=layout)
        first, second = (gradients(case, dtype, layout, multiprocessors) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_planes_do_not_depend_on_their_neighbours():
    """The same bits alone and among others, in both layouts."""
    case = same(5, 9, 7, 7, (5, 5))
    together = run(case, torch.float32, False, "contiguous", bias=False)
    assert torch.equal(
        run(case._replace(layout="channels_last"), torch.float32, False, "channels_last", False),
        together,
    )


def plan(case: Case, direction: str = "forward", dtype=torch.bfloat16) -> dict[str, int]:
    format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    maps = [
        torch.empty(shape, dtype=dtype, device="meta", memory_format=format)
        for shape in (case.shape, case.output_shape)
    ]
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    return on_cpu.plan(call, direction, 132, "fft_plan")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        same(64, 128, 56, 56, (31, 31)),
        same(64, 512, 14, 14, (27, 27)),
        same(64, 192, 56, 56, (7, 7)),
        same(8, 96, 112, 112, (31, 31)),
    ],
    ids=str,
)
def test_plans_of_networks(case, layout):
    """Forward within the 99 KiB that a block may have on 8.6, weight gradients within 227."""
    case = case._replace(layout=layout)
    for dtype in DTYPES:
        assert plan(case, dtype=dtype)["shared"] <= 99 * 1024
        assert plan(case, "backward_input", dtype) == plan(case, dtype=dtype)
        assert plan(case, "backward_weight", dtype)["shared"] <= 227 * 1024
    assert plan(case)["blocks"] >= 4 * 132


def test_the_wrap_may_fall_on_cropped_rows():
    """Padding of K/2 is enough: 49 + 15 rows fit a transform of 64."""

    def shared(size, kernel):
        return plan(same(1, 1, size, size, (kernel, kernel)))["shared"]

    assert shared(49, 31) == shared(63, 3) < shared(50, 31) == shared(95, 3)


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (same(1, 1, 112, 112, (35, 35)), torch.float16, "more than 128 rows or columns"),
        (same(1, 1, 8, 130, (3, 3)), torch.float32, "more than 128 rows or columns"),
        (same(1, 1, 4, 2**25, (1, 1)), torch.float16, r"more than 2\^24 elements"),
    ],
)
def test_refusals_name_the_reason(case, dtype, reason):
    maps = [torch.empty(1, dtype=dtype).expand(case.shape) for _ in range(2)]
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    weight = torch.zeros(1, 1, *case.kernel, dtype=dtype)
    with pytest.raises(RuntimeError, match=reason):
        on_cpu.fft_correlate(call, False, weight, None)
    with pytest.raises(RuntimeError, match=reason):
        on_cpu.fft_weight_gradient(call, weight, torch.zeros(1, dtype=dtype))
