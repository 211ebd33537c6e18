"""Adapters follow the size of the input, however the model comes by it."""

import copy

import pytest
import torch
from tiny_backbones import BACKBONES, enliven_adapters, make, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import nn

from lka_kernels import LKAConfig, adapter_parameters, add_adapters
from lka_kernels.integrations.token_grid import TokenGrid


def adapted(name, **options):
    model, _ = make(name, **options)
    return enliven_adapters(add_adapters(model, LKAConfig(kernel_size=5)))


def record_grids(model):
    """Collect the grid that each forward pass of the first adapter gets."""
    grids = []
    adapter = next(m for n, m in model.named_modules() if n.endswith("lka_attn"))
    adapter.register_forward_pre_hook(lambda _, args: grids.append(args[1]))
    return grids


@torch.no_grad()
def test_dynamic_image_size():
    model = adapted("vit_dynamic")
    grids = record_grids(model)
    for height, width in ((32, 32), (24, 48), (48, 24), (8, 40), (32, 32)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 4)
        assert grids[-1] == (height // 8, width // 8)


@torch.no_grad()
def test_dynamic_image_padding():
    model = adapted("vit_dynamic", dynamic_img_pad=True)
    grids = record_grids(model)
    model(torch.randn(1, 3, 25, 33))
    assert grids[-1] == (4, 5)


@torch.no_grad()
def test_a_transposed_image_is_not_mistaken():
    """24×48 and 48×24 have the same number of tokens; only the recorded grid tells them apart."""
    model = adapted("vit_dynamic")
    model.pos_embed = None
    for module in model.modules():  # make everything but the adapters symmetric in space
        if isinstance(module, nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.mT) / 2)
    x = torch.randn(1, 3, 24, 48)
    torch.testing.assert_close(model(x.mT.contiguous()), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vit_registers", "swin"])
def test_set_input_size(name):
    model = adapted(name)
    size = BACKBONES[name][1] * 2
    before = [p.clone() for p in adapter_parameters(model)]
    model.set_input_size((size, size // 2))
    assert model(torch.randn(1, 3, size, size // 2)).shape == (1, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(model), strict=True))
    # The same as adapters put into a model that had this size from the start.
    twin, _ = make(name)
    twin.set_input_size((size, size // 2))
    add_adapters(twin, LKAConfig(kernel_size=5)).load_state_dict(model.state_dict())
    x = torch.randn(1, 3, size, size // 2)
    assert torch.equal(twin(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnext", "convnext_v2_conv_mlp", "efficientnet"])
def test_convolutional_backbones_take_any_size(name):
    model = adapted(name)
    for height, width in ((32, 32), (64, 40), (33, 70)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 4)


@torch.no_grad()
def test_intermediate_features():
    model = adapted("vit_dynamic")
    x = torch.randn(2, 3, 24, 40)
    final, features = model.forward_intermediates(x)
    assert [f.shape for f in features] == [(2, 32, 3, 5)] * 2
    torch.testing.assert_close(final, model.forward_features(x))


@torch.no_grad()
def test_copies_keep_grids_of_their_own():
    model = adapted("vit_dynamic")
    twin = copy.deepcopy(model)
    square, wide = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 64)
    expected = model(wide)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(wide)))
    twin(square)
    assert torch.equal(model.forward_head(model.norm(model.blocks(tokens))), expected)


def gradients(model, *images):
    model.zero_grad()
    sum(model(x).square().sum() for x in images).backward()
    return [p.grad.clone() for p in adapter_parameters(model)]


def test_several_sizes_in_one_backward_pass():
    """Multi-crop training with checkpointing: each block recomputes on the grid it had."""
    model = adapted("vit_dynamic")
    images = torch.randn(1, 3, 32, 40), torch.randn(1, 3, 16, 24), torch.randn(1, 3, 48, 48)
    expected = gradients(model, *images)
    model.set_grad_checkpointing(True)
    for _ in range(2):
        for ours, theirs in zip(gradients(model, *images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_shapes_that_cannot_be_told_apart_are_an_error():
    model = adapted("vit_dynamic")
    wide, tall = torch.randn(1, 3, 24, 48), torch.randn(1, 3, 48, 24)
    expected = [gradients(model, x) for x in (wide, tall)]
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match=r"18 tokens.*\(3, 6\), \(6, 3\)"):
        gradients(model, wide, tall)
    for x, grads in zip((wide, tall), expected, strict=True):  # one after the other is fine
        for ours, theirs in zip(gradients(model, x), grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_missing_tokens_are_an_error():
    grid = TokenGrid((4, 4))
    assert grid.of(16) == (4, 4)
    with pytest.raises(RuntimeError, match=r"12 grid tokens.*4×4"):
        grid.of(12)
