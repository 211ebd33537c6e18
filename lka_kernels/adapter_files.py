"""Adapters on disk: one safetensors file, whose header holds the configuration as JSON."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lka_kernels.adapters import (
    adapter_state_dict,
    has_adapters,
    head_modules,
    install,
    plan_injection,
    unwrapped,
)
from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import PlannedBlock

FORMAT = "lka_kernels.adapters.v1"


def save_adapters(model: nn.Module, path) -> None:
    """Save the adapters of ``model``, and the head trained with them, to one safetensors file.

    The file holds ``adapter_state_dict(model)`` and, as JSON in its header, the configuration
    and whether a head is included. It is written under another name and renamed when complete,
    so that ``path`` is never half a file, and what stood there before survives a failure.

    Raises:
        ValueError: the model has no adapters.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; FileNotFoundError and IsADirectoryError among them.
    """
    safetensors = _safetensors()
    model = unwrapped(model)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file to write; {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists; got {path}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_state_dict(model).items()}
    if any(m.training and not _trainable(m) for m in _batch_norms(model)):
        warnings.warn(
            "frozen BatchNorm layers are in training mode, so that their running statistics "
            "change, and the adapter file does not hold them: see freeze_batch_norm",
            stacklevel=2,
        )
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.lka_config.to_dict()),
        "train_head": json.dumps(model.lka_train_head),
    }
    # Tied tensors would share memory, which safetensors refuses.
    data = safetensors.save({k: v.clone() for k, v in tensors.items()}, metadata)
    _write_atomically(path, data)


def load_adapters(model: nn.Module, path) -> nn.Module:
    """Load what ``save_adapters`` wrote into ``model``, in place.

    A model without adapters gets those of the file first, as ``add_adapters`` does; a model that
    has adapters must have been given the same configuration. Nothing changes unless everything
    fits.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no file ``path``.
        ValueError: the file is damaged or not of ``save_adapters``, the configurations differ,
            or keys are missing, unexpected or of another shape; the message names them.
        TypeError, ImportError: as ``add_adapters``; also where safetensors is not installed.
    """
    tensors, config, train_head = _read(Path(path))
    base = unwrapped(model)
    if has_adapters(base):
        _check_same_config(base, config, path)
        expected = adapter_state_dict(base)
        _check_fit(expected, tensors, path)
    else:
        planned = plan_injection(base, config, train_head)
        expected = {}
        for change in planned:
            if not isinstance(change, PlannedBlock):
                continue
            for name, adapter in change.adapters.items():
                if adapter is not None:
                    expected |= _prefixed(f"{change.name}.{name}".lstrip("."), adapter)
        if train_head:
            for name, head in head_modules(base):
                expected |= _prefixed(name, head)
        _check_fit(expected, tensors, path)
        install(base, planned, config, train_head)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])
    return model


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}


def _batch_norms(model: nn.Module):
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "save_adapters and load_adapters need safetensors (pip install safetensors), which "
            f"does not import: {error}"
        ) from error
    return safetensors.torch


def _read(path: Path) -> tuple[dict[str, Tensor], LKAConfig, bool]:
    """The tensors, the configuration and whether a head is included."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that save_adapters wrote; got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path {path} is not a complete safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path {path} was not written by save_adapters: the format in its header must be "
            f"{FORMAT!r}; got {metadata.get('format')!r}"
        )
    try:
        config = LKAConfig.from_dict(json.loads(metadata["config"]))
        train_head = json.loads(metadata["train_head"])
        if not isinstance(train_head, bool):
            raise ValueError(f"train_head must be true or false; got {train_head!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path {path} has a damaged configuration: {error}") from error
    return tensors, config, train_head


def _check_same_config(model: nn.Module, config: LKAConfig, path) -> None:
    own, other = model.lka_config.to_dict(), config.to_dict()
    differing = [
        f"{name}={other[name]!r} in the file, {own[name]!r} in the model"
        for name in own
        if own[name] != other[name]
    ]
    if differing:
        raise ValueError(
            f"path {path} holds adapters of another configuration: {'; '.join(differing)}"
        )


def _check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], path) -> None:
    """Raise unless the file has the keys and shapes of the model, naming every difference."""
    problems = []
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    if missing:
        problems.append(f"missing from the file: {', '.join(missing)}")
    if unexpected:
        problems.append(f"not in the model: {', '.join(unexpected)}")
    problems += [
        f"{key} must be {tuple(tensor.shape)}; the file has {tuple(found[key].shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"path {path} does not fit the model: {'; '.join(problems)}")


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the permissions that open() would.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
