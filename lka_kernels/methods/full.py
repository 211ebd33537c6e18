"""Full fine-tuning: every parameter learns, batch norms included."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .base import Method, NoOptions, load_named


def apply(model: nn.Module, options: NoOptions) -> nn.Module:
    """Lets every parameter learn."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def save(model: nn.Module, path: Path) -> None:
    """Writes parameters and buffers: the running statistics have learnt too."""
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


METHOD = Method(
    name="full",
    summary="every parameter of the model",
    options=NoOptions,
    apply=apply,
    train_mode=lambda model: model.train() and None,
    save=save,
    load=load_named,
    file_name="model.safetensors",
)
