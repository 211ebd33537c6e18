"""replace_depthwise_convs: what it swaps, what it leaves alone."""

import pytest
import torch
from timm.layers import Conv2dSame
from tiny_backbones import make, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import nn

from lka_kernels import DepthwiseConv2d, LKAConfig, add_adapters, replace_depthwise_convs


def depthwise(kernel_size=7, **options):
    return nn.Conv2d(
        **{"in_channels": 4, "out_channels": 4, "groups": 4, **options}, kernel_size=kernel_size
    )


@pytest.mark.parametrize("name", ["convnext", "convnext_v2_conv_mlp"])
def test_convnext(name):
    model, x = make(name)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    expected = model(x)
    assert replace_depthwise_convs(model) == 5  # one for each block
    assert sum(isinstance(m, DepthwiseConv2d) for m in model.modules()) == 5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert replace_depthwise_convs(model) == 0


def test_gradients_are_those_of_the_original():
    model, x = make("convnext")
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    assert replace_depthwise_convs(model)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "swapped"),
    [
        (depthwise(), True),
        (depthwise(bias=False, stride=2, dilation=2, padding=3), True),
        (depthwise((1, 11), padding="same"), True),
        (depthwise(6, padding="same"), True),
        (depthwise(5), True),
        (depthwise(3), False),
        (depthwise(out_channels=8), False),
        (depthwise(groups=2), False),
        (depthwise(groups=1), False),
        (depthwise(padding=3, padding_mode="circular"), False),
        (depthwise(padding=3, padding_mode="reflect"), False),
        (Conv2dSame(4, 4, 7, groups=4), False),
        (nn.utils.parametrizations.weight_norm(depthwise()), False),
        (nn.ConvTranspose2d(4, 4, 7, groups=4), False),
    ],
    ids=str,
)
def test_eligible(conv, swapped):
    model = nn.Sequential(conv, nn.Identity()).eval()
    x = torch.randn(2, 4, 20, 21)
    expected = model(x)
    assert replace_depthwise_convs(model) == swapped
    assert isinstance(model[0], DepthwiseConv2d) == swapped
    assert (model[0] is conv) == (not swapped)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("least", "count"), [(1, 4), (3, 3), (5, 2), (7, 1), (9, 0)])
def test_min_kernel_size(least, count):
    model = nn.Sequential(*map(depthwise, (1, 3, (2, 5), 7)))
    assert replace_depthwise_convs(model, min_kernel_size=least) == count


def test_hooks_are_not_lost():
    model = nn.Sequential(depthwise(), depthwise())
    model[0].register_forward_hook(lambda *_: None)
    assert replace_depthwise_convs(model) == 1
    assert type(model[0]) is nn.Conv2d


def test_a_shared_layer_stays_shared():
    conv = depthwise(padding=3)
    model = nn.Sequential(conv, nn.Sequential(nn.ReLU(), conv))
    x = torch.randn(1, 4, 9, 9)
    expected = model(x)
    assert replace_depthwise_convs(model) == 1
    assert model[0] is model[1][1]
    torch.testing.assert_close(model(x), expected)


def test_mode_dtype_and_frozen_parameters_stay():
    model = nn.Sequential(depthwise().double()).eval().requires_grad_(False)
    replace_depthwise_convs(model)
    assert not model[0].training
    assert model[0].weight.dtype == torch.float64
    assert not any(p.requires_grad for p in model.parameters())


def test_adapters_keep_their_convolution():
    model, x = make("convnext")
    add_adapters(model, LKAConfig(kernel_size=7))
    expected = model(x)
    assert replace_depthwise_convs(model) == 5
    assert all(type(m.lka_mlp.conv) is nn.Conv2d for m in model.modules() if hasattr(m, "lka_mlp"))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="model must be"):
        replace_depthwise_convs([depthwise()])
    with pytest.raises(TypeError, match="min_kernel_size"):
        replace_depthwise_convs(nn.Sequential(), min_kernel_size=5.0)
    with pytest.raises(ValueError, match="min_kernel_size"):
        replace_depthwise_convs(nn.Sequential(), min_kernel_size=0)
