"""The adapter's Triton kernels: in Triton's interpreter where there is no GPU, else on it."""

import dataclasses

import pytest
import torch
from adapter_cases import DEFINED, AdapterCase, adapter_cases, call, check_backend, with_gradients
from hypothesis import given, settings

from lka_kernels import FusedLKA, available_backends, ops, philox, tiles, use_backend
from lka_kernels.backends.triton import device_type
from lka_kernels.backends.triton.launch import dot_precision
from lka_kernels.functional import large_kernel_adapter

DEVICE = device_type()
STATUS = available_backends()["triton"]
pytestmark = [pytest.mark.skipif(STATUS != "ready", reason=STATUS)]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
# Triton's interpreter has no bfloat16.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def names(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_two_launches(monkeypatch):
    """The forward of calls so small takes one launch by itself."""
    monkeypatch.setattr(tiles, "one_launch_tiles", lambda *a: None)


def in_one_launch(monkeypatch, **changes):
    """Also where two are estimated to be faster, with ``changes`` of the tiles."""
    choose = tiles.one_launch_tiles

    def forced(batch, tokens, dim, r, *others):
        chosen = choose(batch, tokens, dim, r, *others)
        if chosen is None:
            # Tiles of a few tokens of as few channels serve any call.
            chosen = tiles.OneLaunchTiles(16, 32, 32, 32, tiles.ceil_div(dim, 32), 8, 2, 0.0)
        return chosen._replace(**changes)

    monkeypatch.setattr(tiles, "one_launch_tiles", forced)


def with_convolution_apart(monkeypatch):
    """As calls of many tokens have it."""
    choose = tiles.adapter_tiles
    monkeypatch.setattr(
        tiles, "adapter_tiles", lambda *a, **k: choose(*a, **k)._replace(convolve_apart=True)
    )
    in_two_launches(monkeypatch)


FORWARDS = {
    "one launch": in_one_launch,
    "two launches": in_two_launches,
    "convolution apart": with_convolution_apart,
}


@pytest.mark.parametrize("launches", FORWARDS)
@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_equals_the_specification(case, launches, monkeypatch):
    FORWARDS[launches](monkeypatch)
    check_backend(case, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("launches", FORWARDS)
@pytest.mark.parametrize("case", DEFINED[:6], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=names)
def test_equals_the_specification_in_16_bits(case, dtype, launches, monkeypatch):
    FORWARDS[launches](monkeypatch)
    check_backend(case, dtype, "triton", DEVICE)


@settings(max_examples=25)
@given(adapter_cases(most_channels=70, longest_side=6, largest_kernel=9))
def test_any_call(case):
    check_backend(case, torch.float32, "triton", DEVICE)


@settings(max_examples=15)
@given(adapter_cases(most_channels=70, longest_side=6, largest_kernel=9))
def test_any_call_in_float16(case):
    check_backend(case, torch.float16, "triton", DEVICE)


# Every way through the launches, on shapes that would not choose it by themselves.
PATHS = {
    "convolution in the up-projection": {"convolve_apart": False},
    "convolution apart": {"convolve_apart": True},
    "weights' gradients apart": {"weights_apart": True},
    "all of these apart": {"weights_apart": True, "convolve_apart": True},
    "weights' gradients with the rest": {"weights_apart": False},
    "channels split over programs": {"blocks_of_c": 1, "convolve_apart": False, "block_c": 16},
    "several tiles of tokens": {"block_t": 16},
    "kernel rows in pieces": {"unroll": 2},
    "kernel rows whole": {"unroll": 5},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    "case",
    [
        AdapterCase(2, 40, 12, (5, 4), (5, 5), prefix=1, dropout=0.3, residual=True, scale=0.5),
        AdapterCase(3, 37, 7, (3, 6), (3, 4), position="both", dilation=2, layout="channels_first"),
    ],
    ids=["center_tap", "channels_first"],
)
def test_every_path(path, dtype, case, monkeypatch):
    choose = tiles.adapter_tiles

    def forced(*arguments, **options):
        return choose(*arguments, **options)._replace(**PATHS[path])

    monkeypatch.setattr(tiles, "adapter_tiles", forced)
    in_two_launches(monkeypatch)
    check_backend(case, dtype, "triton", DEVICE)


# More than one tile of tokens, window of tokens and block of channels.
LARGER = [
    AdapterCase(2, 40, 12, (5, 8), (5, 3), prefix=1, dropout=0.3, residual=True, scale=0.5),
    AdapterCase(2, 37, 7, (6, 9), (3, 4), position="both", dilation=2, layout="channels_first"),
    AdapterCase(2, 34, 16, (7, 7), (3, 3), prefix=19, prefix_mode="skip", position="post"),
    AdapterCase(1, 33, 5, (6, 6), (6, 2), prefix=2, prefix_mode="zero", layout="sliced"),
]


@pytest.mark.parametrize("block_w", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_several_tiles_in_one_launch(case, dtype, block_w, monkeypatch):
    in_one_launch(monkeypatch, block_t=16, block_w=block_w, block_c=16, block_up=32, blocks_of_c=2)
    check_backend(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_one_launch_keeps_what_two_keep(case, monkeypatch):
    """y, z and c, which backward reads; on a GPU the products' tiles differ, and their rounding."""
    x, weights, residual, options = _operator_arguments(dataclasses.replace(case, residual=True))
    results = []
    for force in (in_one_launch, in_two_launches):
        with monkeypatch.context() as patch:
            force(patch)
            results.append(ops.ADAPTER["triton"].forward(x, *weights, residual, *options))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_one_launch_only_where_it_pays():
    def chosen(batch, tokens, dim, r, kernel, dtype=torch.bfloat16, num_sms=132):
        taps, reach = (kernel, kernel), kernel // 2 * 30
        return tiles.one_launch_tiles(batch, tokens, dim, r, taps, reach, dtype, num_sms)

    assert chosen(1, 197, 384, 8, 7) is not None
    assert chosen(1, 197, 1024, 8, 7) is not None
    assert chosen(64, 197, 1024, 8, 7) is None  # every multiprocessor is busy
    assert chosen(1, 785, 1024, 8, 27) is None  # each program would read most of the image
    assert chosen(1, 197, 384, 32, 7) is None  # larger ranks have launches of their own
    assert chosen(0, 197, 384, 8, 7) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 49, 197, 784])
@pytest.mark.parametrize("dim", [1, 96, 1536])
@pytest.mark.parametrize("r", [1, 8, 16])
def test_tiles_of_one_launch_cover_the_call(dtype, tokens, dim, r):
    t = tiles.one_launch_tiles(1, tokens, dim, r, (3, 3), 60, dtype, 132)
    if t is None:
        return
    assert t.block_up * t.blocks_of_c >= dim
    assert min(t.block_t, t.block_w, t.block_c, t.block_up) >= 16
    # Stages of x and down_weight, within what 8.6 gives a program.
    staged = t.num_stages * (t.block_w + 16) * t.block_c * dtype.itemsize
    assert staged <= 80 * 1024


def test_large_rank():
    check_backend(AdapterCase(1, 20, 130, (3, 3), (3, 3)), torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 25, 7), (2, 16, 33), (3, 9, 64)])
def test_dropout_is_that_of_every_backend(shape):
    x = torch.ones(shape, device=DEVICE)
    r = shape[-1]
    eye = torch.eye(r, device=DEVICE)
    tap = torch.ones(r, 1, 1, 1, device=DEVICE)
    torch.manual_seed(11)
    with use_backend("triton"):
        y = large_kernel_adapter(
            x, eye, None, tap, None, eye, None, activation="none", dropout_p=0.3, training=True,
            grid_size=(1, shape[1]),
        )  # fmt: skip
    torch.manual_seed(11)
    expected = philox.dropout_multiplier(philox.new_seed(x.device), shape, 0.3)
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (5,), (6,), (2, 4, 6), (0, 5)])
@pytest.mark.parametrize("apart", [(False, False), (False, True), (True, False), (True, True)])
def test_only_the_gradients_asked_for(wanted, apart, monkeypatch):
    choose = tiles.adapter_tiles
    changes = dict(zip(("weights_apart", "convolve_apart"), apart, strict=True))
    monkeypatch.setattr(tiles, "adapter_tiles", lambda *a, **k: choose(*a, **k)._replace(**changes))
    case = AdapterCase(dropout=0.2, position="both", prefix=1)
    tensors = {k: t.to(DEVICE) for k, t in case.tensors(torch.float32).items() if t is not None}
    leaves = list(tensors.values())
    grad = torch.randn(tensors["x"].shape, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index in wanted)
        with use_backend(backend):
            y = call(case, {**tensors, "residual": None})
        results.append(torch.autograd.grad(y, [leaves[i] for i in wanted], grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_same_bits_twice():
    case = AdapterCase(3, 20, 8, (4, 5), (3, 3), prefix=1, dropout=0.1, residual=True)
    tensors = {k: t.to(DEVICE) for k, t in case.tensors(torch.float32).items()}
    grad = torch.randn(tensors["x"].shape, device=DEVICE)
    with use_backend("triton"):
        first, second = (with_gradients(call, case, tensors, grad) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_x_as_its_own_residual():
    x = torch.randn(2, 10, 20, device=DEVICE, requires_grad=True)
    module = FusedLKA(20, 4, 3, init="paper", num_prefix_tokens=1, prefix_mode="zero")
    module = module.to(DEVICE)
    grad = torch.randn_like(x)
    results = []
    for residual in (x, x.view_as(x)):
        with use_backend("triton"):
            y = module(x, residual=residual)
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], grad)])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_channels_first_keeps_its_layout():
    module = FusedLKA(20, 4, 3, init="paper", data_format="channels_first").to(DEVICE)
    x = torch.randn(2, 20, 4, 5, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        y = module(x, residual=x.detach())
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous()
    assert grad.is_contiguous()
    with use_backend("torch"):
        expected = module(x, residual=x.detach())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    """They run through the reference, with the same dropout."""
    case = AdapterCase(1, 5, 3, (3, 2), (3, 3), dropout=0.3, position="both")
    tensors = {k: t.to(DEVICE) for k, t in case.tensors(torch.float32).items() if t is not None}
    results = []
    for backend in ("torch", "triton"):
        x = tensors["x"].clone().requires_grad_()
        with use_backend(backend):
            y = call(case, {**tensors, "x": x, "residual": None})
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def _operator_arguments(case, dtype=torch.float32):
    tensors = {k: t.to(DEVICE) for k, t in case.tensors(dtype).items()}
    *tensors, residual = tensors.values()
    x = tensors[0].flatten(1, 2) if tensors[0].dim() == 4 else tensors[0]
    residual = residual.reshape(x.shape)
    options = (
        philox.new_seed(x.device), *case.grid, case.prefix, case.prefix_mode, case.dilation,
        case.activation, case.position, case.dropout, case.scale,
    )  # fmt: skip
    return x, tensors[1:], residual, options


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_opcheck(layout):
    case = AdapterCase(
        r=4, grid=(3, 4), dropout=0.2, residual=True, layout=layout,
        prefix=1 if layout == "tokens" else 0,
    )  # fmt: skip
    x, weights, residual, options = _operator_arguments(case)
    operators = ops.ADAPTER["triton"]
    torch.library.opcheck(operators.forward, (x, *weights, residual, *options))
    y, z, c = operators.forward(x, *weights, residual, *options)
    for mask in ([True] * 7, [False, True] * 3 + [True]):
        torch.library.opcheck(
            operators.backward, (torch.randn_like(y), x, z, c, *weights, *options, False, mask)
        )


def test_compile_without_graph_break():
    module = FusedLKA(16, 4, 3, init="paper", dropout=0.1).to(DEVICE)
    x = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    results = []
    with use_backend("triton"):
        for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(2)
            y = function(x)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_autocast():
    module = FusedLKA(16, 4, 3, init="paper").to(DEVICE)
    x = torch.randn(2, 9, 16, device=DEVICE)
    with use_backend("triton"), torch.autocast(DEVICE, torch.float16):
        y = module(x)
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_biases_with_any_strides():
    case = AdapterCase(dim=6, r=3)
    tensors = {
        k: None if t is None else t.to(DEVICE) for k, t in case.tensors(torch.float32).items()
    }
    strided = dict(tensors)
    for name in ("down_bias", "conv_bias"):
        strided[name] = torch.stack([tensors[name], tensors[name] + 9], dim=1)[:, 0]
    strided["up_bias"] = tensors["up_bias"][:1].expand(6)
    with use_backend("torch"):
        expected = call(case, strided)
    with use_backend("triton"):
        torch.testing.assert_close(call(case, strided), expected, rtol=1e-5, atol=1e-5)


def test_precision_follows_the_newer_switch():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            switch.fp32_precision = precision
            assert dot_precision(torch.float32, switch) == precision
            assert dot_precision(torch.bfloat16, switch) == "ieee"
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "it serves float32, bfloat16, float16; x is torch.float64"),
        ({"r": tiles.MOST_RANK + 1}, "a rank r of at most 256; down_weight has 257"),
    ],
)
def test_what_it_cannot_serve(changes, message):
    dtype = changes.pop("dtype", torch.float32)
    case = dataclasses.replace(AdapterCase(), **changes)
    tensors = {k: None if t is None else t.to(DEVICE) for k, t in case.tensors(dtype).items()}
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        call(case, tensors)
