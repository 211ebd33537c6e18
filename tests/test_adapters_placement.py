"""Each placement against its formula, written out with the base block's own parts."""

import pytest
import torch
from tiny_backbones import enliven_adapters, make, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import nn
from torch.nn import functional as F

from lka_kernels import LKAConfig, add_adapters
from lka_kernels.integrations.adapted_block import adapt_after, add_branch

timm_layers = pytest.importorskip("timm.layers")
PLACEMENTS = ("parallel", "before_residual", "after_residual")


def lka(adapter, image, scale=1.0):
    """The adapter on (B, C, H, W) in plain torch: up(conv(gelu(down)))."""
    z = F.gelu(F.linear(image.movedim(1, -1), adapter.down.weight, adapter.down.bias))
    conv = adapter.conv
    c = F.conv2d(z.movedim(-1, 1), conv.weight, conv.bias, padding="same", groups=conv.out_channels)
    y = F.linear(c.movedim(1, -1), adapter.up.weight, adapter.up.bias)
    return scale * y.movedim(-1, 1)


def lka_tokens(adapter, tokens, grid, num_prefix, scale=1.0):
    """The adapter on (B, P+N, C): each prefix token is a 1×1 image, the rest is one image."""
    prefix = [tokens[:, i : i + 1].mT[..., None] for i in range(num_prefix)]
    parts = [lka(adapter, image, scale)[..., 0].mT for image in prefix]
    image = tokens[:, num_prefix:].mT.unflatten(2, grid)
    return torch.cat([*parts, lka(adapter, image, scale).flatten(2).mT], dim=1)


def residual_sum(placement, x, n, h, adapter):
    """The formulas of the paper's figure: (a), (b), (c)."""
    if placement == "parallel":
        return x + h + adapter(n)
    if placement == "before_residual":
        return x + h + adapter(h)
    return (x + h) + adapter(x + h)


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return request.param


def adapted(name, placement, **options):
    model, _ = make(name, drop_path_rate=0.3)
    config = LKAConfig(kernel_size=5, placement=placement, dropout=0.5, scale=0.7, **options)
    return enliven_adapters(add_adapters(model, config)).double()


@pytest.mark.parametrize("name", ["vit", "vit_registers", "vit_no_prefix", "vit_distilled"])
def test_vision_transformer(name, placement):
    model = adapted(name, placement)
    block, prefix, grid = model.blocks[1], model.num_prefix_tokens, (4, 4)
    x = torch.randn(3, prefix + 16, 32, dtype=torch.float64)
    expected = x
    for norm, branch, scale, adapter in (
        (block.norm1, block.attn, block.ls1, block.lka_attn),
        (block.norm2, block.mlp, block.ls2, block.lka_mlp),
    ):
        n = norm(expected)
        h = scale(branch(n))
        expected = residual_sum(
            placement, expected, n, h, lambda t, a=adapter: lka_tokens(a, t, grid, prefix, 0.7)
        )
    torch.testing.assert_close(block(x), expected)


def test_swin_sees_the_whole_map(placement):
    model = adapted("swin", placement)
    block = model.layers[0].blocks[1]  # shifted windows
    assert any(block.shift_size)
    x = torch.randn(2, 14, 14, 16, dtype=torch.float64)
    expected = x
    for norm, branch, adapter in (
        (block.norm1, block._attn, block.lka_attn),
        (block.norm2, block.mlp, block.lka_mlp),
    ):
        n = norm(expected)
        expected = residual_sum(
            placement,
            expected,
            n,
            branch(n),
            lambda t, a=adapter: lka(a, t.movedim(-1, 1), 0.7).movedim(1, -1),
        )
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "name", ["convnext", "convnext_conv_mlp", "convnext_v2", "convnext_v2_conv_mlp"]
)
def test_convnext(name, placement):
    block = adapted(name, placement).stages[1].blocks[1]
    x = torch.randn(2, 16, 9, 6, dtype=torch.float64)

    def mixer(t):
        return lka(block.lka_attn, t, 0.7)

    def mlp(t):
        return lka(block.lka_mlp, t, 0.7)

    def channels(function, t):
        """Apply a norm or MLP in the layout that the block was built for."""
        return function(t) if block.use_conv_mlp else function(t.movedim(1, -1)).movedim(-1, 1)

    m = block.conv_dw(x)
    if placement == "before_residual":
        m = m + mixer(m)
    n = channels(block.norm, m)
    h = channels(block.mlp, n)
    if block.gamma is not None:
        h = h * block.gamma[:, None, None]
    if placement == "parallel":
        expected = x + h + mixer(x) + mlp(n)
    elif placement == "before_residual":
        expected = x + h + mlp(h)
    else:
        s = x + h
        s = s + mixer(s)
        expected = s + mlp(s)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "name", ["efficientnet", "efficientnet_v2", "mobilenet_v4", "efficientnet_condconv"]
)
def test_efficientnet(name, placement):
    plain, _ = make(name)
    plain = dict(plain.double().named_modules())
    tested = 0
    for key, block in adapted(name, placement).named_modules():
        if not hasattr(block, "lka_block"):
            continue
        tested += 1
        dim = block.lka_block.down.in_features
        x = torch.randn(2, dim, 7, 5, dtype=torch.float64)
        h = plain[key](x) - x
        expected = residual_sum(placement, x, x, h, lambda t, b=block: lka(b.lka_block, t, 0.7))
        torch.testing.assert_close(block(x), expected)
    assert tested


class Affine(nn.Module):
    """Stands for an adapter: called as one, with a residual or without."""

    def forward(self, x, grid_size=None, residual=None):
        y = 3.0 * x + 1.0
        return y if residual is None else residual + y


def test_drop_path_drops_branch_and_adapter_together(placement):
    """An image keeps both, scaled by 1 / (1 - p), or passes unchanged."""
    drop_path = timm_layers.DropPath(0.5).train()
    x, n, h = torch.randn(3, 64, 5, 4, dtype=torch.float64)
    torch.manual_seed(0)
    y = add_branch(x, n, h, Affine(), placement, drop_path)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    kept = drop_path(torch.ones(64, 1, 1))[:, 0, 0] > 0
    assert torch.equal(torch.get_rng_state(), state)  # one draw, as without adapter
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(y[~kept], x[~kept])
    x, n, h = x[kept], n[kept], 2 * h[kept]
    a = 3.0 * n + 2.0 / 2
    expected = {
        "parallel": x + h + 2 * a,
        "before_residual": x + h + (3.0 * h + 2.0),
        "after_residual": x + h + 2 * (3.0 * (x + h) + 1.0),
    }
    torch.testing.assert_close(y[kept], expected[placement])


def test_adapters_after_the_residual_follow_one_another():
    x, h = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = adapt_after(x, h, [Affine(), Affine()], nn.Identity())
    s = x + h
    s = s + (3 * s + 1)
    torch.testing.assert_close(y, s + (3 * s + 1))
