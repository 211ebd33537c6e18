"""Adapters in training: gradients, gradient checkpointing, autocast, torch.compile."""

import copy

import pytest
import torch
from tiny_backbones import FAMILIES, enliven_adapters, make, one_thread  # noqa: F401 (one_thread is a fixture)

from lka_kernels import LKAConfig, adapter_parameters, add_adapters

PLACEMENTS = ("parallel", "before_residual", "after_residual")


def adapted(name, placement="parallel", dropout=0.2, **options):
    model, x = make(name, drop_path_rate=0.2, **options)
    config = LKAConfig(kernel_size=5, placement=placement, dropout=dropout)
    return enliven_adapters(add_adapters(model, config)).train(), x


def gradients(model, *images):
    torch.manual_seed(0)
    model.zero_grad()
    sum(model(x).square().sum() for x in images).backward()
    return [p.grad.clone() for p in adapter_parameters(model)]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(name, placement):
    model, x = adapted(name, placement)
    twin = copy.deepcopy(model)
    expected = gradients(model, x)
    twin.set_grad_checkpointing(True)
    recomputed = []
    block = next(m for m in twin.modules() if hasattr(m, "lka_placement"))
    block.register_forward_pre_hook(lambda *_: recomputed.append(1))
    for ours, theirs in zip(gradients(twin, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(recomputed) == 2
    assert all(g.abs().max() > 0 for g in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_base_gets_no_gradients(name):
    model, x = adapted(name)
    model(x).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_the_adapters_alone(name):
    model, x = make(name)
    base = copy.deepcopy(model)
    add_adapters(model, LKAConfig(dropout=0.0))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.05)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    head = tuple(f"{n}." for n in ("head", "classifier"))
    for key, value in base.state_dict().items():
        assert torch.equal(after[key], value) != (key.startswith(head) and "norm" not in key), key


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_autocast(name, placement):
    """Zero-initialised adapters stay invisible, the gradients stay near those in float32."""
    model, x = make(name)
    base = copy.deepcopy(model)
    add_adapters(model, LKAConfig(placement=placement, dropout=0.0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), base(x))
    enliven_adapters(model)
    expected = torch.cat([g.flatten() for g in gradients(model, x)])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([g.flatten() for g in gradients(model, x)])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.97


SMALLER = {
    "vit_registers": {"depth": 1},
    "vit_dynamic": {"depth": 1},
    "convnext": {"depths": (1, 1, 1, 1)},
    "swin": {"depths": (2,), "num_heads": (2,)},
}


@pytest.mark.parametrize(
    "name", ["vit_registers", "vit_dynamic", "swin", "convnext", "efficientnet_v2"]
)
def test_compiles_in_one_graph(name):
    """fullgraph=True: no graph break in the block, the adapter or the token grid."""
    torch._dynamo.reset()
    model, x = adapted(name, dropout=0.0, **SMALLER.get(name, {}))
    model.eval()
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
        if name == "vit_dynamic":  # the grid follows the input inside the graph, too
            wide = torch.randn(2, 3, 24, 48)
            torch.testing.assert_close(compiled(wide), model(wide), rtol=1e-4, atol=1e-5)
            tall = wide.mT.contiguous()
            torch.testing.assert_close(compiled(tall), model(tall), rtol=1e-4, atol=1e-5)
