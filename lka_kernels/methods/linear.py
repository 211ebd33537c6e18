"""Linear probe: the classifier learns on the features of the frozen backbone."""

from __future__ import annotations

from torch import nn

from .base import Method, NoOptions, freeze, load_named, save_trained, unfreeze_head


def apply(model: nn.Module, options: NoOptions) -> nn.Module:
    """Freezes all but the classifier."""
    freeze(model)
    unfreeze_head(model)
    return model


def train_mode(model: nn.Module) -> None:
    """Only the classifier in training mode: features are those of inference."""
    model.eval()
    found = model.get_classifier()
    for head in found if isinstance(found, tuple | list) else [found]:
        head.train()


METHOD = Method(
    name="linear",
    summary="the classifier alone, on a frozen backbone",
    options=NoOptions,
    apply=apply,
    train_mode=train_mode,
    save=save_trained,
    load=load_named,
    file_name="head.safetensors",
)
