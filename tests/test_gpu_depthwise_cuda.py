"""The CUDA backend's depthwise convolution on a GPU, at the sizes of real networks. `make gpu` runs
them."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_to_truth

from lka_kernels import available_backends, depthwise_conv2d, use_backend
from lka_kernels.ops import DEPTHWISE

STATUS = available_backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(STATUS != "ready", reason=STATUS),
]

# (batch, channels, height, width), kernel, dilation
NETWORKS = {
    "ConvNeXt stage 1": ((8, 192, 56, 56), (7, 7), 1),
    "ConvNeXt stage 4": ((32, 1536, 7, 7), (7, 7), 1),
    "RepLKNet stage 1": ((4, 128, 56, 56), (31, 31), 1),
    "RepLKNet stage 2": ((33, 96, 28, 28), (29, 29), 1),
    "RepLKNet stage 3": ((17, 512, 14, 14), (27, 27), 1),
    "one image of RepLKNet stage 3": ((1, 512, 14, 14), (27, 27), 1),
    "map of 16": ((40, 96, 16, 16), (31, 31), 1),
    "RepLKNet stage 4": ((16, 1024, 7, 7), (13, 13), 1),
    "SLaK": ((4, 96, 56, 56), (51, 5), 1),
    "SLaK turned": ((4, 96, 56, 56), (5, 51), 1),
    "SLaK square": ((4, 96, 28, 28), (51, 51), 1),
    "VAN": ((4, 64, 56, 56), (7, 7), 3),
    "weather": ((1, 192, 90, 180), (7, 7), 1),
    "odd sizes": ((3, 37, 29, 31), (4, 6), 1),
}


def results(function, x, weight, bias, grad_output):
    """Output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))


# What transforms of at most 128 rows and columns serve.
TRANSFORMED = {
    **{name: network for name, network in NETWORKS.items() if name != "weather"},
    "64 rows and columns": ((5, 48, 49, 49), (31, 31), 1),
    "128 rows and columns": ((3, 32, 112, 112), (31, 31), 1),
    "one image": ((1, 65, 20, 90), (3, 9), 2),
}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_real_sizes(name, dtype, format):
    check_network(NETWORKS[name], dtype, format, "auto")


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_of_real_sizes(name, dtype, format):
    check_network(TRANSFORMED[name], dtype, format, "fft")


def check_network(network, dtype, format, method):
    """Output and gradients against float64, by the error of torch's own kernels."""
    shape, kernel, dilation = network
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format)
    weight = torch.randn(shape[1], 1, *kernel, device="cuda").to(dtype)
    bias = torch.randn(shape[1], device="cuda").to(dtype)
    geometry = {"padding": "same", "dilation": dilation}

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, groups=shape[1], **geometry)

    def ours(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, **geometry, method=method)

    grad_output = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format)
    doubles = [t.double() for t in (x, weight, bias, grad_output)]
    truths = results(theirs, *doubles)
    references = results(theirs, x, weight, bias, grad_output)
    with use_backend("cuda"):
        found = results(ours, x, weight, bias, grad_output)
    terms = grad_output[:, 0].numel()
    magnitudes = (kernel[0] * kernel[1]) ** 0.5, (kernel[0] * kernel[1]) ** 0.5, *[terms**0.5] * 2
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for tensors in zip(names, found, truths, references, magnitudes, strict=True):
        what, *values, magnitude = tensors
        assert_close_to_truth(what, *values, magnitude=magnitude)


def test_transforms_refuse_larger_maps():
    x = torch.zeros(1, 1, 120, 20, device="cuda")
    weight = torch.zeros(1, 1, 31, 3, device="cuda")
    with use_backend("cuda"), pytest.raises(RuntimeError, match="more than 128 rows or columns"):
        depthwise_conv2d(x, weight, padding="same", method="fft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_cores_equal_the_direct_kernel(dtype):
    x = torch.randn(5, 24, 30, 33, device="cuda").to(dtype)
    weight = torch.randn(24, 1, 9, 7, device="cuda").to(dtype)
    arguments = (x, weight, None, (1, 1), (4, 3, 4, 3), (1, 1), False)
    found = DEPTHWISE["cuda_gemm"].forward(*arguments)
    direct = DEPTHWISE["cuda_direct"].forward(*arguments)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, direct, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("family", ["cuda_gemm", "cuda_fft"])
def test_same_bits_twice(family):
    x = torch.randn(16, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    grad_output = torch.randn_like(x)
    arguments = (grad_output, x, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1))
    first, second = (DEPTHWISE[family].backward_weight(*arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["auto", "direct", "implicit_gemm", "fft"])
@pytest.mark.parametrize(("side", "k"), [(56, 51), (7, 7)])
def test_cuda_graph(method, dtype, side, k):
    """Output and all gradients, captured together and replayed for another input."""
    if method == "implicit_gemm" and dtype == torch.float32:
        pytest.skip("tensor cores take float16 and bfloat16")
    x = torch.randn(1, 96, side, side, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(96, 1, k, k, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(96, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def run():
        y = depthwise_conv2d(x, weight, bias, padding="same", method=method)
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)

    with use_backend("cuda"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def test_another_stream_and_device():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.randn(2, 8, 20, 20, device=device, dtype=torch.float16)
    weight = torch.randn(8, 1, 7, 7, device=device, dtype=torch.float16)
    with use_backend("cuda"):
        expected = depthwise_conv2d(x, weight, padding="same")
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            y = depthwise_conv2d(x, weight, padding="same")
        stream.synchronize()
    assert torch.equal(y, expected)


def test_more_than_2_to_the_31_elements():
    """The last image of a batch that needs 64-bit offsets equals the first."""
    x = torch.randn(1, 64, 56, 56, device="cuda", dtype=torch.float16)
    weight = torch.randn(64, 1, 7, 7, device="cuda", dtype=torch.float16)
    many = x.expand(2**31 // x.numel() + 2, -1, -1, -1).contiguous()
    with use_backend("cuda"):
        y = depthwise_conv2d(many, weight, padding="same")
        alone = depthwise_conv2d(x, weight, padding="same")
    assert torch.equal(y[-1], y[0])
    assert torch.equal(y[-1], alone[0])


def test_what_the_tensor_cores_refuse():
    x = torch.zeros(1, 1, 300, 300, device="cuda", dtype=torch.float16)
    weight = torch.zeros(1, 1, 255, 255, device="cuda", dtype=torch.float16)
    with use_backend("cuda"):
        with pytest.raises(RuntimeError, match="do not fit shared memory"):
            depthwise_conv2d(x, weight, padding="same", method="implicit_gemm")
        depthwise_conv2d(x, weight, padding="same")  # by the direct kernel
