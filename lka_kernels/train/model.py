"""Builds the timm model of a run, with its weights and the normalisation they expect."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .errors import TrainError
from .weights import LITE0, lite0_imagenet_weights, load_file, load_into


@dataclass
class Backbone:
    """A timm model with a fresh classifier.

    Attributes:
        model: takes (B, 3, size, size) float32, returns (B, classes) logits.
        size: side of its input in pixels.
        mean, std: normalisation of the three channels, for values in 0..1.
    """

    model: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def input_size(name: str, wanted: int) -> int:
    """``wanted``, or the model's own input side where that is 0. TrainError: unknown model."""
    return wanted or _default_cfg(name).input_size[-1]


def build(name: str, weights: str, classes: int, wanted_size: int = 0) -> Backbone:
    """Creates the model; its random parts come from torch's global generator.

    Args:
        name: timm model name.
        weights: "pretrained", "random", or a safetensors file.
        classes: outputs of the classifier.
        wanted_size: side of the input in pixels; 0 takes the model's own.

    Raises:
        TrainError: unknown model, unsuitable size, weights that are absent or do not fit.
    """
    import timm

    cfg = _default_cfg(name)
    size = wanted_size or cfg.input_size[-1]
    options: dict = {"num_classes": classes}
    if cfg.fixed_input_size and size != cfg.input_size[-1]:
        options["img_size"] = size
    from_timm = weights == "pretrained" and name.split(".")[0] != LITE0
    try:
        model = timm.create_model(name, pretrained=from_timm, **options)
    except Exception as error:  # timm, huggingface_hub and the network fail in many ways
        if from_timm:
            raise TrainError(
                f"--weights pretrained: timm has no weights of {name} at hand ({error}); give "
                "--weights FILE.safetensors, or --weights random"
            ) from error
        raise TrainError(f"--model {name} at {size} pixels: {error}") from error
    if weights not in ("pretrained", "random"):
        load_into(model, load_file(weights), classifier_names(model))
    elif weights == "pretrained" and not from_timm:
        load_into(model, lite0_imagenet_weights(), classifier_names(model))
    backbone = Backbone(model, size, tuple(cfg.mean), tuple(cfg.std))
    _check_size(backbone, name)
    return backbone


def classifier_modules(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model; distilled models have two."""
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple | list) else [found]


def classifier_names(model: nn.Module) -> list[str]:
    """Names of :func:`classifier_modules` in the model."""
    heads = {id(head) for head in classifier_modules(model)}
    return [name for name, module in model.named_modules() if id(module) in heads]


def frozen_fingerprint(model: nn.Module) -> str:
    """Hash of all parameters that are not trained: what a checkpoint leaves out but relies on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            # Flattened in logical order, so that the memory format does not count.
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _default_cfg(name: str):
    import timm

    cfg = None
    if timm.is_model(name):
        with contextlib.suppress(RuntimeError):  # a tag that the model does not have
            cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None:
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise TrainError(f"--model {name}: timm knows no such model{hint}")
    return cfg


@torch.no_grad()
def check_single_images(network: nn.Module, train_mode: Callable, size: int) -> None:
    """Trains on no batch of one image what cannot be: TrainError, before the first epoch.

    A batch norm that learns needs several values a channel. The network stays as it is, and so do
    torch's generators.
    """
    copied = copy.deepcopy(network)
    train_mode(copied)
    try:
        with torch.random.fork_rng(devices=[]):
            copied(torch.zeros(1, 3, size, size))
    except ValueError as error:
        raise TrainError(
            f"--batch_size 1: the model cannot be trained on single images ({error}); "
            "give at least 2"
        ) from error


@torch.no_grad()
def _check_size(backbone: Backbone, name: str) -> None:
    """One empty image: a size the model cannot take fails here, not in the first epoch."""
    was_training = backbone.model.training
    backbone.model.eval()
    try:
        backbone.model(torch.zeros(1, 3, backbone.size, backbone.size))
    except Exception as error:
        raise TrainError(f"--model {name} cannot take {backbone.size} pixels: {error}") from error
    backbone.model.train(was_training)
