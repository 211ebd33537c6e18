"""What "auto" takes on a GPU, whichever family sizes choose. `make gpu` runs it."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import DEFINED, AdapterCase, call, check_backend
from closeness import assert_close_to_truth

from lka_kernels import DepthwiseConv2d, FusedLKA, available_backends, dispatch, explain, ops
from lka_kernels.backends import gpu
from lka_kernels.functional import depthwise_conv2d

STATUS = available_backends()
READY = [name for name in ("cuda", "triton") if STATUS[name] == "ready"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not READY, reason=f"neither backend is ready: {STATUS}"),
]

# (batch, channels, height, width), kernel, padding, dilation
CALLS = {
    "RepLKNet stage 1": ((8, 128, 56, 56), (31, 31), "same", 1),
    "RepLKNet stage 3": ((32, 512, 14, 14), (27, 27), "same", 1),
    "RepLKNet stage 4": ((16, 1024, 7, 7), (13, 13), "same", 1),
    "ConvNeXt stage 1": ((64, 192, 56, 56), (7, 7), "same", 1),
    "ConvNeXt stage 3": ((8, 384, 14, 14), (7, 7), "same", 1),
    "one image": ((1, 64, 7, 7), (5, 5), "same", 1),
    "SLaK": ((4, 96, 56, 56), (51, 5), "same", 1),
    "VAN": ((8, 64, 28, 28), (7, 7), "same", 3),
    "a map that no launch transforms": ((2, 16, 130, 140), (31, 31), "same", 1),
    "uneven padding": ((3, 37, 29, 31), (4, 6), "same", 1),
    "one channel of a column": ((3, 1, 40, 1), (5, 3), "same", 1),
    "no padding": ((4, 32, 40, 30), (9, 7), 0, 1),
}
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


@pytest.fixture(autouse=True)
def full_precision():
    """Of torch's own convolutions, which serve some calls; Triton's follow the same switch."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    yield
    switch.fp32_precision = before


def tensors(shape, kernel, dtype, format) -> list[torch.Tensor]:
    """Input, weight and bias."""
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format)
    weight = torch.randn(shape[1], 1, *kernel, device="cuda").to(dtype)
    return [x, weight, torch.randn(shape[1], device="cuda").to(dtype)]


def results(function, leaves, grad_output) -> list[torch.Tensor]:
    """Output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("method", ["auto", "fft"])
def test_output_and_gradients(name, dtype, format, method):
    shape, kernel, padding, dilation = CALLS[name]
    given = tensors(shape, kernel, dtype, format)

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, 1, padding, dilation, shape[1])

    def ours(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, 1, padding, dilation, method=method)

    y = theirs(*given)
    grad_output = torch.randn_like(y)
    truths = results(theirs, [t.double() for t in given], grad_output.double())
    references = results(theirs, given, grad_output)
    found = results(ours, given, grad_output)
    taps, terms = kernel[0] * kernel[1], grad_output[:, 0].numel()
    magnitudes = [taps**0.5] * 2 + [terms**0.5] * 2
    for values in zip(NAMES, found, truths, references, magnitudes, strict=True):
        *values, magnitude = values
        assert_close_to_truth(*values, magnitude=magnitude)
    assert found[0].is_contiguous(memory_format=format)


def test_sizes_choose_different_families():
    chosen = set()
    for (name, dtype), format in itertools.product(
        itertools.product(CALLS, (torch.bfloat16, torch.float32)), FORMATS
    ):
        shape, kernel, padding, dilation = CALLS[name]
        text = explain(*tensors(shape, kernel, dtype, format), 1, padding, dilation)
        assert text.startswith("backend=gpu method=auto")
        (line,) = re.findall(r"^sizes choose (.*)$", text, re.M)
        chosen |= set(re.findall(r"(?:forward|dX|dW): (\w+) ", line))
    assert "torch" in chosen
    if "cuda" in READY:
        assert {"cuda", "cuda_fft"} <= chosen


FAMILIES = [
    *(name for name in ("cuda", "cuda_fft") if "cuda" in READY),
    *(name for name in ("triton",) if "triton" in READY),
    "torch",
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_returns_what_the_fakes_say(family, dtype, format, monkeypatch):
    monkeypatch.setattr(gpu, "depthwise_family", lambda *arguments: family)
    operators = ops.DEPTHWISE["gpu"]
    last = format == torch.channels_last
    for shape, kernel in (((2, 6, 9, 8), (3, 5)), ((2, 1, 9, 1), (5, 3)), ((1, 6, 1, 1), (3, 3))):
        x, weight, bias = tensors(shape, kernel, dtype, format)
        geometry = ((1, 1), (kernel[0] // 2, kernel[1] // 2) * 2, (1, 1))
        grad = torch.randn_like(x)
        calls = {
            "forward": (x, weight, bias, *geometry, last),
            "backward_input": (grad, weight, list(shape[2:]), *geometry, last),
            "backward_weight": (grad, x, list(kernel), *geometry),
        }
        for direction, arguments in calls.items():
            found = getattr(operators, direction)(*arguments)
            fake = ops._DEPTHWISE_FAKES[direction](*arguments)
            if direction != "backward_weight":
                found, fake = (found,), (fake,)
            for ours, expected in zip(found, fake, strict=True):
                assert (ours.shape, ours.stride(), ours.dtype) == (
                    expected.shape, expected.stride(), expected.dtype,
                )  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["RepLKNet stage 4", "ConvNeXt stage 3", "uneven padding"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_convolution(name, format, dynamic):
    shape, kernel, padding, dilation = CALLS[name]
    given = tensors(shape, kernel, torch.bfloat16, format)

    def function(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, 1, padding, dilation)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    grad_output = torch.randn_like(function(*given))
    for ours, eager in zip(
        results(compiled, given, grad_output), results(function, given, grad_output), strict=True
    ):
        # Where PyTorch's own operator is taken, a size of 1 has any stride.
        strides = 1 not in ours.shape
        torch.testing.assert_close(ours, eager, check_stride=strides, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["adapter", "depthwise"])
def test_no_new_graph_for_another_batch_or_map(kind):
    if kind == "adapter":
        module = FusedLKA(64, 8, 7, init="paper", device="cuda", dtype=torch.bfloat16)
        shapes = [(2, 8, 9, 64), (32, 28, 28, 64), (3, 14, 14, 64)]
    else:
        module = DepthwiseConv2d(64, 31, padding=15, device="cuda", dtype=torch.bfloat16)
        shapes = [(2, 64, 20, 24), (32, 64, 56, 56), (3, 64, 14, 14)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for shape in shapes:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, module(x), rtol=2e-2, atol=2e-2)
        y.float().sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * len(shapes)  # the adapter's first call makes two


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AdapterCase(8, 1024, 8, (14, 14), (7, 7), prefix=1, dropout=0.1, residual=True),
        AdapterCase(4, 192, 8, (56, 56), (7, 7), residual=True, layout="map"),
        AdapterCase(4, 384, 8, (28, 28), (7, 7), layout="channels_first"),
        AdapterCase(4, 1024, 64, (14, 14), (31, 31), residual=True),
        AdapterCase(1, 96, 8, (7, 7), (7, 7), residual=True),
        *DEFINED[:9],
    ],
    ids=str,
)
def test_adapter(case, dtype):
    check_backend(case, dtype, "auto", "cuda")


@pytest.mark.skipif(len(READY) < 2, reason="one backend alone")
@pytest.mark.parametrize("case", DEFINED, ids=str)
@pytest.mark.parametrize("families", [("cuda", "triton"), ("triton", "cuda")])
def test_one_adapter_forward_and_another_backward(families, case, monkeypatch):
    """What the one keeps for the backward pass is what the other reads."""
    by_direction = dict(zip(("forward", "backward"), families, strict=True))
    monkeypatch.setattr(gpu, "adapter_family", lambda direction, *rest: by_direction[direction])
    for dtype in (torch.bfloat16, torch.float32):
        check_backend(case, dtype, "auto", "cuda")


def test_no_backend_that_a_device_can_run(monkeypatch):
    """A traced call may reach it: PyTorch serves it."""
    monkeypatch.setattr(dispatch, "gpu_backends", lambda index: {"cuda": "no", "triton": "no"})
    monkeypatch.setattr(dispatch, "_gpu_refuses", lambda *arguments: None)
    gpu.forget()
    try:
        check_backend(DEFINED[0], torch.float32, "auto", "cuda")
        x, weight, bias = tensors((2, 6, 9, 8), (4, 5), torch.float32, torch.channels_last)
        y = depthwise_conv2d(x, weight, bias, padding="same")
        torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding="same", groups=6))
    finally:
        gpu.forget()


@pytest.mark.parametrize("name", ["RepLKNet stage 4", "ConvNeXt stage 3", "one image"])
def test_cuda_graph(name):
    shape, kernel, padding, dilation = CALLS[name]
    given = tensors(shape, kernel, torch.bfloat16, torch.contiguous_format)
    grad_output = torch.randn_like(given[0])

    def run():
        return results(lambda *t: depthwise_conv2d(*t, 1, padding, dilation), given, grad_output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for ours, eager in zip(captured, run(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


def test_calls_are_remembered_by_device_and_dtype():
    case = AdapterCase(2, 16, 8, (6, 6), (5, 5))
    for dtype in (torch.float32, torch.bfloat16):
        for device in ("cuda", "cpu", "cuda"):
            given = {k: None if t is None else t.to(device) for k, t in case.tensors(dtype).items()}
            assert call(case, given).device.type == device
            x, weight = torch.randn(2, 3, 9, 9, dtype=dtype), torch.randn(3, 1, 5, 5, dtype=dtype)
            for _ in range(2):
                y = depthwise_conv2d(x.to(device), weight.to(device), padding=2)
                assert y.device.type == device
                other = weight.to("cpu" if device == "cuda" else "cuda")
                with pytest.raises(ValueError, match="must be on the device of input"):
                    depthwise_conv2d(x.to(device), other, padding=2)
        x, weight = x.float().cuda(), weight.float().cuda()
        depthwise_conv2d(x, weight, padding=2)
        with torch.autocast("cuda", torch.bfloat16):
            assert depthwise_conv2d(x, weight, padding=2).dtype == torch.bfloat16
