"""Depthwise correlation, for tensor cores and in float32, run by fibers, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
import torch.nn.functional as F
from stride_one_cases import CASES, LAYOUTS, Case, spread

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


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
        call = on_cpu.params(result, given, *geometry)
        on_cpu.correlate(call, True, weight, None)
        truth = case.backward_input(source.double(), weight.double())
    else:
        b = torch.randn(case.channels, generator=generator).to(dtype) if bias else None
        call = on_cpu.params(given, result, *geometry)
        on_cpu.correlate(call, False, weight, b)
        truth = case.forward(source.double(), weight.double(), None if b is None else b.double())
    case.check(result, truth)
    outside = result._base
    if outside is not None:  # nothing was written between the elements
        assert outside.isnan().sum() == outside.numel() - result.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    run(case, dtype, False, "contiguous" if case.layout == "cropped" else case.layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_input(case, dtype):
    run(case, dtype, True, "contiguous" if case.layout == "cropped" else case.layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("result_layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 16])
def test_layouts(layout, result_layout, channels, backward, dtype):
    case = Case(3, channels, 10, 13, (5, 4), (2, 1, 2, 2), layout=layout)
    run(case, dtype, backward, result_layout, bias=False)


@pytest.mark.parametrize("width", [*range(1, 18), 31, 32, 33, 64])
def test_every_width(width):
    """Masks at every edge, and every vector width of rows."""
    for kernel in ((1, 1), (3, 4), (2, 9)):
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[0] // 2, kernel[1] // 2)
        run(Case(2, 1, 5, width, kernel, padding), torch.float16, False, "contiguous")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [1, 5, 12, 13, 30])
def test_vectors_end_with_the_map(width, backward):
    """A row alone, and rows so far apart that vectors divide: their memory ends with the last."""
    alone = Case(1, 1, 1, width, (1, 3), (0, 1, 0, 1))
    run(alone, torch.float16, backward, "contiguous")
    case = Case(2, 3, 4, width, (3, 3), (1, 1, 1, 1))
    given = torch.full((2, 3, 4, 32), torch.nan).half()[..., :width]
    source, weight = given.copy_(torch.randn(case.shape)), torch.randn(3, 1, 3, 3).half()
    result = torch.full(case.shape, torch.nan).half()
    maps = (result, source) if backward else (source, result)
    on_cpu.correlate(on_cpu.params(*maps, (3, 3), (1, 1), (1, 1)), backward, weight, None)
    direction = case.backward_input if backward else case.forward
    case.check(result, direction(source.double(), weight.double()))


@pytest.mark.parametrize("height", [*range(1, 10), 17])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_every_height(height, batch):
    for dilation in (1, 3):
        pad = dilation * 2
        case = Case(batch, 1, height, 6, (5, 3), (pad, 1, pad, 1), (dilation, 1))
        run(case, torch.float16, False, "contiguous")


def test_refusals_name_the_reason():
    case = Case(1, 1, 300, 300, (255, 255), (127, 127, 127, 127))
    with pytest.raises(RuntimeError, match="taps of one channel do not fit shared memory"):
        run(case, torch.float16, False, "contiguous")


def test_same_bits_in_both_layouts():
    case = Case(2, 16, 9, 9, (7, 7), (3, 3, 3, 3))
    x, w = torch.randn(case.shape).half(), torch.randn(16, 1, 7, 7).half()
    results = []
    for format in (torch.contiguous_format, torch.channels_last):
        y = torch.empty(case.shape, dtype=torch.float16).to(memory_format=format)
        x = x.to(memory_format=format)
        on_cpu.correlate(on_cpu.params(x, y, (7, 7), (3, 3), (1, 1)), False, w, None)
        results.append(y)
    assert torch.equal(*results)


def test_products_are_those_of_the_definition():
    """One tap of one lets every element through to one place."""
    x = torch.arange(1.0, 13 * 37 + 1).reshape(1, 1, 13, 37).to(torch.float16)
    for ky in range(4):
        for kx in range(5):
            weight = torch.zeros(1, 1, 4, 5)
            weight[0, 0, ky, kx] = 1
            y = torch.full((1, 1, 10, 33), torch.nan).half()
            call = on_cpu.params(x, y, (4, 5), (0, 0), (1, 1))
            on_cpu.correlate(call, False, weight.half(), None)
            assert torch.equal(y, x[:, :, ky : ky + 10, kx : kx + 33])
            assert torch.equal(y.float(), F.conv2d(x.float(), weight))


def test_cropped_by_negative_padding():
    case = Case(2, 2, 12, 40, (3, 3), (-2, -3, -1, -4))
    for backward in (False, True):
        run(case, torch.float16, backward, "contiguous")
