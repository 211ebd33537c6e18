"""large_kernel_adapter: the specification against the definition, the fused kernels against it."""

import dataclasses
import math

import pytest
import torch
from adapter_cases import (
    DEFINED,
    NAMES,
    AdapterCase,
    adapter_cases,
    call,
    check_backend,
    with_gradients,
)
from closeness import assert_close_to_truth
from hypothesis import given, settings

from lka_kernels import FusedLKA, philox, use_backend
from lka_kernels.checks import FLOAT_DTYPES
from lka_kernels.functional import large_kernel_adapter

# --- the definition, written out --------------------------------------------------------------


def activate(x, name):
    """Each activation from its formula."""
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if name == "relu":
        return torch.where(x > 0, x, 0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return x


def convolve(images, weight, bias, dilation):
    """images (B, H, W, r), one shifted product per tap; zeros outside."""
    _, height, width, _ = images.shape
    before = [dilation * (k - 1) // 2 for k in weight.shape[2:]]
    result = torch.zeros_like(images)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            down, right = i * dilation - before[0], j * dilation - before[1]
            for y in range(max(0, -down), min(height, height - down)):
                left, end = max(0, -right), min(width, width - right)
                if left < end:
                    result[:, y, left:end] = (
                        result[:, y, left:end]
                        + images[:, y + down, left + right : end + right] * weight[:, 0, i, j]
                    )
    return result if bias is None else result + bias


def definition(case: AdapterCase, t: dict):
    """The adapter as api and paper define it, without any of the library but its dropout."""
    torch.manual_seed(7)
    x = t["x"].flatten(1, 2) if t["x"].dim() == 4 else t["x"]
    z = torch.einsum("bnc,rc->bnr", x, t["down_weight"])
    z = z if t["down_bias"] is None else z + t["down_bias"]
    a = activate(z, case.activation) if case.position in ("pre", "both") else z
    images = a[:, case.prefix :].reshape(case.batch, *case.grid, case.r)
    c = [convolve(images, t["conv_weight"], t["conv_bias"], case.dilation).flatten(1, 2)]
    for i in reversed(range(case.prefix)):
        token = a[:, i]
        if case.prefix_mode != "skip":
            image = token.reshape(case.batch, 1, 1, case.r)
            image = convolve(image, t["conv_weight"], t["conv_bias"], case.dilation)
            token = image.reshape(case.batch, case.r)
        c.insert(0, token[:, None])
    c = torch.cat(c, 1)
    e = activate(c, case.activation) if case.position in ("post", "both") else c
    if case.dropout:
        e = e * philox.dropout_multiplier(philox.new_seed(e.device), e.shape, case.dropout)
    y = torch.einsum("bnr,cr->bnc", e, t["up_weight"])
    y = y if t["up_bias"] is None else y + t["up_bias"]
    if case.prefix_mode == "zero":
        is_grid = torch.arange(y.shape[1]) >= case.prefix
        y = torch.where(is_grid[:, None], y, 0)
    y = (case.scale * y).reshape(t["x"].shape)
    return y if t["residual"] is None else t["residual"] + y


@pytest.mark.parametrize("case", DEFINED, ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_equals_the_definition(case, backend):
    tensors = case.tensors(torch.float64)
    grad_output = torch.randn(tensors["x"].shape, dtype=torch.float64)
    with use_backend(backend):
        ours = with_gradients(call, case, tensors, grad_output)
    truth = with_gradients(definition, case, tensors, grad_output)
    for name, value in ours.items():
        assert_close_to_truth(
            name, value, truth[name], magnitude=case.magnitudes[name], absolute=16.0
        )


# --- the fused kernels against the specification ----------------------------------------------


@pytest.mark.usefixtures("compiled_cpu")
class TestFused:
    """The compiled kernels."""

    @settings(max_examples=200)
    @given(adapter_cases())
    def test_float32(self, case):
        check_backend(case, torch.float32, "cpu")

    @settings(max_examples=100)
    @given(adapter_cases())
    def test_float64(self, case):
        check_backend(case, torch.float64, "cpu")

    @settings(max_examples=100)
    @given(adapter_cases())
    def test_bfloat16(self, case):
        check_backend(case, torch.bfloat16, "cpu")

    @settings(max_examples=100)
    @given(adapter_cases())
    def test_float16(self, case):
        check_backend(case, torch.float16, "cpu")


# --- dropout ----------------------------------------------------------------------------------


def bare_dropout(x, p, **options):
    """An adapter that does nothing but its dropout: identity projections, one tap of 1."""
    r = x.shape[-1]
    eye = torch.eye(r, dtype=x.dtype)
    tap = torch.ones(r, 1, 1, 1, dtype=x.dtype)
    options = {"activation": "none", "training": True, **options}
    return large_kernel_adapter(x, eye, None, tap, None, eye, None, dropout_p=p, **options)


BACKENDS = ("torch", "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_backward_replays_the_mask_of_forward(backend, dtype):
    x = torch.ones(3, 25, 7, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        y = bare_dropout(x, 0.25)
        (grad,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    assert 0.5 < kept.double().mean() < 0.95
    assert torch.equal(kept, grad != 0)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert torch.equal(grad[kept], y[kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_follows_manual_seed(backend):
    x = torch.ones(2, 16, 33)
    with use_backend(backend):
        torch.manual_seed(5)
        first, second = bare_dropout(x, 0.5), bare_dropout(x, 0.5)
        torch.manual_seed(5)
        again = bare_dropout(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 25, 7), (2, 16, 33), (5, 9, 64)])
def test_dropout_is_the_same_on_every_backend(shape):
    x = torch.ones(shape)
    masks = []
    for backend in ("torch", "cpu"):
        torch.manual_seed(11)
        with use_backend(backend):
            masks.append(bare_dropout(x, 0.3))
    assert torch.equal(*masks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(backend, p):
    x = torch.ones(8, 256, 16)
    with use_backend(backend):
        y = bare_dropout(x, p)
    n = y.numel()
    kept = float((y != 0).double().mean())
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    # No channel, token or image is preferred.
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        share = (y != 0).double().mean(others)
        assert (share - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) * y.shape[dim] / n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_in_evaluation(backend):
    x = torch.randn(2, 9, 4)
    before = torch.get_rng_state()
    with use_backend(backend):
        assert torch.equal(bare_dropout(x, 0.9, training=False), x)
    assert torch.equal(torch.get_rng_state(), before)


# --- derivatives ------------------------------------------------------------------------------

SMALL = AdapterCase(
    1, 3, 2, (3, 2), (2, 3), prefix=1, dilation=2, position="both", dropout=0.3, residual=True,
    scale=0.5,
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu_tanh", "position": "pre", "prefix_mode": "skip"},
        {"activation": "silu", "position": "post", "prefix_mode": "zero"},
        {"activation": "none", "biases": False, "residual": False},
    ],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(backend, changes):
    case = dataclasses.replace(SMALL, **changes)
    tensors = {k: t for k, t in case.tensors(torch.float64).items() if t is not None}
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def function(*values):
        given = dict.fromkeys(NAMES) | dict(zip(names, values, strict=True))
        return call(case, given)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.usefixtures("compiled_cpu")
def test_gradients_that_are_not_asked_for_are_not_computed(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    masks = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "large_kernel_adapter_backward" in str(function):
                masks.append(args[-1])
            return function(*args, **(kwargs or {}))

    tensors = SMALL.tensors(torch.float32)
    asked = ("conv_weight", "up_bias")
    for name in asked:
        tensors[name].requires_grad_()
    with Record():
        call(SMALL, tensors).sum().backward()
    assert masks == [[name in asked for name in NAMES[:7]]]
    assert all((t.grad is not None) == (name in asked) for name, t in tensors.items())


@pytest.mark.usefixtures("compiled_cpu")
def test_same_bits_with_any_number_of_threads():
    case = AdapterCase(4, 48, 8, (14, 14), (7, 7), prefix=1, dropout=0.1, residual=True)
    tensors = case.tensors(torch.float32)
    grad_output = torch.randn(tensors["x"].shape)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(with_gradients(call, case, tensors, grad_output))
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


# --- layouts, dtypes, errors ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_linear(backend):
    case = dataclasses.replace(SMALL, dropout=0.0)
    tensors = case.tensors(torch.float32)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        with_residual = call(case, tensors)
        without = call(case, {**tensors, "residual": None})
    assert without.dtype == torch.bfloat16
    # A float32 residual is not rounded.
    assert with_residual.dtype == torch.float32
    assert torch.equal(with_residual, tensors["residual"] + without)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gradients_have_the_dtype_of_their_leaves(backend):
    tensors = {k: t.requires_grad_() for k, t in SMALL.tensors(torch.float32).items()}
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        output = call(SMALL, tensors)
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


def test_square_grid_is_found():
    case = AdapterCase(grid=(5, 5), prefix=1)
    tensors = case.tensors(torch.float32)
    *arguments, _ = tensors.values()
    named = large_kernel_adapter(*arguments, grid_size=(5, 5), num_prefix_tokens=1)
    assert torch.equal(named, large_kernel_adapter(*arguments, num_prefix_tokens=1))


def test_prefix_tokens_do_not_reach_the_grid():
    case = AdapterCase(prefix=2, kernel=(5, 5))
    tensors = case.tensors(torch.float32)
    before = call(case, tensors)
    tensors["x"][:, :2] += 1
    after = call(case, tensors)
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert not torch.equal(before[:, :2], after[:, :2])


BAD = [
    ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \(B, P\+N, C\).*got \(2, 3\)"),
    ({"x": [1.0]}, TypeError, "x must be a Tensor; got list"),
    ({"x": torch.zeros(2, 4, 6).to_sparse()}, TypeError, "x must have layout torch.strided; got"),
    ({"x": torch.zeros(2, 20, 6).long()}, TypeError, "x must have one of the dtypes.*torch.int64"),
    ({"down_weight": torch.zeros(3, 7)}, ValueError, r"down_weight must be \(r, C=6\).*\(3, 7\)"),
    ({"conv_weight": torch.zeros(2, 1, 3, 3)}, ValueError, r"conv_weight must be \(r=3, 1"),
    ({"up_weight": torch.zeros(6, 4)}, ValueError, r"up_weight must be \(C=6, r=3\).*\(6, 4\)"),
    ({"up_bias": torch.zeros(5)}, ValueError, r"up_bias must be \(6,\); got \(5,\)"),
    ({"conv_bias": 1.0}, TypeError, "conv_bias must be a Tensor; got float"),
    ({"residual": torch.zeros(1)}, ValueError, r"residual must have the shape of x.*got \(1,\)"),
    ({"up_weight": torch.zeros(6, 3).double()}, TypeError, "up_weight must have the dtype of x"),
    ({"grid_size": (3, 5)}, ValueError, r"grid_size \(3, 5\) needs 15 grid tokens.*has 20"),
    ({"grid_size": 5}, ValueError, r"grid_size \(5, 5\) needs 25 grid tokens.*has 20"),
    ({"grid_size": None}, ValueError, "grid_size must be given.*20 grid tokens.*not a square"),
    ({"grid_size": 4.5}, TypeError, "grid_size must be an int or a pair of ints; got 4.5"),
    ({"grid_size": (4, 5, 1)}, TypeError, "grid_size must be an int or a pair"),
    ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must not be negative; got -1"),
    ({"num_prefix_tokens": 1.0}, TypeError, "num_prefix_tokens must be an int; got 1.0"),
    ({"prefix_mode": "none"}, ValueError, "prefix_mode must be one of 'center_tap'.*got 'none'"),
    ({"activation": "tanh"}, ValueError, "activation must be one of 'gelu'.*got 'tanh'"),
    ({"activation_position": "mid"}, ValueError, "activation_position must be one of.*'mid'"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1; got 0"),
    ({"dilation": (1, 1)}, TypeError, r"dilation must be an int; got \(1, 1\)"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]; got 1.5"),
    ({"dropout_p": "a"}, TypeError, "dropout_p must be a number; got 'a'"),
    ({"scale": "a"}, TypeError, "scale must be a number; got 'a'"),
    ({"scale": math.nan}, ValueError, "scale must be finite; got nan"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(changes, error, message):
    case = AdapterCase()
    arguments = case.tensors(torch.float32) | {"grid_size": case.grid} | changes
    with pytest.raises(error, match=message):
        large_kernel_adapter(**arguments)


@pytest.mark.parametrize(
    ("x", "residual", "error", "message"),
    [
        ([1.0], None, TypeError, "x must be a Tensor; got list"),
        (torch.zeros(2, 4, 9), None, ValueError, r"x must be \(B, C, H, W\); got \(2, 4, 9\)"),
        (torch.zeros(2, 4, 3, 3), [1.0], TypeError, "residual must be a Tensor; got list"),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 9, 4), ValueError,
         r"residual must have the shape of x \(2, 4, 3, 3\); got \(2, 9, 4\)"),
    ],
)  # fmt: skip
def test_bad_arguments_of_channels_first(x, residual, error, message):
    with pytest.raises(error, match=message):
        FusedLKA(4, data_format="channels_first")(x, residual=residual)


def test_channels_first_adds_residuals():
    module = FusedLKA(4, init="paper", data_format="channels_first")
    x = torch.randn(2, 4, 3, 3)
    for residual in (x, x.clone(), torch.randn_like(x)):
        torch.testing.assert_close(module(x, residual=residual), module(x) + residual)


class Doubled(torch.nn.Module):
    """A parametrization, and a layer of its own."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer

    def forward(self, weight):
        return 2 * weight

    @property
    def weight(self):
        return 2 * self.layer.weight

    @property
    def bias(self):
        return 2 * self.layer.bias


@torch.no_grad()
def test_weights_of_layers_that_were_changed():
    layers = FusedLKA(5, 3, kernel_size=3, init="paper")
    torch.nn.init.normal_(layers.up.bias)
    x = torch.randn(2, 9, 5)
    before = layers(x)
    given = {name: 2 * p for name, p in layers.named_parameters() if name.startswith("up")}
    torch.testing.assert_close(torch.func.functional_call(layers, given, (x,)), 2 * before)
    for name in ("weight", "bias"):
        torch.nn.utils.parametrize.register_parametrization(layers.up, name, Doubled())
    torch.testing.assert_close(layers(x), 2 * before)
    layers.up = Doubled(layers.up)
    torch.testing.assert_close(layers(x), 4 * before)


def test_a_scale_that_is_not_finite_is_refused_by_the_module():
    with pytest.raises(ValueError, match="scale must be finite; got nan"):
        FusedLKA(4, scale=math.nan)


def test_map_takes_no_prefix_and_only_its_own_grid():
    case = AdapterCase(layout="map")
    arguments = case.tensors(torch.float32)
    with pytest.raises(ValueError, match="num_prefix_tokens must be 0"):
        large_kernel_adapter(**arguments, num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"grid_size must be \(4, 5\).*got \(5, 4\)"):
        large_kernel_adapter(**arguments, grid_size=(5, 4))


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("prefix_mode", ["center_tap", "zero"])
@pytest.mark.parametrize("as_map", [False, True])
def test_x_as_its_own_residual_has_both_gradients(prefix_mode, as_map):
    """Also where one pass writes their sum, with some gradients not asked for, and twice."""
    torch.manual_seed(0)
    prefix = 0 if as_map else 2
    shape = (2, 3, 3, 20) if as_map else (2, 2 + 9, 20)
    parameters = [torch.randn(s, dtype=torch.float64) for s in ((3, 20), (3,), (3, 1, 3, 3), (3,))]
    parameters += [torch.randn(s, dtype=torch.float64) for s in ((20, 3), (20,))]
    for wanted in (parameters, []):
        for p in parameters:
            p.requires_grad_(bool(wanted))

        def gradients(residual_of, x, wanted=wanted):
            y = large_kernel_adapter(
                x,
                *parameters,
                residual=residual_of(x),
                num_prefix_tokens=prefix,
                prefix_mode=prefix_mode,
            )
            first = torch.autograd.grad(y, (x, *wanted), y.detach().sin(), create_graph=True)
            (second,) = torch.autograd.grad(first[0].square().sum(), x)
            fast = torch.autograd.grad(y, (x, *wanted), y.detach().sin())
            return [y, *first, second, *fast]

        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for found, expected in zip(
            gradients(lambda x: x, x), gradients(lambda x: x.view_as(x), x), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_residual_alone_can_want_its_gradient(create_graph):
    x, residual, grad = torch.randn(3, 2, 9, 5).unbind()
    weights = (torch.ones(3, 5), None, torch.ones(3, 1, 3, 3), None, torch.ones(5, 3), None)
    y = large_kernel_adapter(x, *weights, residual=residual.requires_grad_())
    (found,) = torch.autograd.grad(y, residual, grad, create_graph=create_graph)
    assert torch.equal(found, grad)


@pytest.mark.parametrize(
    ("grid_size", "error", "message"),
    [
        ((3.0, 3.0), TypeError, "grid_size must be an int or a pair of ints"),
        ((3, 4), ValueError, r"grid_size must be \(3, 3\), as x \(2, 3, 3, 5\) has it"),
    ],
)
def test_a_grid_size_that_is_not_the_maps(grid_size, error, message):
    weights = (torch.ones(3, 5), None, torch.ones(3, 1, 3, 3), None, torch.ones(5, 3), None)
    with pytest.raises(error, match=message):
        large_kernel_adapter(torch.ones(2, 3, 3, 5), *weights, grid_size=grid_size)
