"""What the trainer asks of a method, and the parts that most methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class Method:
    """One way of training a model.

    Attributes:
        name: as ``--method`` takes it.
        summary: one line for the help text.
        options: dataclass of the method's options; the command line shows them as
            ``--NAME.OPTION``.
        apply: takes a timm model and the options, adds what the method adds, sets
            ``requires_grad`` of every parameter, and returns the model.
        train_mode: puts the model into training mode.
        save: writes what was trained to a safetensors path.
        load: reads that file back into a model that ``apply`` has prepared.
        file_name: the usual name of that file.
    """

    name: str
    summary: str
    options: type
    apply: Callable[[nn.Module, Any], nn.Module]
    train_mode: Callable[[nn.Module], None]
    save: Callable[[nn.Module, Path], None]
    load: Callable[[nn.Module, Path], None]
    file_name: str


def freeze(model: nn.Module) -> None:
    """Stops every parameter from learning."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def unfreeze_head(model: nn.Module) -> None:
    """Lets the classifier of a timm model learn."""
    found = model.get_classifier()
    for head in found if isinstance(found, tuple | list) else [found]:
        for parameter in head.parameters():
            parameter.requires_grad_(True)


def train_mode_frozen_norms(model: nn.Module) -> None:
    """Training mode in which a frozen batch norm keeps its running statistics.

    In training mode a batch norm would use and update batch statistics even though its weights
    are frozen: the frozen backbone would change with the data.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            module.train(trained)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that learn, on the CPU, contiguous."""
    return {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the parameters that learn as safetensors."""
    from safetensors.torch import save_file

    save_file(trained_state(model), path, metadata={"format": "pt"})


def load_named(model: nn.Module, path: Path) -> None:
    """Reads a file of :func:`save_trained`; ValueError names tensors the model does not have."""
    from safetensors.torch import load_file

    unexpected = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} holds tensors the model does not have: {unexpected[:3]}")
