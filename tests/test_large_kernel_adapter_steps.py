"""The CPU adapter step after step: where its convolution is left to the depthwise kernels."""

import dataclasses

import pytest
import torch
from adapter_cases import NAMES, AdapterCase, call, check_backend, with_gradients

from lka_kernels import _extension, ops
from lka_kernels.checks import FLOAT_DTYPES
from lka_kernels.functional import depthwise_conv2d

pytestmark = pytest.mark.usefixtures("compiled_cpu")

# The depthwise planner chooses Fourier transforms for all three passes of their convolution; of the
# last two, with sixteen lanes, for the gradient of the weights alone and for all else.
TRANSFORMED = [
    AdapterCase(4, 20, 8, (16, 15), (27, 27), prefix=1, residual=True),
    AdapterCase(
        4, 33, 9, (17, 15), (17, 18), prefix=2, dropout=0.3, position="both", residual=True,
        scale=0.5,
    ),
    AdapterCase(2, 7, 61, (30, 30), (25, 22), dilation=2, prefix=1, position="post", biases=False),
    AdapterCase(17, 10, 7, (12, 12), (17, 17), prefix=1, prefix_mode="skip", dropout=0.5),
    AdapterCase(4, 16, 16, (14, 14), (31, 31), prefix=1, residual=True),  # larger than the map
    AdapterCase(1, 16, 33, (23, 20), (26, 26), layout="map", activation="none"),
    AdapterCase(2, 12, 5, (22, 24), (15, 31), prefix=2, prefix_mode="zero", residual=True),
    AdapterCase(4, 16, 8, (15, 15), (13, 13), prefix=1, activation="silu"),
]  # fmt: skip
# Rows of more than 7 taps, summed in place.
LONG_ROWS = [
    AdapterCase(4, 20, 9, (12, 14), (10, 9), prefix=1, residual=True),
    AdapterCase(5, 33, 16, (14, 28), (5, 12), dilation=2, dropout=0.3, position="both"),
    AdapterCase(6, 10, 33, (9, 20), (3, 11), prefix=2, prefix_mode="zero", activation="silu"),
]
# Too few images for threads; direct sums.
FEW_IMAGES = [
    AdapterCase(1, 96, 9, (28, 26), (5, 6), prefix=2, dropout=0.3, position="both", residual=True),
    AdapterCase(2, 150, 8, (14, 14), (7, 7), prefix=1, residual=True),
    AdapterCase(3, 130, 12, (20, 19), (3, 3), dilation=3, prefix=3, prefix_mode="zero"),
    AdapterCase(1, 80, 6, (25, 24), (4, 5), position="post", prefix_mode="skip", prefix=100),
]
# Sums of so many terms that they are cut into runs, on maps that threads share by rows.
LONG_SUMS = [
    AdapterCase(2, 3, 5, (20, 3), (31, 27), prefix=130),
    AdapterCase(1, 7, 4, (17, 5), (18, 27), prefix=97),
    AdapterCase(2, 200, 16, (21, 4), (27, 7)),
]


def kernels_of(case: AdapterCase, dtype=torch.float32) -> list[str]:
    """What the depthwise planner chooses for the convolution, forward and backward."""
    padding = [case.dilation * (k - 1) for k in case.kernel]
    before = [p // 2 for p in padding]
    after = [p - b for p, b in zip(padding, before, strict=True)]
    return [
        _extension.depthwise_kernel_name(
            direction,
            dtype,
            (case.batch, case.r, *case.grid),
            case.kernel,
            (1, 1),
            (*before, *after),
            (case.dilation, case.dilation),
            True,
        )
        for direction in ("forward", "backward_input", "backward_weight")
    ]


def test_the_cases_are_what_they_are_called():
    for case in TRANSFORMED[:-2]:
        assert kernels_of(case) == ["fft"] * 3, case
    for case in TRANSFORMED[-2:]:
        assert "fft" in kernels_of(case), case
    for case in LONG_ROWS:
        assert case.kernel[1] > 7, case
        assert kernels_of(case)[:2] == ["in_place"] * 2, case
    for case in FEW_IMAGES:
        assert "fft" not in kernels_of(case), case


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSFORMED + LONG_ROWS + FEW_IMAGES, ids=str)
def test_equals_the_specification(case, dtype):
    check_backend(case, dtype, "cpu")


@pytest.mark.parametrize(
    "case", [TRANSFORMED[1], TRANSFORMED[4], LONG_ROWS[1], *FEW_IMAGES[:3], *LONG_SUMS], ids=str
)
def test_same_bits_with_any_number_of_threads(case):
    tensors = case.tensors(torch.float32)
    grad_output = torch.randn(tensors["x"].shape)
    results = []
    for threads in (1, 1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(with_gradients(call, case, tensors, grad_output))
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [TRANSFORMED[0], TRANSFORMED[4], FEW_IMAGES[1]], ids=str)
def test_the_convolution_is_that_of_the_depthwise_kernels(case, dtype):
    case = dataclasses.replace(case, activation="none")
    *arguments, residual = case.tensors(dtype).values()
    options = tuple(case.options[name] for name in ("num_prefix_tokens", "prefix_mode", "dilation"))
    _, z, c = ops.ADAPTER["cpu"].forward(
        *arguments, residual, None, *case.grid, *options, "none", "pre", 0.0, 1.0
    )

    def grid(tokens):
        return tokens[:, case.prefix :].transpose(1, 2).unflatten(2, case.grid)

    weight, bias = arguments[3:5]
    expected = depthwise_conv2d(grid(z), weight, bias, padding="same", dilation=case.dilation)
    assert torch.equal(grid(c), expected)


@pytest.mark.parametrize("case", [TRANSFORMED[1], TRANSFORMED[5], FEW_IMAGES[2]], ids=str)
def test_each_gradient_alone(case):
    tensors = case.tensors(torch.float32)
    grad_output = torch.randn(tensors["x"].shape)
    of_all = with_gradients(call, case, tensors, grad_output)
    for name in NAMES:
        if tensors[name] is None:
            continue
        given = {k: None if t is None else t.detach() for k, t in tensors.items()}
        leaf = given[name].requires_grad_()
        (alone,) = torch.autograd.grad(call(case, given), leaf, grad_output)
        assert torch.equal(alone, of_all[name]), name


@pytest.mark.parametrize("case", [TRANSFORMED[0], TRANSFORMED[-2], FEW_IMAGES[2]], ids=str)
def test_x_as_its_own_residual(case):
    case = dataclasses.replace(case, residual=True)
    tensors = case.tensors(torch.float32)
    grad_output = torch.randn(tensors["x"].shape)
    tensors["residual"] = tensors["x"].clone()
    apart = with_gradients(call, case, tensors, grad_output)
    x = tensors["x"].detach().requires_grad_()
    output = call(case, {**tensors, "x": x, "residual": x})
    (grad,) = torch.autograd.grad(output, x, grad_output)
    assert torch.equal(output, apart["output"])
    torch.testing.assert_close(grad, apart["x"] + apart["residual"], rtol=1e-6, atol=1e-6)
