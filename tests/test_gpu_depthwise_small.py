"""The CUDA backend's depthwise convolution on small and awkward calls, every method against
float64. Small enough for compute-sanitizer; `make gpu` runs them, `make gpu-sanitize` runs them
under it.
"""

import math

import pytest
import torch
from stride_one_cases import CASES, Case, same, spread

from lka_kernels import available_backends
from lka_kernels.ops import DEPTHWISE, accumulation_dtype

STATUS = available_backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(STATUS != "ready", reason=STATUS),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FAMILIES = ["cuda", "cuda_direct", "cuda_gemm", "cuda_fft"]
# Beside what the fibers run: planes for whole blocks of the dense form, several groups of sums.
MORE = [
    same(40, 5, 14, 14, (27, 27)),
    same(70, 3, 7, 7, (13, 13)),
    same(33, 2, 28, 28, (29, 29)),
    same(3, 16, 33, 47, (7, 7), layout="channels_last"),
]


def check(what: str, result: torch.Tensor, truth: torch.Tensor, terms: int, family: str) -> None:
    """Rounded once to the result's dtype; sums whose errors follow their terms, or with transforms
    the largest of a map.
    """
    eps = torch.finfo(result.dtype).eps
    eps_of_sums = torch.finfo(accumulation_dtype(result.dtype)).eps
    size = max(math.sqrt(terms), float(truth.abs().max()) if truth.numel() else 0.0)
    sums = 5 * size if family == "cuda_fft" else terms * math.sqrt(terms)
    if family == "cuda_fft" and what == "weight":
        sums *= 2
    allowed = truth.abs() * eps / 2 + sums * eps_of_sums
    if result.dtype == torch.float16:
        allowed = allowed + 2.0**-25
    error = (result.cpu().double() - truth).abs()
    assert error.isfinite().all(), f"{what}: elements that are not finite"
    worst = float((error - allowed).max()) if error.numel() else 0.0
    assert worst <= 0, f"{what}: {float(error.max()):.3g} off, {worst:.3g} more than allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_every_direction(case: Case, family, dtype):
    if family == "cuda_gemm" and dtype == torch.float32:
        pytest.skip("tensor cores take float16 and bfloat16")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.channels, 1, *case.kernel, generator=generator).to(dtype)
    bias = torch.randn(case.channels, generator=generator).to(dtype)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    grad_output = torch.randn(case.output_shape, generator=generator).to(dtype)
    on_device = [spread(t, case.layout).cuda() for t in (x, grad_output)]
    if case.layout not in ("contiguous", "channels_last"):  # .cuda() made them dense
        on_device = [spread_on_device(t, case.layout) for t in (x, grad_output)]
    geometry = ((1, 1), case.padding, case.dilation)
    channels_last = case.layout == "channels_last"
    operators = DEPTHWISE[family]
    w, b = weight.cuda(), bias.cuda()
    y = operators.forward(on_device[0], w, b, *geometry, channels_last)
    grad_input = operators.backward_input(
        on_device[1], w, list(case.shape[2:]), *geometry, channels_last
    )
    grads = operators.backward_weight(on_device[1], on_device[0], case.kernel, *geometry)
    wide = [t.double() for t in (x, grad_output, weight, bias)]
    taps = math.prod(case.kernel) + 1
    terms = grad_output[:, 0].numel()
    check("output", y, case.forward(wide[0], wide[2], wide[3]), taps, family)
    check("grad_input", grad_input, case.backward_input(wide[1], wide[2]), taps, family)
    truths = case.backward_weight(wide[1], wide[0])
    check("weight", grads[0], truths[0], terms, family)
    check("bias", grads[1], truths[1], terms, family)


def spread_on_device(t: torch.Tensor, layout: str) -> torch.Tensor:
    """``t`` in a layout with gaps; what lies between its elements is NaN."""
    laid_out = spread(t, layout)
    room = laid_out._base
    on_device = room.cuda()
    return on_device.as_strided(laid_out.shape, laid_out.stride(), laid_out.storage_offset())


STRIDED = [
    (Case(2, 6, 13, 15, (7, 7), (3, 3, 3, 3)), (2, 2)),
    (Case(3, 8, 12, 9, (3, 5), (0, 2, 1, 3), layout="channels_last"), (1, 3)),
    (Case(2, 3, 16, 16, (31, 31), (15, 15, 15, 15)), (2, 1)),
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "stride"), STRIDED, ids=str)
def test_strides_and_float64(case, stride, dtype):
    """What the direct kernel alone serves."""
    top, left, bottom, right = case.padding
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    weight = torch.randn(case.channels, 1, *case.kernel, generator=generator).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    padded = torch.nn.functional.pad(leaves[0], (left, right, top, bottom))
    truth = torch.nn.functional.conv2d(
        padded, leaves[1], None, stride, 0, case.dilation, case.channels
    )
    grad_output = torch.randn(truth.shape, generator=generator).to(dtype)
    truths = torch.autograd.grad(truth, leaves, grad_output.double())
    channels_last = case.layout == "channels_last"
    geometry = (stride, case.padding, case.dilation)
    operators = DEPTHWISE["cuda"]
    given, grad = (spread(t, case.layout).cuda() for t in (x, grad_output))
    y = operators.forward(given, weight.cuda(), None, *geometry, channels_last)
    grad_input = operators.backward_input(
        grad, weight.cuda(), list(case.shape[2:]), *geometry, channels_last
    )
    grad_weight = operators.backward_weight(grad, given, case.kernel, *geometry)[0]
    taps, terms = math.prod(case.kernel), grad_output[:, 0].numel()
    check("output", y, truth.detach(), taps, "cuda")
    check("grad_input", grad_input, truths[0], taps, "cuda")
    check("weight", grad_weight, truths[1], terms, "cuda")
