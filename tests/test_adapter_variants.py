"""The vanilla and the stacked adapter against formulas and against FusedLKA."""

import pytest
import torch
from tiny_backbones import one_thread  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional as F

from lka_kernels import FusedLKA, LKAConfig
from lka_kernels.modules.adapter_variants import StackedLKA, VanillaAdapter, build_adapter

MODES = ("center_tap", "skip", "zero")
POSITIONS = ("pre", "post", "both")


def lively(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module.double().eval()


def tokens(prefix, height=5, width=7, dim=12):
    return torch.randn(2, prefix + height * width, dim, dtype=torch.float64), (height, width)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_vanilla(activation, mode):
    adapter = lively(
        VanillaAdapter(
            12, 5, activation=activation, scale=0.5, num_prefix_tokens=2, prefix_mode=mode
        )
    )
    x, grid = tokens(2)
    residual = torch.randn_like(x)
    function = {"gelu": F.gelu, "relu": F.relu, "none": lambda t: t}[activation]
    y = 0.5 * adapter.up(function(adapter.down(x)))
    if mode == "zero":
        y[:, :2] = 0
    torch.testing.assert_close(adapter(x, grid), y)
    torch.testing.assert_close(adapter(x, residual=residual), residual + y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 4, (1, 5)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", POSITIONS)
def test_one_stacked_convolution_is_the_fused_adapter(position, mode, kernel_size, bias):
    options = {
        "activation": "silu",
        "activation_position": position,
        "prefix_mode": mode,
        "num_prefix_tokens": 3,
        "scale": 1.5,
        "bias": bias,
    }
    fused = lively(FusedLKA(12, 5, kernel_size, dilation=3, **options))
    stacked = StackedLKA(12, 5, kernel_size, 1, dilation=3, **options).double().eval()
    stacked.load_state_dict(
        {k.replace("conv.", "convs.0."): v for k, v in fused.state_dict().items()}
    )
    x, grid = tokens(3)
    residual = torch.randn_like(x)
    torch.testing.assert_close(stacked(x, grid), fused(x, grid))
    torch.testing.assert_close(stacked(x, grid, residual), fused(x, grid, residual))


@pytest.mark.parametrize("position", POSITIONS)
def test_several_stacked_convolutions(position):
    adapter = lively(StackedLKA(6, 4, 3, 3, activation_position=position, num_prefix_tokens=1))
    x, grid = tokens(1, dim=6)

    def bottleneck(image):
        for conv in adapter.convs:
            image = F.conv2d(image, conv.weight, conv.bias, padding=1, groups=4)
        return image

    z = adapter.down(x)
    a = z if position == "post" else F.gelu(z)
    prefix = bottleneck(a[:, :1].mT[..., None]).flatten(2).mT
    image = bottleneck(a[:, 1:].mT.unflatten(2, grid)).flatten(2).mT
    c = torch.cat([prefix, image], dim=1)
    e = c if position == "pre" else F.gelu(c)
    torch.testing.assert_close(adapter(x, grid), adapter.up(e))


@pytest.mark.parametrize("conv", ["none", "stacked"])
def test_layouts_agree(conv):
    config = LKAConfig(conv=conv, kernel_size=3, num_stacked=2 if conv == "stacked" else 1)
    last = lively(build_adapter(config, 12))
    first = build_adapter(config, 12, data_format="channels_first").double().eval()
    first.load_state_dict(last.state_dict())
    x, grid = tokens(0)
    residual = torch.randn_like(x)
    expected = last(x, grid, residual)
    image = last(x.unflatten(1, grid), residual=residual.unflatten(1, grid))
    assert torch.equal(image.flatten(1, 2), expected)
    maps = (t.unflatten(1, grid).movedim(-1, 1) for t in (x, residual))
    x_map, residual_map = maps
    assert torch.equal(first(x_map, None, residual_map).movedim(1, -1).flatten(1, 2), expected)


@pytest.mark.parametrize("conv", ["depthwise", "dilated", "stacked", "none"])
@pytest.mark.parametrize("init", ["zero", "identity", "paper"])
def test_initialisation_and_dropout(conv, init):
    config = LKAConfig(
        bottleneck_dim=32,
        conv=conv,
        kernel_size=3,
        num_stacked=2 if conv == "stacked" else 1,
        init=init,
        dropout=0.5,
    )
    adapter = build_adapter(config, 64)
    for linear in (adapter.down, adapter.up):
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))
    assert 0.015 < adapter.down.weight.std() < 0.025
    assert bool((adapter.up.weight == 0).all()) == (init != "paper")
    x = torch.randn(2, 49, 64)
    if init != "paper":
        assert torch.equal(adapter(x, residual=x), x)
    nn.init.normal_(adapter.up.weight)
    torch.manual_seed(0)
    first = adapter(x)
    torch.manual_seed(0)
    assert torch.equal(adapter(x), first)
    assert not torch.allclose(adapter(x), first)
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize("conv", ["depthwise", "dilated", "stacked"])
@pytest.mark.parametrize("kernel_size", [7, (3, 5), (4, 2)])
def test_identity_starts_as_the_adapter_without_convolution(conv, kernel_size):
    config = LKAConfig(
        conv=conv,
        kernel_size=kernel_size,
        # A dilated even kernel has no tap at the output's own position.
        dilation=1 if conv == "depthwise" or kernel_size == (4, 2) else 3,
        num_stacked=2 if conv == "stacked" else 1,
        init="identity",
        dropout=0.0,
    )
    adapter = build_adapter(config, 24, num_prefix_tokens=1)
    vanilla = VanillaAdapter(24, num_prefix_tokens=1)
    nn.init.normal_(adapter.up.weight)
    vanilla.load_state_dict(adapter.state_dict(), strict=False)
    x = torch.randn(2, 1 + 5 * 6, 24)
    torch.testing.assert_close(adapter(x, (5, 6)), vanilla(x, (5, 6)))
    assert all(p.requires_grad for p in adapter.parameters())


def test_parameter_counts():
    dim, r = 24, 8
    projections = 2 * r * dim + r + dim
    for config, taps in (
        (LKAConfig(conv="none"), 0),
        (LKAConfig(kernel_size=7), r * (49 + 1)),
        (LKAConfig(conv="dilated", dilation=2, kernel_size=5), r * (25 + 1)),
        (LKAConfig(conv="stacked", num_stacked=3, kernel_size=3), 3 * r * (9 + 1)),
    ):
        adapter = build_adapter(config, dim)
        assert sum(p.numel() for p in adapter.parameters()) == projections + taps


def test_gradients():
    adapter = lively(StackedLKA(4, 3, 3, 2, num_prefix_tokens=1))
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in adapter.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(
            adapter, dict(zip(names, parameters, strict=True)), (x, (2, 3))
        )

    assert torch.autograd.gradcheck(run, (x, *adapter.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *adapter.parameters()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"bottleneck_dim": 2.0}, TypeError, "bottleneck_dim"),
        ({"num_stacked": 0}, ValueError, "num_stacked"),
        ({"num_stacked": "3"}, TypeError, "num_stacked"),
        ({"dropout": 2.0}, ValueError, "dropout"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"activation_position": "in"}, ValueError, "activation_position"),
        ({"prefix_mode": "drop"}, ValueError, "prefix_mode"),
        ({"init": "ones"}, ValueError, "init"),
        ({"data_format": "nchw"}, ValueError, "data_format"),
        ({"data_format": "channels_first", "num_prefix_tokens": 1}, ValueError, "num_prefix"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        StackedLKA(**{"dim": 8, **options})


def test_bad_inputs_are_named():
    adapter = StackedLKA(8)
    with pytest.raises(ValueError, match=r"residual must have the shape of x"):
        adapter(torch.zeros(1, 4, 8), residual=torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, P\+N, C\)"):
        adapter(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="grid_size"):
        adapter(torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\)"):
        VanillaAdapter(8, data_format="channels_first")(torch.zeros(1, 4, 8))
