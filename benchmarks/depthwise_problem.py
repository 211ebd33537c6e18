"""The calls of a depthwise case: what each peer computes on each buffer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import cases, measure, peers


def build(
    case: cases.Case, chosen: list[peers.Peer], device: str, dtype: torch.dtype, seconds: float
) -> tuple[dict[str, Callable], int]:
    """(for each peer a function that makes its call, number of buffers).

    A call is the whole public one: "forward" without gradients; "dX" and "dW" the backward pass
    alone, for the gradient of the input or of the weight; "forward+backward" for those of input,
    weight and bias.
    """
    torch.manual_seed(0)
    shape, layout = case.shape, cases.LAYOUTS[case.layout]
    options = {"device": device, "dtype": dtype}

    def random_map():
        x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, **options)
        return x.contiguous(memory_format=layout)

    weight = torch.randn(shape.channels, 1, *shape.kernel, **options)
    bias = torch.randn(shape.channels, **options)
    weight.requires_grad_(case.direction in ("dW", "forward+backward"))
    bias.requires_grad_(case.direction == "forward+backward")
    inputs = measure.random_inputs(random_map)
    for x in inputs:
        x.requires_grad_(case.direction in ("dX", "forward+backward"))
    grads = [] if case.direction == "forward" else [random_map() for _ in inputs]

    def make(peer: peers.Peer) -> Callable[[int], object]:
        call = peers.in_layout(peer, layout)

        def forward(index):
            return call(inputs[index], weight, bias, shape.padding, shape.dilation)

        if case.direction == "forward":
            return forward
        if case.direction == "forward+backward":
            return lambda i: torch.autograd.grad(forward(i), (inputs[i], weight, bias), grads[i])
        graphs = graphs_within(forward, len(inputs), seconds)

        def backward(index):
            index %= len(graphs)
            leaf = weight if case.direction == "dW" else inputs[index]
            return torch.autograd.grad(graphs[index], leaf, grads[index], retain_graph=True)

        return backward

    return {peer.name: lambda p=peer: make(p) for peer in chosen}, len(inputs)


def graphs_within(forward: Callable[[int], object], buffers: int, seconds: float) -> list:
    """Results of ``forward`` with their graphs, for all buffers, or 2 at least if time is up."""
    begun = time.perf_counter()
    graphs = []
    for index in range(buffers):
        if index >= 2 and time.perf_counter() - begun > seconds:
            break
        graphs.append(forward(index))
    return graphs
