"""save_adapters and load_adapters: round trips, and errors that leave everything as it was."""

import copy
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_backbones import FAMILIES, enliven, enliven_adapters, make, one_thread  # noqa: F401 (one_thread is a fixture)

from lka_kernels import (
    LKAConfig,
    adapter_files,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    freeze_batch_norm,
    load_adapters,
    save_adapters,
)

CONFIGS = [
    LKAConfig(kernel_size=5),
    LKAConfig(conv="dilated", dilation=2, kernel_size=(3, 5), placement="before_residual"),
    LKAConfig(conv="stacked", num_stacked=3, kernel_size=3, sites=("mlp",)),
    LKAConfig(conv="none", placement="after_residual", scale=0.5),
]


def trained(name="vit", config=CONFIGS[0], train_head=True):
    model, x = make(name)
    add_adapters(model, config, train_head=train_head)
    enliven(adapter_parameters(model))
    return model, x


def snapshot(model):
    """All that loading could change."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        [type(m) for m in model.modules()],
        sorted(vars(model)),
        [len(m._forward_pre_hooks) for m in model.modules()],
    )


def assert_unchanged(model, before):
    state, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert state.keys() == before[0].keys()
    assert all(torch.equal(v, before[0][k]) for k, v in state.items())


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.conv)
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_onto_a_fresh_model(name, config, train_head, tmp_path):
    model, x = trained(name, config, train_head)
    save_adapters(model, tmp_path / "adapters.safetensors")
    fresh, _ = make(name)
    assert load_adapters(fresh, tmp_path / "adapters.safetensors") is fresh
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert fresh.lka_config == config
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert {k: v.dtype for k, v in fresh.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def test_round_trip_onto_a_model_with_adapters(tmp_path):
    model, x = trained()
    save_adapters(model, str(tmp_path / "a"))
    other, _ = make("vit")
    enliven_adapters(add_adapters(other, CONFIGS[0]))
    parameters = adapter_parameters(other)
    load_adapters(other, str(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    # In place: an optimizer that holds the parameters still holds the right ones.
    assert [id(p) for p in parameters] == [id(p) for p in adapter_parameters(other)]


def test_the_file_holds_adapters_head_and_configuration_only(tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(adapter_state_dict(model))
        assert LKAConfig.from_dict(json.loads(file.metadata()["config"])) == CONFIGS[0]
    assert {k.split(".")[0] for k in adapter_state_dict(model)} == {"blocks", "head"}


def test_other_dtypes(tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    double = load_adapters(make("vit")[0].double(), tmp_path / "a")
    expected = adapter_state_dict(model)
    for key, value in adapter_state_dict(double).items():
        assert value.dtype == torch.float64
        assert torch.equal(value, expected[key].double())
    save_adapters(model.to(torch.bfloat16), tmp_path / "b")
    load_adapters(make("vit")[0], tmp_path / "b")


def test_wrapped_models_save_and_load_the_model_inside(tmp_path):
    model, x = trained()
    save_adapters(torch.compile(model, backend="eager"), tmp_path / "a")
    fresh = torch.nn.DataParallel(make("vit")[0])
    load_adapters(fresh, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(fresh.module(x), model(x))
    assert set(adapter_state_dict(fresh)) == set(adapter_state_dict(model))


def change_class_count(model):
    model.reset_classifier(7)


def remove_a_block(model):
    model.blocks = model.blocks[:1]


@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_class_count, r"head.weight must be \(7, 32\); the file has \(4, 32\)"),
        (remove_a_block, r"not in the model: blocks\.1\.lka_attn\.conv\.bias"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(change, message, with_adapters, tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    other, _ = make("vit", seed=1)
    change(other)
    if with_adapters:
        add_adapters(other, CONFIGS[0])
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        load_adapters(other, tmp_path / "a")
    assert_unchanged(other, before)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_missing_and_unexpected_keys_are_all_named(with_adapters, tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    tensors = adapter_state_dict(model)
    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
    tensors["blocks.9.lka_attn.up.bias"] = tensors.pop("blocks.0.lka_mlp.up.bias").clone()
    del tensors["head.bias"]
    save_file(tensors, tmp_path / "b", metadata)
    other, _ = make("vit")
    if with_adapters:
        add_adapters(other, CONFIGS[0])
    before = snapshot(other)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
        load_adapters(other, tmp_path / "b")
    for part in (
        "missing from the file: blocks.0.lka_mlp.up.bias, head.bias",
        "not in the model: blocks.9.lka_attn.up.bias",
    ):
        assert part in str(error.value)
    assert_unchanged(other, before)


def test_another_configuration_is_refused(tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    other, _ = make("vit")
    add_adapters(other, LKAConfig(kernel_size=3, scale=2.0))
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"kernel_size=5 in the file, 3 in the model; scale=1\.0 .*, 2\.0"
    ):
        load_adapters(other, tmp_path / "a")
    assert_unchanged(other, before)


def test_another_backbone_is_refused(tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    swin, _ = make("swin")
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3))
    for other, error in ((swin, ValueError), (plain, TypeError)):
        before = snapshot(other)
        with pytest.raises(error):
            load_adapters(other, tmp_path / "a")
        assert_unchanged(other, before)


def test_files_that_are_none_of_ours(tmp_path):
    model, _ = make("vit")
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_adapters(model, tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must be a file"):
        load_adapters(model, tmp_path)
    (tmp_path / "text").write_text("not a safetensors file")
    with pytest.raises(ValueError, match="text is not a complete safetensors file"):
        load_adapters(model, tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not written by save_adapters"):
        load_adapters(model, tmp_path / "foreign")
    for damage in (
        {"config": "{"},
        {"config": '{"kernel_size": 0}', "train_head": "true"},
        {"config": json.dumps(CONFIGS[0].to_dict()), "train_head": '"no"'},
    ):
        metadata = {"format": adapter_files.FORMAT, **damage}
        save_file({"a": torch.zeros(1)}, tmp_path / "damaged", metadata)
        with pytest.raises(ValueError, match="damaged configuration"):
            load_adapters(model, tmp_path / "damaged")
    assert_unchanged(model, before)


def test_every_truncation_is_noticed(tmp_path):
    model, _ = trained()
    save_adapters(model, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_adapters(make("vit")[0], tmp_path / "cut")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, x = trained()
    path = tmp_path / "a"
    save_adapters(model, path)
    expected = model(x)
    old = path.read_bytes()
    enliven_adapters(model)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapters(model, path)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == old
    monkeypatch.undo()
    assert torch.equal(load_adapters(make("vit")[0], path)(x), expected)
    save_adapters(model, path)  # over the old one
    assert path.read_bytes() != old
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """By its own name: not by that of the temporary file."""
    model, _ = trained()
    with pytest.raises(FileNotFoundError, match=r"that exists; got \S+/no/a\.safetensors$"):
        save_adapters(model, tmp_path / "no" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path} is a folder"):
        save_adapters(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapters(make("vit")[0], tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_batch_norm_statistics_that_would_be_lost_are_reported(tmp_path, recwarn):
    model, _ = trained("efficientnet")
    save_adapters(model, tmp_path / "a")  # in evaluation mode: nothing to lose
    freeze_batch_norm(model.train())
    save_adapters(model, tmp_path / "a")
    assert not [w for w in recwarn if "BatchNorm" in str(w.message)]
    with pytest.warns(UserWarning, match="freeze_batch_norm"):
        save_adapters(model.train(), tmp_path / "a")


def test_the_saved_tensors_are_a_copy(tmp_path):
    model, _ = trained()
    before = copy.deepcopy(adapter_state_dict(model))
    save_adapters(model, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in adapter_state_dict(model).items())
