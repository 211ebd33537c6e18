"""depthwise_conv2d beside torch's direct convolution in both layouts and torch.fft."""

import measure
import peers
import pytest
import shapes
import torch


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    chosen = shapes.selected(shapes.DEPTHWISE, option("--bench-all"))
    found = peers.depthwise_peers(option("--bench-device"))
    metafunc.parametrize("shape", chosen, ids=lambda s: s.name)
    metafunc.parametrize("peer", found, ids=lambda p: p.name)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_depthwise_conv2d(benchmark, shape, peer, direction, device, dtype, seconds):
    benchmark.group = f"depthwise_conv2d {direction} {describe(shape)}"
    backward = direction == "forward+backward"
    options = {"device": device, "dtype": dtype}

    def make_input():
        x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, **options)
        return x.contiguous(memory_format=peer.memory_format).requires_grad_(backward)

    weight = torch.randn(shape.channels, 1, *shape.kernel, **options, requires_grad=backward)
    bias = torch.randn(shape.channels, **options, requires_grad=backward)
    inputs = measure.random_inputs(make_input)
    grad = torch.randn_like(inputs[0])

    def forward(x):
        return peer.call(x, weight, bias, shape.padding, shape.dilation)

    def forward_and_backward(x):
        return torch.autograd.grad(forward(x), (x, weight, bias), grad)

    measure.run(benchmark, forward_and_backward if backward else forward, inputs, seconds)


def describe(shape: shapes.Depthwise) -> str:
    """The shape in words."""
    dilated = f" dilation {shape.dilation}" if shape.dilation > 1 else ""
    size = f"({shape.batch}, {shape.channels}, {shape.height}, {shape.width})"
    return f"{shape.name} {size} K {shape.kernel[0]}x{shape.kernel[1]}{dilated}"
