"""The calls of an adapter case: what each peer computes on each buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import cases, cuda_peers, measure, peers
from lka_kernels import FusedLKA


def build(
    case: cases.Case, chosen: list[peers.Peer], device: str, dtype: torch.dtype, seconds: float
) -> tuple[dict[str, Callable], int]:
    """(for each peer a function that makes its call, number of buffers).

    x is its own residual; forward+backward is for the gradients of x and of all parameters.
    """
    torch.manual_seed(0)
    shape = case.shape
    options = {"device": device, "dtype": dtype}
    # The parameters only; init="paper", as zeros are not what is multiplied in training.
    layers = FusedLKA(shape.dim, shape.rank, shape.kernel, init="paper", **options)
    backward = case.direction == "forward+backward"
    parameters = [p.requires_grad_(backward) for p in layers.parameters()]
    weights = [p for m in (layers.down, layers.conv, layers.up) for p in (m.weight, m.bias)]

    def random_tokens():
        return torch.randn(shape.batch, shape.prefix + shape.side**2, shape.dim, **options)

    inputs = measure.random_inputs(random_tokens)
    for x in inputs:
        x.requires_grad_(backward)
    grads = [random_tokens() for _ in inputs] if backward else []

    def make(peer: peers.Peer) -> Callable[[int], object]:
        function = peers.compiled(peer)

        def forward(index):
            return function(inputs[index], *weights, shape.prefix)

        def forward_and_backward(index):
            y = forward(index)
            return torch.autograd.grad(y, (inputs[index], *parameters), grads[index])

        call = forward_and_backward if backward else forward
        return cuda_peers.graphed(call, len(inputs)) if peer.graphed else call

    return {peer.name: lambda p=peer: make(p) for peer in chosen}, len(inputs)
