"""Weight gradients, for tensor cores and in float32, run by fibers, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
from stride_one_cases import CASES, LAYOUTS, Case, same, spread
from torch import Tensor

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def gradients(case: Case, dtype, grad_layout: str, multiprocessors: int = 4) -> list[Tensor]:
    """Gradients of weight and bias, checked; elements between those of the maps are NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    grad_output = torch.randn(case.output_shape, generator=generator).to(dtype)
    call = on_cpu.params(
        spread(x, case.layout),
        spread(grad_output, grad_layout),
        case.kernel,
        case.padding,
        case.dilation,
    )
    shapes = ((case.channels, 1, *case.kernel), (case.channels,))
    results = [torch.full(shape, torch.nan).to(dtype) for shape in shapes]
    on_cpu.weight_gradient(call, *results, multiprocessors)
    terms = grad_output[:, 0].numel()
    truths = case.backward_weight(grad_output.double(), x.double())
    for result, truth in zip(results, truths, strict=True):
        case.check(result, truth, terms)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_weight(case, dtype):
    gradients(case, dtype, "contiguous" if case.layout == "cropped" else case.layout)


@pytest.mark.parametrize("width", [1, 5, 12, 13, 30])
def test_vectors_end_with_the_map(width):
    """A row alone: its memory ends with it."""
    gradients(same(1, 1, 1, width, (1, 3)), torch.float16, "contiguous")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 16])
def test_layouts(layout, grad_layout, channels, dtype):
    case = Case(3, channels, 10, 13, (5, 4), (2, 1, 2, 2), layout=layout)
    gradients(case, dtype, grad_layout)


@pytest.mark.parametrize("width", [*range(1, 18), 31, 32, 33, 63, 64, 65, 130])
def test_every_width(width):
    for kernel in ((1, 1), (3, 4), (2, 9)):
        gradients(same(2, 1, 5, width, kernel), torch.float16, "contiguous")


@pytest.mark.parametrize("height", [*range(1, 10), 16, 17, 35])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_every_height(height, batch):
    for dilation in (1, 3):
        gradients(same(batch, 1, height, 6, (5, 3), (dilation, 1)), torch.float16, "contiguous")


def test_cropped_by_negative_padding():
    gradients(Case(2, 2, 12, 40, (3, 3), (-2, -3, -1, -4)), torch.float16, "contiguous")


def test_kernels_of_several_tiles_of_taps():
    gradients(same(1, 1, 70, 68, (35, 66)), torch.float16, "contiguous")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_groups_add_up(multiprocessors, dtype):
    """One group or many: the same within rounding, and the same bits for the same device."""
    case = same(9, 3, 20, 70, (7, 7), layout="channels_last")
    first, second = (gradients(case, dtype, "channels_last", multiprocessors) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
