"""The operators that choose among GPU families, called on CPU tensors with families that record."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import AdapterCase

from lka_kernels import autograd, dispatch, gpu_choice, ops
from lka_kernels.backends import gpu, reference

DIRECTIONS = ("forward", "backward_input", "backward_weight")
FUNCTIONS = {direction: getattr(gpu, direction) for direction in DIRECTIONS}
BY_TRANSFORMS = {direction: getattr(gpu, f"fft_{direction}") for direction in DIRECTIONS}


@pytest.fixture(autouse=True)
def fresh():
    gpu.forget()
    yield
    gpu.forget()


@pytest.fixture
def ready(monkeypatch):
    """Backends that are ready, as ready("cuda")."""

    def set_ready(*names):
        statuses = {n: "ready" if n in names else "no" for n in ("cuda", "triton")}
        monkeypatch.setattr(dispatch, "gpu_backends", lambda index: statuses)
        gpu.forget()

    set_ready("cuda", "triton")
    return set_ready


@pytest.fixture
def recorded(monkeypatch):
    """(family, direction) of every call; torch.fft does the work of all of them."""
    calls = []

    def recording(family, direction):
        def call(*arguments):
            calls.append((family, direction))
            return getattr(ops.DEPTHWISE["fft"], direction)(*arguments)

        return call

    for family in ("cuda", "cuda_fft", "triton"):
        own = ops.DepthwiseOps(*(recording(family, direction) for direction in DIRECTIONS))
        monkeypatch.setitem(ops.DEPTHWISE, family, own)
    return calls


def choose(monkeypatch, family):
    """Sizes choose ``family`` from now on; what it was chosen from is returned as a list."""
    asked = []

    def chosen(*arguments):
        asked.append(arguments)
        return family

    monkeypatch.setattr(gpu_choice, "depthwise_family", chosen)
    gpu.forget()
    return asked


def problem(shape=(2, 5, 9, 8), kernel=(3, 4), stride=(1, 1), padding=(1, 2, 1, 2),
            dilation=(1, 1), layout=torch.contiguous_format, dtype=torch.float32):  # fmt: skip
    """Arguments of the three operators, in order."""
    last = layout == torch.channels_last
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], 1, *kernel).to(dtype)
    bias = torch.randn(shape[1]).to(dtype)
    geometry = (list(stride), list(padding), list(dilation))
    y = reference.depthwise_conv2d(x, weight, bias, stride, padding, dilation)
    grad = torch.randn_like(y).contiguous(memory_format=layout)
    return {
        "forward": (x, weight, bias, *geometry, last),
        "backward_input": (grad, weight, list(shape[2:]), *geometry, last),
        "backward_weight": (grad, x, list(kernel), *geometry),
    }


def results(functions, arguments) -> list[torch.Tensor]:
    found = []
    for direction in DIRECTIONS:
        result = functions[direction](*arguments[direction])
        found += result if isinstance(result, tuple) else [result]
    return found


def fakes(arguments) -> list[torch.Tensor]:
    return results(ops._DEPTHWISE_FAKES, arguments)


def assert_like_fakes(found, arguments):
    for ours, fake in zip(found, fakes(arguments), strict=True):
        assert ours.shape == fake.shape
        assert ours.stride() == fake.stride()
        assert ours.dtype == fake.dtype


SHAPES = [(2, 5, 9, 8), (1, 1, 9, 8), (2, 5, 1, 1), (1, 5, 1, 8), (3, 1, 1, 1), (1, 4, 7, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("padding", "stride", "dilation"),
    [
        ((2, 3, 2, 3), (1, 1), (1, 1)),
        ((2, 3, 3, 4), (1, 1), (1, 1)),
        ((2, 3, 2, 4), (2, 1), (1, 1)),
        ((4, 3, 4, 3), (1, 2), (2, 1)),
    ],
)
def test_served_by_torch(layout, shape, padding, stride, dilation, ready):
    """Where no family can; values are those of autograd, strides those of the fakes."""
    ready()
    arguments = problem(shape, (3, 4), stride, padding, dilation, layout, torch.float64)
    found = results(FUNCTIONS, arguments)
    assert_like_fakes(found, arguments)
    x, weight, bias, *_ = (
        t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments["forward"]
    )
    y = reference.depthwise_conv2d(x, weight, bias, stride, padding, dilation)
    grads = torch.autograd.grad(y, (x, weight, bias), arguments["backward_weight"][0])
    for ours, truth in zip(found, (y, *grads), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.usefixtures("ready")
def test_an_empty_batch_is_served(layout):
    for arguments in (problem((0, 5, 9, 8), layout=layout), problem((0, 1, 1, 8), layout=layout)):
        found = results(FUNCTIONS, arguments)
        assert [t.shape for t in found] == [t.shape for t in fakes(arguments)]
        assert all(not t.any() for t in found)


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("family", ["cuda", "cuda_fft", "triton", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_call_goes_to_the_family_that_sizes_choose(family, layout, recorded, monkeypatch):
    asked = choose(monkeypatch, family)
    arguments = problem(layout=layout)
    found = results(FUNCTIONS, arguments)
    assert recorded == ([] if family == "torch" else [(family, d) for d in DIRECTIONS])
    assert_like_fakes(found, arguments)
    for ours, truth in zip(found, results(ops.DEPTHWISE["fft"]._asdict(), arguments), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    name = "channels_last" if layout == torch.channels_last else "contiguous"
    everything = frozenset(gpu_choice.FAMILIES["depthwise_conv2d"])
    sizes = (2, 5, (9, 8), (3, 4), (1, 1), everything)
    assert asked == [(direction, name, False, *sizes) for direction in DIRECTIONS]


def test_what_can_serve_a_call(ready, monkeypatch):
    def families(dtype=torch.bfloat16, size=(56, 56), kernel=(31, 31), **changes) -> set:
        gpu.forget()
        asked = choose(monkeypatch, "torch")
        geometry = {"stride": (1, 1), "padding": (15, 15, 15, 15), "dilation": (1, 1), **changes}
        gpu.depthwise_family(
            "forward", "contiguous", dtype, (2, 4, *size), kernel, *geometry.values(), 0
        )
        return set(asked[0][-1])

    everything = {"torch", "cuda", "cuda_fft", "triton"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert families(dtype) == everything
    assert families(torch.float64) == {"torch"}
    assert families(size=(113, 113)) == everything
    assert families(size=(113, 114)) == everything - {"cuda_fft"}
    uneven = {"kernel": (30, 30), "padding": (14, 14, 15, 15)}
    assert families(**uneven) == everything - {"torch"}
    assert families(stride=(2, 2)) == {"torch", "cuda"}
    ready("cuda")
    assert families() == {"torch", "cuda", "cuda_fft"}
    ready("triton")
    assert families() == {"torch", "triton"}
    ready()
    assert families(**uneven) == {"torch"}


@pytest.mark.usefixtures("ready")
def test_the_layout_is_what_the_maps_have_in_common(monkeypatch):
    asked = choose(monkeypatch, "torch")
    x, weight, bias, *geometry, _ = problem()["forward"]
    last = x.contiguous(memory_format=torch.channels_last)
    for given, result_is_last, layout in (
        (x, False, "contiguous"),
        (last, True, "channels_last"),
        (x, True, "other"),
        (x[:, :, :, ::2], False, "other"),
    ):
        gpu.forget()
        gpu.forward(given, weight, bias, *geometry, result_is_last)
        assert asked[-1][1] == layout
    grad, x, *rest = problem()["backward_weight"]
    for given, layout in ((grad, "contiguous"), (grad.permute(2, 3, 0, 1).contiguous(), "other")):
        gpu.forget()
        given = given if layout == "contiguous" else given.permute(2, 3, 0, 1)
        gpu.backward_weight(given, x, *rest)
        assert asked[-1][1] == layout


@pytest.mark.parametrize("family", ["cuda_fft", "fft"])
def test_transforms_in_one_launch_where_they_fit(family, ready, recorded):
    shape = (2, 3, 9, 8) if family == "cuda_fft" else (1, 2, 9, 130)
    arguments = problem(shape)
    assert_like_fakes(results(BY_TRANSFORMS, arguments), arguments)
    assert recorded == ([(family, d) for d in DIRECTIONS] if family == "cuda_fft" else [])
    ready("triton")
    recorded.clear()
    results(BY_TRANSFORMS, arguments)
    assert recorded == []


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_and_compile_with_an_implementation_for_the_cpu(
    channels_last, recorded, monkeypatch
):
    choose(monkeypatch, "triton")
    layout = ops.memory_format(channels_last)
    arguments = problem(padding=(1, 1, 1, 2), layout=layout)
    operators = ops.DEPTHWISE["gpu"]
    with torch.library._scoped_library("lka_kernels", "IMPL") as library:
        for direction in DIRECTIONS:
            library.impl(f"depthwise_conv2d_{direction}_gpu", FUNCTIONS[direction], "CPU")
            torch.library.opcheck(getattr(operators, direction), arguments[direction])
        assert {family for family, _ in recorded} == {"triton"}

        x, weight, bias, *geometry, last = arguments["forward"]
        geometry = tuple(map(tuple, geometry))
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]

        def function(x, weight, bias):
            y = autograd.depthwise_conv2d(x, weight, bias, *geometry, last, "gpu")
            return [y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))]

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a: autograd.depthwise_conv2d(*a, *geometry, last, "gpu"),
            fullgraph=True, dynamic=True, backend="aot_eager",
        )  # fmt: skip
        y = compiled(*leaves)
        found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        for ours, eager in zip(found, function(*leaves), strict=True):
            torch.testing.assert_close(ours, eager, check_stride=True)
        torch._dynamo.reset()


def adapter_arguments(case: AdapterCase, dtype=torch.float32):
    tensors = case.tensors(dtype)
    *arguments, residual = tensors.values()
    options = (
        *(*case.grid, case.prefix, case.prefix_mode, case.dilation, case.activation),
        *(case.position, case.dropout, case.scale),
    )
    seed = torch.tensor([3]) if case.dropout else None
    return arguments, residual, (seed, *options)


@pytest.mark.parametrize(
    "case",
    [
        AdapterCase(),
        AdapterCase(residual=True, scale=0.5, prefix=1, dropout=0.4, position="both"),
        AdapterCase(biases=False, layout="sliced", activation="none", kernel=(5, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [[True] * 7, [False, True, False, True, False, True, False]])
def test_the_adapter_where_no_backend_is_ready(case, mask, ready):
    ready()
    if not case.biases:
        mask = [asked and i in (0, 1, 3, 5) for i, asked in enumerate(mask)]
    arguments, residual, options = adapter_arguments(case, torch.float64)
    forward = (*arguments, residual, *options)
    y, z, c = gpu.adapter_forward(*forward)
    for ours, fake in zip((y, z, c), ops._fake_gpu_adapter_forward(*forward), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
    seed, height, width, *rest = options
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    truth = reference.large_kernel_adapter(*leaves, residual, seed, (height, width), *rest)
    torch.testing.assert_close(y, truth)
    grad = torch.randn_like(truth)
    x, *weights = arguments
    backward = (grad, x, z, c, *weights, *options, False, mask)
    found = gpu.adapter_backward(*backward)
    for ours, fake in zip(found, ops._fake_gpu_adapter_backward(*backward), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
    wanted = [leaf for leaf, asked in zip(leaves, mask, strict=True) if asked]
    truths = torch.autograd.grad(truth, wanted, grad)
    ours = [t for t, asked in zip(found, mask, strict=True) if asked]
    for a, b in zip(ours, truths, strict=True):
        torch.testing.assert_close(a, b)
    if mask[0]:
        with_own = gpu.adapter_backward(*backward[:-2], True, mask)
        torch.testing.assert_close(with_own[0], found[0] + grad)


@pytest.mark.usefixtures("ready")
def test_each_direction_of_the_adapter_chooses(monkeypatch):
    served, asked = [], []

    def chosen(direction, *arguments):
        asked.append((direction, *arguments))
        return {"forward": "triton", "backward": "cuda"}[direction]

    monkeypatch.setattr(gpu_choice, "adapter_family", chosen)
    for family in ("triton", "cuda"):
        own = ops.AdapterOps(
            *(
                lambda *arguments, d=d, f=family: served.append((f, d, len(arguments)))
                for d in ("forward", "backward")
            )
        )
        monkeypatch.setitem(ops.ADAPTER, family, own)
    case = dataclasses.replace(AdapterCase(), prefix=1, dilation=2)
    (x, *weights), residual, options = adapter_arguments(case)
    gpu.adapter_forward(x, *weights, residual, *options)
    z = torch.zeros(2, case.r, 1 + math.prod(case.grid))
    gpu.adapter_backward(x, x, z, z, *weights, *options, False, [True] * 7)
    assert served == [("triton", "forward", 18), ("cuda", "backward", 22)]
    sizes = (False, 2, (4, 5), 6, 3, (3, 3), 2, 1, frozenset({"cuda", "triton"}))
    assert asked == [("forward", *sizes), ("backward", *sizes)]


def test_padding_uneven_in_one_side_is_uneven():
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 4, 3)
    y = gpu._torch_forward(x, weight, None, [1, 1], [1, 1, 2, 1], [1, 1], False)
    torch.testing.assert_close(y, F.conv2d(x, weight, padding="same", groups=2))
