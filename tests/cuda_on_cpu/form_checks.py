"""A form of depthwise convolution, run by fibers, against float64.

``form`` is that of ``on_cpu.run_correlate`` and ``on_cpu.run_weight_gradient``.
"""

from __future__ import annotations

import on_cpu
import torch
from stride_one_cases import Case, spread
from torch import Tensor


def check_correlate(form: str, case: Case, dtype: torch.dtype, backward: bool) -> None:
    """Forward, or the gradient of the input."""
    generator = torch.Generator().manual_seed(0)
    shape, out_shape = case.shape, case.output_shape
    weight = torch.randn(case.channels, 1, *case.kernel, generator=generator).to(dtype)
    source = torch.randn(out_shape if backward else shape, generator=generator).to(dtype)
    given = spread(source, case.layout)
    result = spread(torch.full(shape if backward else out_shape, torch.nan).to(dtype), case.layout)
    geometry = (case.kernel, case.padding, case.dilation)
    if backward:
        on_cpu.run_correlate(form, on_cpu.params(result, given, *geometry), True, weight, None)
        truth = case.backward_input(source.double(), weight.double())
    else:
        b = torch.randn(case.channels, generator=generator).to(dtype)
        on_cpu.run_correlate(form, on_cpu.params(given, result, *geometry), False, weight, b)
        truth = case.forward(source.double(), weight.double(), b.double())
    case.check(result, truth)
    if result._base is not None:  # nothing was written between the elements
        assert result._base.isnan().sum() == result._base.numel() - result.numel()


def check_gradients(
    form: str, case: Case, dtype: torch.dtype, multiprocessors: int = 4
) -> list[Tensor]:
    """The gradients of weight and bias, which are returned."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    grad_output = torch.randn(case.output_shape, generator=generator).to(dtype)
    maps = spread(x, case.layout), spread(grad_output, case.layout)
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    shapes = ((case.channels, 1, *case.kernel), (case.channels,))
    results = [torch.full(shape, torch.nan).to(dtype) for shape in shapes]
    on_cpu.run_weight_gradient(form, call, *results, multiprocessors)
    truths = case.backward_weight(grad_output.double(), x.double())
    for result, truth in zip(results, truths, strict=True):
        case.check(result, truth, grad_output[:, 0].numel())
    return results
