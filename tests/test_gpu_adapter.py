"""The adapter's Triton kernels on a GPU, at the sizes of real networks. `make gpu` runs them."""

import dataclasses

import pytest
import torch
from adapter_cases import AdapterCase, call, check_backend, with_gradients

from lka_kernels import FusedLKA, available_backends, use_backend
from lka_kernels.functional import large_kernel_adapter

STATUS = available_backends()["triton"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(STATUS != "ready", reason=STATUS),
]

NETWORKS = {
    "ViT-L": AdapterCase(8, 1024, 8, (14, 14), (7, 7), prefix=1, dropout=0.1, residual=True),
    "Swin-L stage 1": AdapterCase(4, 192, 8, (56, 56), (7, 7), residual=True, layout="map"),
    "Swin-L stage 4": AdapterCase(16, 1536, 8, (7, 7), (7, 7), residual=True, layout="map"),
    "ConvNeXt-L stage 2": AdapterCase(4, 384, 8, (28, 28), (7, 7), layout="channels_first"),
    "large rank and kernel": AdapterCase(4, 1024, 64, (14, 14), (31, 31), residual=True),
    "largest": AdapterCase(2, 768, 256, (14, 14), (51, 51), position="both"),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes(name, dtype):
    check_backend(NETWORKS[name], dtype, "triton", "cuda")


def _tensors(case, dtype=torch.bfloat16):
    return {k: None if t is None else t.cuda() for k, t in case.tensors(dtype).items()}


def test_more_than_2_to_the_31_elements():
    """The last image of a batch that needs 64-bit offsets equals the first."""
    case = dataclasses.replace(NETWORKS["Swin-L stage 1"], batch=1, residual=False)
    tensors = _tensors(case)
    batch = 2**31 // tensors["x"].numel() + 2
    x = tensors["x"].expand(batch, -1, -1, -1).contiguous()
    with use_backend("triton"):
        alone = call(case, tensors)
        many = call(case, {**tensors, "x": x})
    # Tokens are tiled across images: the same token may have another place in its tile.
    torch.testing.assert_close(many[0], alone[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(many[-1], many[0], rtol=1e-2, atol=1e-2)


def test_same_bits_twice():
    case = NETWORKS["ViT-L"]
    tensors = _tensors(case)
    grad = torch.randn_like(tensors["x"])
    with use_backend("triton"):
        first, second = (with_gradients(call, case, tensors, grad) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _module():
    module = FusedLKA(384, 8, 7, init="paper", num_prefix_tokens=1, dropout=0.0)
    return module.to("cuda", torch.bfloat16)


def test_cuda_graph():
    module = _module()
    static = torch.randn(1, 197, 384, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"), torch.no_grad():
        module(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(static)
        fresh = torch.randn_like(static)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(y, module(fresh))


def test_the_current_stream():
    module = _module()
    x = torch.randn(4, 197, 384, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with use_backend("triton"), torch.no_grad():
        expected = module(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = x * 2  # waits on this stream alone
            found = module(late / 2)
        stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    module = _module().to("cuda:1")
    x = torch.randn(2, 197, 384, device="cuda:1", dtype=torch.bfloat16)
    with use_backend("triton"):
        y = module(x)
    assert y.device == x.device
    with use_backend("torch"):
        torch.testing.assert_close(y, module(x), rtol=2e-2, atol=2e-2)


def test_compiled():
    module = _module()
    x = torch.randn(4, 197, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    with use_backend("triton"):
        for function in (module, torch.compile(module, fullgraph=True)):
            y = function(x, residual=x)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


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
    difference = (results[0] - results[1]).abs().max()
    assert 0 < difference < 1e-2
