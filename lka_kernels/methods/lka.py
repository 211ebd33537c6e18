"""Large Kernel Adapters beside the blocks of a frozen backbone (arXiv 2506.19118)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from .base import Method, train_mode_frozen_norms


@dataclass(frozen=True)
class LKAOptions:
    """Options of the adapters: those of lka_kernels.LKAConfig.

    Args:
        bottleneck_dim: width of the adapter between its two projections
        kernel_size: side of the depthwise kernel, odd
        conv: "none" is the vanilla adapter, without a convolution
        dilation: spacing of the taps with conv "dilated"
        num_stacked: convolutions in sequence with conv "stacked"
        placement: beside the sub-layer, or after it before or after the residual sum
        sites: sub-layers of a block that get an adapter
        activation: function between the two projections
        activation_position: before the convolution, after it, or both
        dropout: probability ahead of the up-projection
        scale: factor of the adapter's output
        init: "zero" starts as the unchanged backbone, "identity" also as the adapter without
            convolution, "paper" is trunc_normal(0.02)
    """

    bottleneck_dim: int = 8
    kernel_size: int = 7
    conv: Literal["depthwise", "dilated", "stacked", "none"] = "depthwise"
    dilation: int = 1
    num_stacked: int = 1
    placement: Literal["parallel", "before_residual", "after_residual"] = "parallel"
    sites: tuple[str, ...] = ("attn", "mlp")
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "none"] = "gelu"
    activation_position: Literal["pre", "post", "both"] = "pre"
    dropout: float = 0.1
    scale: float = 1.0
    # Not LKAConfig's "zero": a random 7x7 filter cost 2.6 to 4.5 points (docs/results.md).
    init: Literal["zero", "identity", "paper"] = "identity"


def apply(model: nn.Module, options: LKAOptions) -> nn.Module:
    """Adds the adapters and freezes all but them and the classifier."""
    from lka_kernels import LKAConfig, add_adapters

    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    values["sites"] = tuple(values["sites"])
    return add_adapters(model, LKAConfig(**values), train_head=True)


def save(model: nn.Module, path: Path) -> None:
    """Writes adapters, classifier and the adapters' configuration."""
    from lka_kernels import save_adapters

    save_adapters(model, path)


def load(model: nn.Module, path: Path) -> None:
    """Reads a file of :func:`save` into a model that :func:`apply` has prepared."""
    from lka_kernels import load_adapters

    load_adapters(model, path)


METHOD = Method(
    name="lka",
    summary="Large Kernel Adapters and the classifier, on a frozen backbone",
    options=LKAOptions,
    apply=apply,
    train_mode=train_mode_frozen_norms,
    save=save,
    load=load,
    file_name="adapter.safetensors",
)
