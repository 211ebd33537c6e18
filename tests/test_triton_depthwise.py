"""Triton's depthwise_conv2d against float64: on a GPU, or in Triton's interpreter without."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import lay_out
from closeness import assert_close_to_truth

from lka_kernels import DepthwiseConv2d, available_backends, explain, ops, tiles, use_backend
from lka_kernels.backends import reference
from lka_kernels.backends.triton import device_type
from lka_kernels.functional import depthwise_conv2d

DEVICE = device_type()
STATUS = available_backends()["triton"]
pytestmark = [pytest.mark.skipif(STATUS != "ready", reason=STATUS)]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
# Triton's interpreter has no bfloat16.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
CORRELATIONS = ("direct", "patch", "dense")
WEIGHT_FORMS = ("direct", "rows", "dense")
# Name: batch, channels, map, kernel, padding (top, left, bottom, right), dilation, layout.
CALLS = {
    "same": ((2, 3, 5, 6), (3, 3), (1, 1, 1, 1), (1, 1), "contiguous"),
    "channels_last": ((2, 3, 5, 6), (3, 3), (1, 1, 1, 1), (1, 1), "channels_last"),
    "vectors": ((1, 2, 6, 16), (5, 5), (2, 2, 2, 2), (1, 1), "contiguous"),
    "several_columns": ((1, 1, 3, 40), (1, 9), (0, 4, 0, 4), (1, 1), "contiguous"),
    "even_kernel": ((2, 2, 6, 5), (4, 2), (1, 0, 2, 1), (1, 1), "sliced"),
    "uneven_padding": ((2, 2, 6, 5), (3, 2), (0, 4, 3, 1), (1, 1), "channels_last"),
    "dilated": ((2, 2, 8, 7), (3, 4), (2, 3, 2, 3), (2, 3), "transposed"),
    "no_padding": ((2, 1, 8, 9), (3, 4), (0, 0, 0, 0), (1, 1), "contiguous"),
    "larger_than_map": ((1, 2, 4, 5), (11, 13), (5, 6, 5, 6), (1, 1), "contiguous"),
    "row": ((2, 1, 3, 24), (1, 31), (0, 15, 0, 15), (1, 1), "contiguous"),
    "tall": ((1, 2, 12, 3), (17, 3), (8, 1, 8, 1), (1, 1), "channels_last"),
    "wide_padding": ((1, 2, 3, 3), (1, 1), (5, 4, 3, 2), (1, 1), "contiguous"),
    "no_tap_on_the_map": ((2, 2, 1, 1), (2, 2), (2, 2, 2, 2), (4, 4), "contiguous"),
    "empty": ((0, 2, 5, 5), (3, 3), (1, 1, 1, 1), (1, 1), "contiguous"),
}


class Arguments:
    """Tensors of a call in ``dtype`` and what it computes in float64."""

    def __init__(self, name: str, dtype: torch.dtype):
        shape, self.kernel, self.padding, self.dilation, layout = CALLS[name]
        generator = torch.Generator().manual_seed(0)
        self.channels_last = layout == "channels_last"
        self.input = lay_out(shape, layout, dtype, generator)
        self.weight = torch.randn(shape[1], 1, *self.kernel, generator=generator).to(dtype)
        self.bias = torch.randn(shape[1], generator=generator).to(dtype)
        wide = [t.double().requires_grad_() for t in (self.input, self.weight, self.bias)]
        output = reference.depthwise_conv2d(*wide, (1, 1), self.padding, self.dilation)
        self.grad_output = lay_out(tuple(output.shape), layout, dtype, generator)
        grads = torch.autograd.grad(output, wide, self.grad_output.double())
        names = ("grad_input", "grad_weight", "grad_bias")
        self.truth = {"output": output.detach(), **dict(zip(names, grads, strict=True))}
        taps = math.sqrt(math.prod(map(min, self.kernel, shape[2:])) + 1)
        terms = math.sqrt(max(1, output.numel() // shape[1]))
        self.magnitudes = {"output": taps, "grad_input": taps}
        self.magnitudes |= {"grad_weight": terms, "grad_bias": terms}
        for name in ("input", "weight", "bias", "grad_output"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    @property
    def geometry(self) -> tuple:
        return (1, 1), self.padding, self.dilation

    def check(self, **results) -> None:
        for name, result in results.items():
            truth = self.truth[name]
            assert_close_to_truth(
                name, result.cpu(), truth, truth.to(result.dtype), magnitude=self.magnitudes[name]
            )


@pytest.fixture(autouse=True)
def exact_products():
    """On a GPU, torch's default for convolutions in float32 is TF32."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    yield
    switch.fp32_precision = before


def plans():
    from lka_kernels.backends.triton import depthwise

    return depthwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", CORRELATIONS)
def test_forward_and_backward_input(form, name, dtype):
    a = Arguments(name, dtype)
    size = list(a.input.shape[2:])
    output = plans().forward(a.input, a.weight, a.bias, *a.geometry, a.channels_last, form)
    grad_input = plans().backward_input(
        a.grad_output, a.weight, size, *a.geometry, not a.channels_last, form
    )
    a.check(output=output, grad_input=grad_input)
    assert output.is_contiguous(memory_format=ops.memory_format(a.channels_last))
    assert grad_input.is_contiguous(memory_format=ops.memory_format(not a.channels_last))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_backward_weight(form, name, dtype):
    a = Arguments(name, dtype)
    grads = plans().backward_weight(a.grad_output, a.input, list(a.kernel), *a.geometry, form)
    a.check(grad_weight=grads[0], grad_bias=grads[1])


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize("num_sms", [1, 2])
def test_weight_gradients_of_groups_of_images(form, num_sms, monkeypatch):
    """Partial sums of several images, the last group with fewer; a second run gives the same."""
    CALLS["groups"] = ((5, 1, 4, 4), (3, 3), (1, 1, 1, 1), (1, 1), "contiguous")
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: num_sms)
    a = Arguments("groups", torch.float32)
    del CALLS["groups"]
    arguments = (a.grad_output, a.input, [3, 3], *a.geometry, form)
    groups = 3 if num_sms == 1 else 5
    launches, _ = plans().plan_backward_weight(*arguments)
    assert launches[0].arguments[2].shape[0] == groups
    grads = plans().backward_weight(*arguments)
    a.check(grad_weight=grads[0], grad_bias=grads[1])
    assert all(map(torch.equal, grads, plans().backward_weight(*arguments)))


def launch(plan, a, form):
    """Plan forward or backward-weight of ``a``."""
    if plan == "forward":
        return plans().plan_forward(a.input, a.weight, a.bias, *a.geometry, False, form)
    return plans().plan_backward_weight(a.grad_output, a.input, list(a.kernel), *a.geometry, form)


@pytest.mark.parametrize(
    ("plan", "form"),
    [
        *(("forward", form) for form in CORRELATIONS),
        *(("weight", form) for form in WEIGHT_FORMS),
    ],
)
def test_positions_beyond_int32(plan, form):
    """The path for maps of more than 2^31 positions or elements, on a map of few."""
    a = Arguments("same", torch.float32)
    launches, results = launch(plan, a, form)
    constants = launches[0].constants
    other = {"WIDE": True, "NARROW": False}
    wide = launches[0]._replace(
        constants={name: other.get(name, value) for name, value in constants.items()}
    )
    plans().run([wide, *launches[1:]], a.input.device)
    if plan == "forward":
        a.check(output=results)
    else:
        a.check(grad_weight=results[0], grad_bias=results[1])


def test_plans_of_large_maps_number_positions_in_int64():
    dtype = torch.float16
    x = torch.empty(1, 1, 20_000, 120_000, dtype=dtype, device="meta")
    w, b = (torch.empty(s, dtype=dtype, device="meta") for s in ((1, 1, 3, 3), (1,)))
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    images = x.expand(8, 1, -1, -1)
    (direct,), _ = plans().plan_forward(images, w, b, *geometry, False, "direct")
    assert direct.constants["WIDE"]
    launches, _ = plans().plan_backward_weight(x, x, [3, 3], *geometry, "direct")
    assert launches[0].constants["WIDE"]
    (patch,), _ = plans().plan_forward(images, w, b, *geometry, False, "patch")
    launches, _ = plans().plan_backward_weight(x, x, [3, 3], *geometry, "rows")
    assert not patch.constants["NARROW"]
    assert not launches[0].constants["NARROW"]


@pytest.mark.parametrize("family", ["triton", "triton_direct", "triton_gemm"])
def test_opcheck(family):
    operators = ops.DEPTHWISE[family]
    x = torch.randn(2, 2, 5, 4, device=DEVICE)
    if family == "triton":
        x = x.contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(2, 1, 3, 2, device=DEVICE), torch.randn(2, device=DEVICE)
    geometry = ([1, 1], [1, 1, 1, 0], [1, 1])
    channels_last = family == "triton"
    y = operators.forward(x, w, b, *geometry, channels_last)
    torch.library.opcheck(operators.forward, (x, w, b, *geometry, channels_last))
    torch.library.opcheck(operators.backward_input, (y, w, [5, 4], *geometry, channels_last))
    torch.library.opcheck(operators.backward_weight, (y, x, [3, 2], *geometry))


@pytest.mark.parametrize("method", ["auto", "direct", "implicit_gemm"])
def test_public_function_twice_differentiable(method):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 5, 6), (2, 1, 3, 3), (2,))
    given = [torch.randn(shape, generator=generator) for shape in shapes]

    def derivatives(function, dtype, device="cpu"):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in given]
        y = function(*leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return y, *first, *second

    truths = derivatives(lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), torch.float64)
    theirs = derivatives(lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), torch.float32)
    with use_backend("triton"):
        ours = derivatives(
            lambda x, w, b: depthwise_conv2d(x, w, b, padding=1, method=method),
            torch.float32,
            DEVICE,
        )
    for i, (result, truth, other) in enumerate(zip(ours, truths, theirs, strict=True)):
        assert_close_to_truth(
            f"derivative {i}", result.detach().cpu(), truth.detach(), other.detach()
        )


def call(**changes) -> dict:
    given = {"input": torch.zeros(2, 4, 9, 9), "weight": torch.zeros(4, 1, 3, 3)}
    given |= changes
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


REFUSED = {
    "stride": (call(stride=2), r"serves stride 1; stride is \(2, 2\)"),
    "float64": (
        {name: t.double() for name, t in call().items()},
        "serves float32, bfloat16, float16; input is torch.float64",
    ),
    "three dimensions": (call(input=torch.zeros(4, 9, 9)), "input has 3 dimensions"),
    "multiplier": (call(weight=torch.zeros(8, 1, 3, 3)), "8 filters for 4 channels"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_give_the_reason(why):
    arguments, message = REFUSED[why]
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        depthwise_conv2d(**arguments)
    with pytest.raises(ValueError, match=f"method='implicit_gemm' cannot serve.*{message}"):
        depthwise_conv2d(**arguments, method="implicit_gemm")


def test_the_method_is_another_backends():
    with use_backend("torch"), pytest.raises(ValueError, match="backend 'torch' has none"):
        depthwise_conv2d(**call(), method="implicit_gemm")


def test_explain():
    with use_backend("triton"):
        assert explain(**call()).startswith("backend=triton method=auto: asked for by use_backend")
        assert explain(**call(), method="direct").startswith("backend=triton method=direct")
    text = explain(**call(), method="implicit_gemm")
    assert text.startswith("backend=triton method=implicit_gemm")
    assert not explain(**call()).startswith("backend=triton")


def test_module():
    module = DepthwiseConv2d(2, 3, padding=1, method="implicit_gemm", device=DEVICE)
    x = torch.randn(1, 2, 4, 4, device=DEVICE)
    truth = F.conv2d(x, module.weight, module.bias, padding=1, groups=2)
    torch.testing.assert_close(module(x), truth)


def correlation(map_size: int, kernel: int, batch: int = 64) -> tiles.Correlation:
    touching = min(kernel, 2 * map_size - 1)
    return tiles.Correlation(
        batch=batch,
        channels=384,
        size=(map_size, map_size),
        out_size=(map_size, map_size),
        taps=(touching, touching),
        dilation=(1, 1),
        vector=8 if map_size % 8 == 0 else 2 if map_size % 2 == 0 else 1,
        slack=0,
        itemsize=2,
        num_sms=132,
    )


@pytest.mark.parametrize(
    ("map_size", "kernel", "form"),
    [
        (56, 1, "direct"),
        (56, 7, "patch"),
        (56, 31, "patch"),
        (56, 51, "patch"),
        (14, 27, "dense"),
        (7, 13, "dense"),
    ],
)
def test_sizes_choose_the_form(map_size, kernel, form):
    call = correlation(map_size, kernel)
    assert tiles.correlation_form(call, torch.bfloat16, True) == form
    assert tiles.correlation_form(call, torch.bfloat16, False) == "direct"
    assert tiles.correlation_form(call, torch.float32, True) == "direct"


@pytest.mark.parametrize("kernel", [1, 7, 31, 91])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_tiles_are_ones_that_the_kernels_take(kernel, batch):
    call = correlation(56, kernel, batch)
    patch = tiles.patch_tiles(call)
    assert patch.window % patch.block_k == 0
    assert patch.window >= patch.bx + call.taps[1] - 1 + call.slack
    weight = tiles.weight_gemm_tiles(call.taps, 1, 8, 7, 56, 2)
    assert weight.window > weight.bx + call.taps[1] - 1 + 7  # the last column is one of ones
    assert weight.rows * weight.bx >= 16


def test_a_map_too_high_for_matrix_products_takes_the_direct_form():
    x = torch.empty(1, 1, 40_000, 8, dtype=torch.float16, device="meta")
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    launches, _ = plans().plan_backward_weight(x, x, [3, 3], *geometry, "rows")
    assert "WINDOW" not in launches[0].constants


def test_weight_gradients_of_small_maps_are_dense():
    for size, constant in ((7, "BLOCK_T"), (8, "WINDOW")):
        x = torch.empty(64, 16, size, size, dtype=torch.float16, device="meta")
        geometry = ((1, 1), (3, 3, 3, 3), (1, 1))
        for form in ("auto", "gemm"):
            launches, _ = plans().plan_backward_weight(x, x, [7, 7], *geometry, form)
            assert constant in launches[0].constants


def test_a_kernel_too_wide_for_matrix_products_takes_the_direct_form():
    assert tiles.weight_gemm_tiles((3, 91), 9, 8, 0, 56, 2) is None


def names_of(launches) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call[4] != "contiguous"])
@pytest.mark.parametrize("form", ["gemm", "auto"])
def test_channels_last_as_planes(name, dtype, form, monkeypatch):
    """Also maps that go from one layout to the other, as gradients may."""
    monkeypatch.setattr(tiles, "correlation_moves", lambda *a: True)
    monkeypatch.setattr(tiles, "weight_moves", lambda *a: True)
    a = Arguments(name, dtype)
    for channels_last in (True, False):
        output = plans().forward(a.input, a.weight, a.bias, *a.geometry, channels_last, form)
        grad_input = plans().backward_input(
            a.grad_output, a.weight, list(a.input.shape[2:]), *a.geometry, channels_last, form
        )
        layout = ops.memory_format(channels_last)
        assert output.is_contiguous(memory_format=layout)
        assert grad_input.is_contiguous(memory_format=layout)
        grad_output = a.grad_output.contiguous(memory_format=layout)
        grads = plans().backward_weight(grad_output, a.input, list(a.kernel), *a.geometry, form)
        a.check(output=output, grad_input=grad_input, grad_weight=grads[0], grad_bias=grads[1])


def test_channels_last_moves_only_where_it_pays():
    def forward(batch, channels, side, k, dtype=torch.bfloat16, form="auto"):
        shape = (batch, channels, side, side)
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        weight = torch.empty(channels, 1, k, k, dtype=dtype, device="meta")
        geometry = ((1, 1), (k // 2,) * 4, (1, 1))
        first = plans().plan_forward(x, weight, None, *geometry, True, form)[0]
        return names_of(first), names_of(
            plans().plan_backward_weight(x, x, [k, k], *geometry, form)[0]
        )

    moved = ["move_planes", "correlate_patch", "move_planes"]
    moved_too = ["move_planes", "move_planes", "backward_weight_rows", "sum_partials"]
    in_place = ["correlate_direct"], ["backward_weight_direct", "sum_partials"]
    assert forward(64, 128, 56, 31) == (moved, moved_too)
    assert forward(64, 128, 56, 31, form="direct") == in_place
    assert forward(64, 128, 56, 31, dtype=torch.float32) == in_place
    assert forward(64, 64, 56, 3) == in_place
    assert forward(1, 768, 14, 7) == in_place


def test_nothing_is_allocated_to_decide_that_nothing_moves():
    x = torch.randn(1, 768, 14, 14).to(torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(768, 1, 7, 7).to(torch.float16)
    geometry = ((1, 1), (3, 3, 3, 3), (1, 1))
    allocated = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is torch.ops.aten.empty.memory_format and result.device.type != "meta":
                allocated.append(tuple(result.shape))
            return result

    with Count():
        launches, _ = plans().plan_forward(x.to(DEVICE), weight.to(DEVICE), None, *geometry, True)
    assert names_of(launches) == ["correlate_direct"]
    assert allocated.count(tuple(x.shape)) == 1  # the result


def test_an_expanded_gradient_does_not_keep_the_weight_gradient_from_moving():
    shape = (64, 128, 56, 56)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    grad = torch.empty((), dtype=torch.bfloat16, device="meta").expand(shape)
    launches, _ = plans().plan_backward_weight(grad, x, [31, 31], (1, 1), (15,) * 4, (1, 1))
    assert names_of(launches) == ["move_planes", "backward_weight_rows", "sum_partials"]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_products_of_float32_follow_the_switch_of_convolutions(precision):
    torch.backends.cudnn.conv.fp32_precision = precision
    x = torch.empty(2, 3, 16, 16, device="meta")
    weight = torch.empty(3, 1, 7, 7, device="meta")
    geometry = ((1, 1), (3, 3, 3, 3), (1, 1))
    (launch,), _ = plans().plan_forward(x, weight, None, *geometry, False, "patch")
    assert launch.constants["PRECISION"] == precision


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 16)])
@pytest.mark.parametrize("channels", [2, 5, 70])
def test_planes_and_back(size, channels):
    from lka_kernels.backends.triton.depthwise_planes import as_planes, move

    x = torch.randn(3, *size, 2 * channels, device=DEVICE).permute(0, 3, 1, 2)[:, :channels]
    planes = as_planes(x)
    plans().run(move(x, planes), x.device)
    back = torch.full_like(x, float("nan"))
    plans().run(move(planes, back) if planes is not x else [], x.device)
    assert torch.equal(planes, x)
    assert planes is x or torch.equal(back, x)


@pytest.mark.parametrize("form", ["direct", "gemm"])
def test_the_summed_pair_is_one_pass(form):
    """A large and a small kernel on one input, docs/adapters.md: no launch for the small one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 6, 8, generator=generator).to(DEVICE)
    large = torch.randn(2, 1, 11, 9, generator=generator).to(DEVICE)
    small = torch.randn(2, 1, 3, 5, generator=generator).to(DEVICE)
    leaves = [t.requires_grad_() for t in (x, large, small)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = sum(F.conv2d(wide[0], w, padding="same", groups=2) for w in wide[1:])
    method = {"direct": "direct", "gemm": "implicit_gemm"}[form]
    with use_backend("triton"):
        y = depthwise_conv2d(x, large + F.pad(small, (2, 2, 4, 4)), padding="same", method=method)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    truths = torch.autograd.grad(truth, wide, torch.ones_like(truth))
    for found, expected in zip((y, *grads), (truth, *truths), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    geometry = ((1, 1), (5, 4, 5, 4), (1, 1))
    arguments = (x.detach(), large.detach(), None, *geometry, False, form)
    assert len(plans().plan_forward(*arguments)[0]) == 1
