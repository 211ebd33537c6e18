"""Runs a frozen backbone once, so that a linear probe trains on stored features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .batches import Images, in_order
from .errors import TrainError


class PooledFeatures(nn.Module):
    """A timm model up to its classifier: (B, 3, H, W) to (B, features)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model.get_classifier(), nn.Linear):
            raise TrainError(
                "--cache_features needs a model whose classifier is one nn.Linear, not "
                f"{type(model.get_classifier()).__name__}"
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


@torch.no_grad()
def compute_features(
    forward: Callable[[Tensor], Tensor], images: Images, batch_size: int
) -> Tensor:
    """(N, features) float32 on the CPU; ``forward`` takes a uint8 (B, 3, H, W) batch."""
    parts = images.batches(in_order(len(images), batch_size))
    return torch.cat([forward(batch).float().cpu() for _, batch in parts])
