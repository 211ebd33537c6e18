"""docs/adapters.md: a large and a small depthwise kernel on one input are one convolution."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_to_truth

from lka_kernels import depthwise_conv2d

DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"


def snippet() -> str:
    (found,) = re.findall(r"^```python\n([^`]*padding=\"same\"[^`]*)^```", DOCS.read_text(), re.M)
    return found


def gradients(y, x, large, small, grad_output):
    return y, *torch.autograd.grad(y, (x, large, small), grad_output)


def two_convolutions(x, large, small, grad_output):
    y = F.conv2d(x, large, padding="same", groups=x.shape[1])
    y = y + F.conv2d(x, small, padding="same", groups=x.shape[1])
    return gradients(y, x, large, small, grad_output)


def one_convolution(x, large, small, grad_output):
    vertical, horizontal = (
        (n - m) // 2 for n, m in zip(large.shape[2:], small.shape[2:], strict=True)
    )
    padded = F.pad(small, (horizontal, horizontal, vertical, vertical))
    y = depthwise_conv2d(x, large + padded, padding="same")
    return gradients(y, x, large, small, grad_output)


@pytest.mark.parametrize(
    ("large", "small"),
    [((51, 51), (5, 5)), ((13, 13), (3, 3)), ((31, 5), (5, 5)), ((5, 7), (1, 3))],
)
def test_the_pair_is_one_convolution(large, small):
    shapes = ((2, 3, 14, 17), (3, 1, *large), (3, 1, *small), (2, 3, 14, 17))

    def tensors(dtype):
        generator = torch.Generator().manual_seed(0)
        *leaves, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
        return *(leaf.requires_grad_() for leaf in leaves), grad

    truths = two_convolutions(*tensors(torch.float64))
    theirs = two_convolutions(*tensors(torch.float32))
    ours = one_convolution(*tensors(torch.float32))
    names = ("output", "grad_input", "grad_large", "grad_small")
    for name, result, truth, other in zip(names, ours, truths, theirs, strict=True):
        assert_close_to_truth(name, result.detach(), truth.detach(), other.detach())


def test_the_documented_snippet():
    names = {}
    exec(compile(snippet(), str(DOCS), "exec"), names)
    x, large, small = (names[name].detach().double() for name in ("x", "large", "small"))
    truth = F.conv2d(x, large, padding="same", groups=8)
    truth = truth + F.conv2d(x, small, padding="same", groups=8)
    y = names["y"].detach()
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-3)
    assert names["large"].grad.shape == large.shape
    assert torch.equal(names["large"].grad[..., 23:28, 23:28], names["small"].grad)
