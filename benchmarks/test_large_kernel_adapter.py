"""large_kernel_adapter beside the same adapter through plain PyTorch."""

import measure
import peers
import pytest
import shapes
import torch

from lka_kernels import FusedLKA


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    chosen = shapes.selected(shapes.ADAPTER, option("--bench-all"))
    metafunc.parametrize("shape", chosen, ids=lambda s: s.name)
    metafunc.parametrize("peer", peers.adapter_peers(), ids=lambda p: p.name)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_large_kernel_adapter(benchmark, shape, peer, direction, device, dtype, seconds):
    benchmark.group = (
        f"large_kernel_adapter {direction} {shape.name} B {shape.batch}, {shape.side}x{shape.side}"
        f"+{shape.prefix} tokens, C {shape.dim}, r {shape.rank}, K {shape.kernel}"
    )
    backward = direction == "forward+backward"
    options = {"device": device, "dtype": dtype}
    # The parameters only; init="paper", as zeros are not what is multiplied in training.
    layers = FusedLKA(shape.dim, shape.rank, shape.kernel, init="paper", **options)
    parameters = [p.requires_grad_(backward) for p in layers.parameters()]
    tokens = shape.prefix + shape.side**2

    def make_input():
        x = torch.randn(shape.batch, tokens, shape.dim, **options)
        return x.requires_grad_(backward)

    inputs = measure.random_inputs(make_input)
    grad = torch.randn_like(inputs[0])

    def forward(x):
        return peer.call(
            x,
            layers.down.weight,
            layers.down.bias,
            layers.conv.weight,
            layers.conv.bias,
            layers.up.weight,
            layers.up.bias,
            num_prefix_tokens=shape.prefix,
            residual=x,
        )

    def forward_and_backward(x):
        return torch.autograd.grad(forward(x), (x, *parameters), grad)

    measure.run(benchmark, forward_and_backward if backward else forward, inputs, seconds)
