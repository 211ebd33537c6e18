"""The whole state of a run after an epoch, and how to carry on from it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import TrainError
from .files import write_torch

NAME = "checkpoint.pt"
_VERSION = 1


def random_states() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, in types that need no pickle."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what :func:`random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def changing_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything of the model that training may change: trained parameters and all buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in frozen}


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    history: list[dict[str, float]],
    identity: dict[str, str],
) -> None:
    """Writes ``checkpoint.pt`` atomically.

    Args:
        epoch: number of finished epochs.
        history: one row for every finished epoch.
        identity: fingerprints of what the checkpoint relies on but does not hold (the frozen
            weights, the images): compared on resume.
    """
    write_torch(
        folder / NAME,
        {
            "version": _VERSION,
            "epoch": epoch,
            "model": changing_state(model),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "random": random_states(),
            "identity": identity,
        },
    )


def load(folder: Path) -> dict[str, Any] | None:
    """Reads ``checkpoint.pt``; None when there is none. No pickled code is run."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["version"]
    except Exception as error:
        raise TrainError(f"checkpoint {path} cannot be read: {error}") from error
    if version != _VERSION:
        raise TrainError(f"checkpoint {path} is of version {version}; this is {_VERSION}")
    return content


def restore(
    content: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
) -> tuple[int, list[dict[str, float]]]:
    """Puts a checkpoint into a model and optimizer built as for a fresh run.

    Returns:
        Number of finished epochs, and their rows.

    Raises:
        TrainError: the frozen weights or the images are not those the run was started with.
    """
    for what, value in identity.items():
        if content["identity"].get(what) != value:
            raise TrainError(
                f"the {what} changed since the run was started: continuing would mix two runs "
                "(start again with --overwrite)"
            )
    wanted = changing_state(model).keys()
    if wanted != content["model"].keys():
        odd = sorted(wanted ^ content["model"].keys())
        raise TrainError(f"the checkpoint is of another model: {', '.join(odd[:3])}")
    model.load_state_dict(content["model"], strict=False)
    optimizer.load_state_dict(content["optimizer"])
    restore_random_states(content["random"])
    return content["epoch"], content["history"]
