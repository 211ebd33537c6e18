"""The adapter's GPU kernels, at the sizes of real networks. `make gpu` runs them."""

import dataclasses

import pytest
import torch
from adapter_cases import DEFINED, NAMES, AdapterCase, call, check_backend, with_gradients

from lka_kernels import FusedLKA, available_backends, ops, philox, use_backend
from lka_kernels.functional import large_kernel_adapter

STATUS = available_backends()
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(STATUS[name] != "ready", reason=STATUS[name]))
    for name in ("triton", "cuda")
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

NETWORKS = {
    "ViT-L": AdapterCase(8, 1024, 8, (14, 14), (7, 7), prefix=1, dropout=0.1, residual=True),
    "Swin-L stage 1": AdapterCase(4, 192, 8, (56, 56), (7, 7), residual=True, layout="map"),
    "Swin-L stage 4": AdapterCase(16, 1536, 8, (7, 7), (7, 7), residual=True, layout="map"),
    "ConvNeXt-L stage 2": AdapterCase(4, 384, 8, (28, 28), (7, 7), layout="channels_first"),
    "large rank and kernel": AdapterCase(4, 1024, 64, (14, 14), (31, 31), residual=True),
    "largest": AdapterCase(2, 768, 256, (14, 14), (51, 51), position="both"),
}


@on_every_backend
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes(name, dtype, backend):
    check_backend(NETWORKS[name], dtype, backend, "cuda")


@pytest.mark.skipif(STATUS["cuda"] != "ready", reason=STATUS["cuda"])
@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_defined_cases(case):
    """Of the CUDA kernels; test_triton_adapter.py has them for Triton."""
    for dtype in (torch.float16, torch.float32):
        check_backend(case, dtype, "cuda", "cuda")


@on_every_backend
def test_dropout_masks_are_those_of_the_cpu(backend):
    """Bit by bit: a dropped element is exactly zero."""
    case = AdapterCase(2, 8, 8, (5, 7), (1, 1), dropout=0.4, position="post", activation="none")
    tensors = case.tensors(torch.float32)
    tensors["up_weight"], tensors["up_bias"] = torch.eye(8), torch.zeros(8)
    seed, options = torch.tensor([99]), (5, 7, 0, "center_tap", 1, "none", "post", 0.4, 1.0)
    arguments = [tensors[name] for name in NAMES[:-1]]
    y, _, _ = ops.ADAPTER[backend].forward(
        *(t.cuda() for t in arguments), None, seed.cuda(), *options
    )
    factors = philox.dropout_multiplier(seed, (2, 35, 8), 0.4)
    assert torch.equal(y.cpu() == 0, factors == 0)


def _tensors(case, dtype=torch.bfloat16):
    return {k: None if t is None else t.cuda() for k, t in case.tensors(dtype).items()}


@on_every_backend
def test_more_than_2_to_the_31_elements(backend):
    """The last image of a batch that needs 64-bit offsets equals the first."""
    case = dataclasses.replace(NETWORKS["Swin-L stage 1"], batch=1, residual=False)
    tensors = _tensors(case)
    batch = 2**31 // tensors["x"].numel() + 2
    x = tensors["x"].expand(batch, -1, -1, -1).contiguous()
    with use_backend(backend):
        alone = call(case, tensors)
        many = call(case, {**tensors, "x": x})
    # Tokens are tiled across images: the same token may have another place in its tile.
    torch.testing.assert_close(many[0], alone[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(many[-1], many[0], rtol=1e-2, atol=1e-2)


@on_every_backend
def test_same_bits_twice(backend):
    case = NETWORKS["ViT-L"]
    tensors = _tensors(case)
    grad = torch.randn_like(tensors["x"])
    with use_backend(backend):
        first, second = (with_gradients(call, case, tensors, grad) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _module():
    module = FusedLKA(384, 8, 7, init="paper", num_prefix_tokens=1, dropout=0.0)
    return module.to("cuda", torch.bfloat16)


@on_every_backend
def test_cuda_graph(backend):
    module = _module()
    static = torch.randn(1, 197, 384, device="cuda", dtype=torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        module(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(static)
        fresh = torch.randn_like(static)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(y, module(fresh))


def _captured(step):
    """The graph of a call and what it fills, after runs that fill every cache of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@on_every_backend
@pytest.mark.parametrize("name", ["ViT-L", "large rank and kernel"])
def test_cuda_graph_of_gradients(backend, name):
    """A captured forward and backward pass, replayed for another input, has eager's bits."""
    case = dataclasses.replace(NETWORKS[name], dropout=0.0)
    tensors = _tensors(case)
    grad = torch.randn_like(tensors["x"])
    with use_backend(backend):
        graph, found = _captured(lambda: with_gradients(call, case, tensors, grad))
        tensors["x"].copy_(torch.randn_like(tensors["x"]))
        grad.copy_(torch.randn_like(grad))
        graph.replay()
        expected = with_gradients(call, case, tensors, grad)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert torch.equal(found[what], value), what


@on_every_backend
def test_cuda_graph_of_dropout(backend):
    """Every replay draws a seed of its own, and forward and backward read it from memory."""
    case = dataclasses.replace(NETWORKS["ViT-L"], dropout=0.3, residual=False)
    tensors = _tensors(case)
    x, *weights, _ = tensors.values()
    grad = torch.randn_like(x)
    options = (
        *(*case.grid, case.prefix, case.prefix_mode, case.dilation),
        *(case.activation, case.position, case.dropout, case.scale),
    )

    def run(seed):
        forward, backward = ops.ADAPTER[backend]
        y, z, c = forward(x, *weights, None, seed, *options)
        return y, *backward(grad, x, z, c, *weights, seed, *options, False, [True] * 7)

    def step():
        seed = philox.new_seed(x.device)
        return seed, *run(seed)

    graph, (seed, *found) = _captured(step)
    seeds = []
    for _ in range(2):
        graph.replay()
        seeds.append(seed.item())
        for a, b in zip(found, run(seed.clone()), strict=True):
            assert torch.equal(a, b)
    assert seeds[0] != seeds[1]


@on_every_backend
def test_the_current_stream(backend):
    module = _module()
    x = torch.randn(4, 197, 384, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with use_backend(backend), torch.no_grad():
        expected = module(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = x * 2  # waits on this stream alone
            found = module(late / 2)
        stream.synchronize()
    assert torch.equal(found, expected)


@on_every_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one(backend):
    module = _module().to("cuda:1")
    x = torch.randn(2, 197, 384, device="cuda:1", dtype=torch.bfloat16)
    with use_backend(backend):
        y = module(x)
    assert y.device == x.device
    with use_backend("torch"):
        torch.testing.assert_close(y, module(x), rtol=2e-2, atol=2e-2)


@on_every_backend
def test_compiled(backend):
    module = _module()
    x = torch.randn(4, 197, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    with use_backend(backend):
        for function in (module, torch.compile(module, fullgraph=True)):
            y = function(x, residual=x)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.skipif(STATUS["triton"] != "ready", reason=STATUS["triton"])
def test_tf32_only_where_torch_allows_it():
    case = dataclasses.replace(NETWORKS["ViT-L"], dropout=0.0)
    tensors = _tensors(case, torch.float32)
    *arguments, residual = tensors.values()
    options = case.options | {"training": False}
    results = []
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    for precision in ("ieee", "tf32"):
        switch.fp32_precision = precision
        try:
            with use_backend("triton"):
                results.append(large_kernel_adapter(*arguments, residual=residual, **options))
        finally:
            switch.fp32_precision = before
    # Of what the adapter adds: two products, each of two factors that are cut to 10 bits.
    exact = results[0] - tensors["residual"]
    difference = (results[0] - results[1]).norm() / exact.norm()
    assert 0 < difference < 4 * 2**-10
