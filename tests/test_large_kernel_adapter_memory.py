"""Peak memory of the fused adapter's forward and backward on the CPU: x + y + 4z.

That is the gradient of x, y, and four of the width of the bottleneck: z, the convolution's output,
the activation of z (later its gradient) and the gradient of the convolution's output. These are
float32 for 16-bit types too. The gradients of the parameters come on top.
"""

import pytest
import torch

from benchmarks import memory
from lka_kernels import FusedLKA, ops
from lka_kernels.checks import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("compiled_cpu")

# Seeds and the like.
ALLOWANCE = 2**8


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "grid", "prefix", "dim", "rank", "kernel", "dropout"),
    [
        (4, (28, 28), 0, 96, 8, 7, 0.1),  # image after image in the cache
        (1, (28, 28), 1, 192, 16, 7, 0.0),  # threads share an image: step by step
        (2, (28, 28), 1, 64, 32, 31, 0.1),  # transforms
        (2, (14, 14), 1, 64, 64, 31, 0.0),
    ],
)
def test_peak_of_forward_and_backward(batch, grid, prefix, dim, rank, kernel, dropout, dtype):
    tokens = prefix + grid[0] * grid[1]
    layer = FusedLKA(dim, rank, kernel, dropout=dropout, num_prefix_tokens=prefix, dtype=dtype)
    x = torch.randn(batch, tokens, dim).to(dtype).requires_grad_()
    grad_output = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def forward_and_backward():
        return torch.autograd.grad(layer(x, grid, residual=x), leaves, grad_output)

    forward_and_backward()  # what is kept from the first call on
    x_bytes = x.numel() * x.element_size()
    z_bytes = batch * tokens * rank * ops.accumulation_dtype(dtype).itemsize
    gradients = sum(p.numel() * p.element_size() for p in layer.parameters())
    peak = memory.peak_bytes(forward_and_backward, "cpu")
    assert 0 < peak <= 2 * x_bytes + 4 * z_bytes + gradients + ALLOWANCE
