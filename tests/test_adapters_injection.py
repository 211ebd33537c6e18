"""add_adapters: what it adds, what it leaves alone, what it refuses."""

import copy
import io
import pickle

import pytest
import timm
import torch
from tiny_backbones import BACKBONES, FAMILIES, enliven_adapters, make, one_thread  # noqa: F401 (one_thread is a fixture)
from torch import nn

from lka_kernels import (
    FusedLKA,
    LKAConfig,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    freeze_batch_norm,
)
from lka_kernels.adapters import named_adapters
from lka_kernels.modules.adapter_variants import StackedLKA, VanillaAdapter

CONVS = {
    "depthwise": LKAConfig(kernel_size=5),
    "dilated": LKAConfig(conv="dilated", kernel_size=3, dilation=2),
    "stacked": LKAConfig(conv="stacked", kernel_size=3, num_stacked=2),
    "none": LKAConfig(conv="none"),
}
PLACEMENTS = ("parallel", "before_residual", "after_residual")


def with_options(config, **options):
    return LKAConfig.from_dict({**config.to_dict(), **options})


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LKAConfig(conv="none"), 153_412),
        (LKAConfig(kernel_size=1), 153_796),
        (LKAConfig(kernel_size=3), 155_332),
        (LKAConfig(kernel_size=5), 158_404),
        (LKAConfig(kernel_size=7), 163_012),
        (LKAConfig(kernel_size=31), 338_116),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_trainable_parameters_of_swin_tiny(config, count):
    """The counts of arXiv 2506.19118: Swin-T, 4 classes, r = 8, head trained."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4)
    add_adapters(model, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in adapter_parameters(model)) == count
    assert sum(p.numel() for p in adapter_parameters(model, head=False)) == count - 3_076
    assert sum(t.numel() for t in adapter_state_dict(model).values()) == count


@pytest.mark.parametrize("name", BACKBONES)
def test_zero_init_is_bit_identical(name):
    model, x = make(name)
    with torch.no_grad():
        expected = model(x)
        add_adapters(model, LKAConfig())
        assert torch.equal(model(x), expected)
        # ... and not because the adapters are out of reach.
        enliven_adapters(model)
        assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("name", [*FAMILIES, "convnext_v2_conv_mlp"])
def test_zero_init_is_bit_identical_in_training(name, conv, placement):
    """With drop-path and BatchNorm at work, and the same random numbers drawn."""
    model, x = make(name, drop_path_rate=0.4)
    base = copy.deepcopy(model).train()
    config = with_options(CONVS[conv], placement=placement, dropout=0.0)
    add_adapters(model, config).train()
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            expected, state = base(x), torch.get_rng_state()
            torch.manual_seed(seed)
            assert torch.equal(model(x), expected)
            assert torch.equal(torch.get_rng_state(), state)
        for key, value in base.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert not torch.equal(enliven_adapters(model)(x), expected)


def test_zero_init_with_adapter_dropout_is_bit_identical_without_other_randomness():
    model, x = make("vit")
    with torch.no_grad():
        expected = model.train()(x)
        assert torch.equal(add_adapters(model, LKAConfig(dropout=0.5))(x), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_base_keys_and_values_stay(name):
    model, _ = make(name)
    before = copy.deepcopy(model.state_dict())
    assert add_adapters(model, LKAConfig()) is model
    after = model.state_dict()
    assert [key for key in after if "lka_" not in key] == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    added = set(after) - set(before)
    assert added
    assert added < set(adapter_state_dict(model))
    # A base checkpoint still loads, and misses the adapters alone.
    result = model.load_state_dict(before, strict=False)
    assert set(result.missing_keys) == added
    assert not result.unexpected_keys


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "vit_distilled"])
def test_only_adapters_and_head_are_trainable(name, train_head):
    model, _ = make(name)
    head = {f"{n}." for n in ("head", "head_dist", "classifier")}
    add_adapters(model, LKAConfig(), train_head=train_head)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    in_head = {n for n in trainable if n.startswith(tuple(head))}
    assert bool(in_head) == train_head
    assert all(".lka_" in n for n in trainable - in_head)
    assert {id(p) for p in adapter_parameters(model)} == {
        id(p) for n, p in model.named_parameters() if n in trainable
    }
    assert set(adapter_state_dict(model)) == trainable
    if name == "vit_distilled" and train_head:
        assert {n.split(".")[0] for n in in_head} == {"head", "head_dist"}


@pytest.mark.parametrize("sites", [("attn",), ("mlp",), ("attn", "mlp")])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_sites(name, sites):
    model, x = make(name)
    blocks = sum(
        type(m).__name__ in ("Block", "SwinTransformerBlock", "ConvNeXtBlock")
        for m in model.modules()
    )
    with torch.no_grad():
        expected = model(x)
        add_adapters(model, LKAConfig(sites=sites))
        names = [n.rsplit(".", 1)[1] for n, _ in named_adapters(model)]
        assert sorted(names) == sorted(blocks * [f"lka_{s}" for s in sites])
        assert torch.equal(model(x), expected)
        assert not torch.allclose(enliven_adapters(model)(x), expected)


@pytest.mark.parametrize("sites", [("attn",), ("mlp",), ("attn", "mlp")])
def test_efficientnet_has_one_adapter_for_each_residual_block(sites):
    model, _ = make("efficientnet")
    blocks = [n for n, m in model.named_modules() if getattr(m, "has_skip", False)]
    skipless = [n for n, m in model.named_modules() if getattr(m, "has_skip", True) is False]
    assert blocks
    assert skipless
    add_adapters(model, LKAConfig(sites=sites))
    assert [n for n, _ in named_adapters(model)] == [f"{n}.lka_block" for n in blocks]


def test_adapters_follow_the_configuration():
    kinds = {"depthwise": FusedLKA, "dilated": FusedLKA, "stacked": StackedLKA}
    for conv, config in CONVS.items():
        model, _ = make("vit_registers")
        add_adapters(model, with_options(config, scale=0.5, bottleneck_dim=5, dropout=0.25))
        for _, adapter in named_adapters(model):
            assert type(adapter) is kinds.get(conv, VanillaAdapter)
            assert (adapter.num_prefix_tokens, adapter.scale) == (4, 0.5)
            assert adapter.down.weight.shape == (5, 32)
    assert model.lka_config.bottleneck_dim == 5


def test_adapters_take_dtype_device_and_mode_of_their_block():
    model, x = make("swin")
    add_adapters(model.to(torch.float64).train(), LKAConfig())
    for _, adapter in named_adapters(model):
        assert adapter.training
        assert all(p.dtype == torch.float64 for p in adapter.parameters())
    assert model(x.double()).dtype == torch.float64
    with torch.device("meta"):
        on_meta = BACKBONES["vit"][0]()
    assert all(p.is_meta for p in adapter_parameters(add_adapters(on_meta, LKAConfig())))


@pytest.mark.parametrize("name", BACKBONES)
def test_deepcopy_and_pickle(name):
    model, x = make(name)
    enliven_adapters(add_adapters(model, LKAConfig()))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    with torch.no_grad():
        expected = model(x)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(saved, weights_only=False),
        ):
            assert torch.equal(twin(x), expected)
            assert set(adapter_state_dict(twin)) == set(adapter_state_dict(model))
            for p in adapter_parameters(twin):
                p.zero_()
        assert torch.equal(model(x), expected)  # the copies share nothing with it


def test_adding_twice_is_refused():
    model, _ = make("vit")
    add_adapters(model, LKAConfig(kernel_size=3))
    with pytest.raises(ValueError, match=r"already.*kernel_size=3"):
        add_adapters(model, LKAConfig())


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "none"),
        (lambda: timm.create_model("resnet10t", num_classes=2), "BasicBlock"),
        (lambda: timm.create_model("pit_ti_224", num_classes=2), "Block"),
        (
            lambda: timm.create_model("swinv2_cr_tiny_224", num_classes=2),
            "SwinTransformerV2CrBlock",
        ),
        (lambda: timm.create_model("mobilenetv4_hybrid_medium", num_classes=2), "MobileAttention"),
    ],
    ids=["plain", "resnet", "pit", "swin v2", "mobilenet v4 hybrid"],
)
def test_an_unsupported_model_is_refused_and_untouched(model, found):
    with torch.device("meta"):
        model = model()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=found) as error:
        add_adapters(model, LKAConfig(), train_head=False)
    for supported in ("VisionTransformer", "SwinTransformer", "ConvNeXt", "EfficientNet"):
        assert supported in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())


def test_patch_dropout_is_refused():
    model, _ = make("vit", patch_drop_rate=0.25)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        add_adapters(model, LKAConfig())


def test_wrong_arguments_are_refused():
    model, _ = make("vit")
    with pytest.raises(TypeError, match="config must be an LKAConfig"):
        add_adapters(model, {"kernel_size": 7})
    with pytest.raises(TypeError, match="model must be"):
        add_adapters(None, LKAConfig())
    with pytest.raises(TypeError, match="get_classifier"):
        add_adapters(nn.Sequential(model), LKAConfig())
    for function in (adapter_parameters, adapter_state_dict):
        with pytest.raises(ValueError, match="no adapters"):
            function(model)


def test_a_part_of_a_larger_model():
    model, x = make("vit_dynamic")
    whole = nn.Sequential(model, nn.Linear(4, 2))
    with torch.no_grad():
        expected = whole(x)
        add_adapters(whole, LKAConfig(), train_head=False)
        assert torch.equal(whole(x), expected)
    assert all(key.startswith("0.blocks.") for key in adapter_state_dict(whole))
    with pytest.raises(ValueError, match="part"):
        adapter_state_dict(nn.Sequential(whole))


def test_freeze_batch_norm():
    model, x = make("efficientnet")
    add_adapters(model, LKAConfig())
    before = copy.deepcopy(model.state_dict())
    model.train()
    layers = freeze_batch_norm(model)
    assert layers == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) > 0
    with torch.no_grad():
        model(x)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.train()
        model(x)
        assert not all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
