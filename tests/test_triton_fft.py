"""torch.fft between Triton's kernels, against float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, depthwise_cases
from closeness import assert_close_to_truth
from hypothesis import given, settings

from lka_kernels import available_backends, explain, ops, tiles, use_backend
from lka_kernels.backends.triton import device_type
from lka_kernels.checks import padding_tlbr
from lka_kernels.functional import depthwise_conv2d

DEVICE = device_type()
STATUS = available_backends()["triton"]
pytestmark = [pytest.mark.skipif(STATUS != "ready", reason=STATUS)]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
# Triton's interpreter has no bfloat16.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
CASES = {
    "same": Case(2, 3, 5, 6, (3, 3), padding="same"),
    "channels_last": Case(2, 5, 7, 6, (5, 3), padding="same", layout="channels_last"),
    "more channels than a block": Case(2, 37, 5, 4, (3, 3), padding="same", layout="channels_last"),
    "more positions than a block": Case(1, 2, 30, 41, (9, 7), padding="same"),
    "even kernel": Case(2, 2, 6, 5, (4, 2), padding="same", layout="sliced"),
    "rectangular": Case(3, 2, 4, 9, (1, 7), padding="same", weight_layout="sliced"),
    "tall": Case(1, 2, 12, 3, (17, 3), padding="same"),
    "no padding": Case(2, 1, 8, 9, (3, 4)),
    "more padding than kernel": Case(1, 2, 3, 3, (1, 1), padding=(5, 4)),
    "kernel larger than the map": Case(1, 2, 4, 5, (11, 13), padding="same"),
    "dilated": Case(2, 2, 8, 7, (3, 4), padding=(2, 3), dilation=(2, 3), layout="transposed"),
    "strided": Case(2, 2, 9, 8, (3, 5), stride=(2, 3), padding=(1, 2)),
    "strided and dilated": Case(
        2, 3, 11, 9, (3, 2), (3, 2), (4, 1), (3, 2), layout="channels_last"
    ),
    "no tap on the map": Case(2, 2, 1, 1, (2, 2), padding=(2, 2), dilation=(4, 4)),
    "one element": Case(1, 1, 1, 1, (1, 1)),
    "no bias": Case(2, 2, 5, 5, (3, 3), padding="same", bias=False, layout="expanded"),
    "many images": Case(11, 2, 4, 4, (3, 3), padding="same", grad_layout="channels_last"),
    "empty": Case(0, 2, 5, 5, (3, 3), padding="same"),
}


def reference(tensors, grad, case):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    x, weight, bias = leaves
    # F.conv2d warns of even kernels with padding="same", and is slow with it.
    top, left, bottom, right = padding_tlbr(case.padding, case.stride, case.dilation, case.kernel)
    y = F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        weight, bias, case.stride, 0, case.dilation, groups=case.channels,
    )  # fmt: skip
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return y.detach(), *grads


def check(case, dtype, method="fft"):
    tensors = case.tensors(dtype)
    grad = case.grad_output(dtype)
    truths = reference([None if t is None else t.double() for t in tensors], grad.double(), case)
    theirs = reference(tensors, grad, case)
    leaves = [None if t is None else t.to(DEVICE).requires_grad_() for t in tensors]
    with use_backend("triton"):
        y = depthwise_conv2d(*leaves, *case.geometry, method=method)
    given_leaves = [t for t in leaves if t is not None]
    ours = (y.detach(), *torch.autograd.grad(y, given_leaves, grad.to(DEVICE)))
    for (name, magnitude), result, truth, other in zip(
        case.magnitudes.items(), ours, truths, theirs, strict=False
    ):
        assert_close_to_truth(name, result.cpu(), truth, other, magnitude=magnitude)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, dtype):
    y = check(CASES[name], dtype)
    if CASES[name].layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40)
@given(depthwise_cases(max_channels=9, max_map=20, max_kernel=15, budget=200_000))
def test_any_call(case):
    check(case, torch.float32)


@settings(max_examples=20)
@given(depthwise_cases(max_channels=9, max_map=20, max_kernel=15, budget=200_000))
def test_any_call_in_float16(case):
    check(case, torch.float16)


def operator_arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x = normal(5, 3, 6, 7)
    geometry = ([2, 1], [1, 2, 3, 1], [1, 2])
    return x, normal(3, 1, 3, 4), normal(3), geometry


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    operators = ops.DEPTHWISE["triton_fft"]
    x, weight, bias, geometry = operator_arguments()
    forward = (x, weight, bias, *geometry, channels_last)
    y = operators.forward(*forward)
    torch.library.opcheck(operators.forward, forward)
    torch.library.opcheck(operators.backward_input, (y, weight, [6, 7], *geometry, channels_last))
    torch.library.opcheck(operators.backward_weight, (y, x, [3, 4], *geometry))


def test_same_bits_twice_and_for_every_tile(monkeypatch):
    """The sum over the batch is in the order of the images, however they are dealt out."""
    operators = ops.DEPTHWISE["triton_fft"]
    x, weight, bias, geometry = operator_arguments()
    y = operators.forward(x, weight, bias, *geometry, False)
    arguments = (y, x, [3, 4], *geometry)
    first = operators.backward_weight(*arguments)
    assert all(map(torch.equal, first, operators.backward_weight(*arguments)))
    monkeypatch.setattr(tiles, "product_sum_block", lambda *a: 32)
    monkeypatch.setattr(tiles, "plane_tiles", lambda *a: (2, 16))
    monkeypatch.setattr(tiles, "product_tiles", lambda *a: (32, 2))
    assert all(map(torch.equal, first, operators.backward_weight(*arguments)))
    assert torch.equal(y, operators.forward(x, weight, bias, *geometry, False))


def test_spectra_beyond_int32(monkeypatch):
    """The path for spectra of 2^31 elements, on few."""
    from lka_kernels.backends.triton import fft

    monkeypatch.setattr(fft, "_wide", lambda *arguments: True)
    for name in ("same", "many images"):
        check(CASES[name], torch.float32)


def test_twice_differentiable():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 5, 6), (2, 1, 3, 3), (2,))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]

    def derivatives(function, dtype, device="cpu"):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in tensors]
        y = function(*leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return y, *first, *second

    def theirs(x, w, b):
        return F.conv2d(x, w, b, padding=1, groups=2)

    def ours(x, w, b):
        return depthwise_conv2d(x, w, b, padding=1, method="fft")

    with use_backend("triton"):
        found = derivatives(ours, torch.float32, DEVICE)
    truths = derivatives(theirs, torch.float64)
    for i, (result, truth, other) in enumerate(
        zip(found, truths, derivatives(theirs, torch.float32), strict=True)
    ):
        assert_close_to_truth(
            f"derivative {i}", result.detach().cpu(), truth.detach(), other.detach()
        )


def test_compile_without_graph_break():
    x, weight = (
        torch.randn(shape, device=DEVICE, requires_grad=True)
        for shape in ((2, 3, 7, 6), (3, 1, 5, 4))
    )

    def function(x, weight):
        return depthwise_conv2d(x, weight, padding="same", method="fft")

    results = []
    with use_backend("triton"):
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            y = f(x, weight)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_who_is_served_by_it():
    x, weight = torch.zeros(2, 4, 9, 9, device=DEVICE), torch.zeros(4, 1, 3, 3, device=DEVICE)
    with use_backend("triton"):
        for stride in (1, 2):
            text = explain(x, weight, stride=stride, method="fft")
            assert text.startswith("backend=triton method=fft: asked for by method='fft'")
        text = explain(x.double(), weight.double(), method="fft")
        assert text.startswith("backend=fft method=fft")
        assert "torch.fft alone, as backend 'triton': it serves float32" in text
        with pytest.raises(ValueError, match="method='fft' cannot serve this call"):
            depthwise_conv2d(x[0], weight, method="fft")
    assert not explain(x, weight, method="fft").startswith("backend=triton")


def test_not_chosen_on_a_gpu_unasked():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 4, 9, 9, device="cuda")
        text = explain(x, torch.empty(4, 1, 3, 3, device="cuda"), method="fft")
    assert not text.startswith("backend=triton")
