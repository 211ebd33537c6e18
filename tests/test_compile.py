"""torch.compile sees no graph break, and batch and map may change without a new graph."""

import pytest
import torch
import torch._dynamo.testing

from lka_kernels import DepthwiseConv2d, FusedLKA


@pytest.mark.parametrize("kind", ["adapter", "depthwise"])
def test_one_graph_for_every_batch_and_map(kind):
    torch._dynamo.reset()
    if kind == "adapter":
        module = FusedLKA(16, 8, 7, init="paper")
        shapes = [(2, 4, 5, 16), (3, 6, 7, 16), (4, 9, 8, 16), (5, 11, 7, 16)]
    else:
        module = DepthwiseConv2d(6, 7, padding=3)
        shapes = [(2, 6, 9, 10), (3, 6, 12, 11), (4, 6, 15, 14), (5, 6, 17, 11)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for shape in shapes:
        x = torch.randn(shape, requires_grad=True)
        expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        found = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    # The first call may be specialised; after it one graph serves every size.
    assert counter.frame_count <= 2
