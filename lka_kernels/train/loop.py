"""One epoch of training, one evaluation pass, and the schedule between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import TrainError

# (indices, input on the device, labels on the device) of each batch.
Batches = Iterable[tuple[np.ndarray, Tensor, Tensor]]


def learning_rate(step: int, total: int, warmup: int, peak: float, least: float) -> float:
    """Linear warm-up over ``warmup`` steps, then a cosine from ``peak`` to ``least``.

    The first step has ``peak / (warmup + 1)``: a rate of zero would waste it.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - 1 - warmup)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that learn; vectors (biases, norms) are not decayed."""
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise TrainError("no parameter of the model learns")
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)


def train_epoch(
    model: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    rates: Iterator[float],
    clip_grad: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[float, float]:
    """Trains on every batch once.

    Args:
        rates: one learning rate a step.
        progress: called with the number of images after each step.

    Returns:
        Mean loss and top-1 over the epoch, measured while the weights moved.

    Raises:
        TrainError: the loss is not finite.
    """
    loss_sum, hits, seen = 0.0, 0, 0
    for _, images, labels in batches:
        rate = next(rates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(images).float()
        loss = F.cross_entropy(
            logits, labels, weight=class_weights, label_smoothing=label_smoothing
        )
        value = loss.item()
        if not math.isfinite(value):
            raise TrainError(
                f"the loss became {value} after {seen} images of the epoch: lower --lr, or try "
                "--amp off"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_grad:
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()
        loss_sum += value * len(labels)
        hits += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
        progress(len(labels))
    return loss_sum / seen, hits / seen


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor],
    batches: Batches,
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """(N, classes) float32 logits on the CPU, in the order of the batches."""
    parts = []
    for _, images, labels in batches:
        parts.append(model(images).float().cpu())
        progress(len(labels))
    return torch.cat(parts)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Inverse class frequencies with a mean of 1 over the images: (classes,) float32."""
    counts = torch.bincount(labels, minlength=classes).float()
    return counts.sum() / (classes * counts)
