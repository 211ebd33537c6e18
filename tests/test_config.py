"""LKAConfig: defaults, checks, round trips."""

import dataclasses
import json
import pickle

import pytest

from lka_kernels import LKAConfig


def test_defaults_are_the_public_ones():
    assert LKAConfig().to_dict() == {
        "bottleneck_dim": 8,
        "kernel_size": 7,
        "conv": "depthwise",
        "dilation": 1,
        "num_stacked": 1,
        "placement": "parallel",
        "sites": ["attn", "mlp"],
        "activation": "gelu",
        "activation_position": "pre",
        "dropout": 0.1,
        "scale": 1.0,
        "init": "zero",
    }


def test_arguments_come_in_the_public_order():
    config = LKAConfig(
        4, 3, "stacked", 2, 3, "after_residual", ("mlp",), "silu", "both", 0.5, 2, "paper"
    )
    assert (config.bottleneck_dim, config.kernel_size, config.conv) == (4, 3, "stacked")
    assert (config.dilation, config.num_stacked, config.placement) == (2, 3, "after_residual")
    assert (config.sites, config.activation, config.activation_position) == (
        ("mlp",),
        "silu",
        "both",
    )
    assert (config.dropout, config.scale, config.init) == (0.5, 2.0, "paper")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LKAConfig().kernel_size = 3


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("bottleneck_dim", 0, ValueError),
        ("bottleneck_dim", 8.0, TypeError),
        ("bottleneck_dim", True, TypeError),
        ("kernel_size", 0, ValueError),
        ("kernel_size", (3, 0), ValueError),
        ("kernel_size", "7", TypeError),
        ("kernel_size", (3, 3, 3), TypeError),
        ("conv", "full", ValueError),
        ("dilation", 0, ValueError),
        ("dilation", 2, ValueError),  # would be ignored by conv="depthwise"
        ("num_stacked", 0, ValueError),
        ("num_stacked", 3, ValueError),
        ("placement", "before", ValueError),
        ("sites", (), ValueError),
        ("sites", "attn", TypeError),
        ("sites", ("attn", "attn"), ValueError),
        ("sites", ("head",), ValueError),
        ("activation", "tanh", ValueError),
        ("activation_position", "middle", ValueError),
        ("dropout", -0.1, ValueError),
        ("dropout", 1.1, ValueError),
        ("dropout", float("nan"), ValueError),
        ("dropout", "0.1", TypeError),
        ("scale", float("inf"), ValueError),
        ("scale", None, TypeError),
        ("init", "normal", ValueError),
    ],
)
def test_a_bad_value_is_named(field, value, error):
    with pytest.raises(error, match=field):
        LKAConfig(**{field: value})


@pytest.mark.parametrize(
    "config",
    [
        LKAConfig(),
        LKAConfig(kernel_size=(3, 31), sites=("mlp",), scale=0.5),
        LKAConfig(conv="stacked", num_stacked=3, kernel_size=3, placement="after_residual"),
        LKAConfig(conv="dilated", dilation=3, init="paper"),
    ],
)
def test_round_trips(config):
    assert LKAConfig.from_dict(config.to_dict()) == config
    assert LKAConfig.from_json(config.to_json()) == config
    assert LKAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(LKAConfig.from_dict(config.to_dict()))


def test_one_spelling_for_each_setting():
    assert LKAConfig(kernel_size=(7, 7)) == LKAConfig(kernel_size=7)
    assert LKAConfig(sites=["mlp", "attn"]) == LKAConfig()
    assert LKAConfig(scale=1) == LKAConfig(scale=1.0)


def test_from_dict_names_unknown_keys():
    with pytest.raises(ValueError, match=r"'kernel'.*accepted.*'kernel_size'"):
        LKAConfig.from_dict({"kernel": 7})
    with pytest.raises(TypeError, match="mapping"):
        LKAConfig.from_dict([("kernel_size", 7)])
    with pytest.raises(ValueError, match="property name"):
        LKAConfig.from_json("{")
