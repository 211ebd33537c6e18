"""One training step of a network with adapters: variants that show what the adapters cost.

Random weights and images: what is computed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lka_kernels import LKAConfig, add_adapters, replace_depthwise_convs, use_backend
from lka_kernels.adapters import named_adapters

CLASSES = 5
BUFFERS = 3


class Network(NamedTuple):
    """A timm model, the layer that its images meet first, and whether its 7x7s are replaced."""

    name: str
    timm_name: str
    stem: str
    replaced: bool = False
    batch: int = 2
    side: int = 224

    @property
    def size(self) -> str:
        """The batch in words."""
        return f"({self.batch}, 3, {self.side}, {self.side})"


NETWORKS = [
    Network("swin-t", "swin_tiny_patch4_window7_224", "patch_embed.proj"),
    Network("convnext-t", "convnext_tiny", "stem.0", replaced=True),
]

# Images of a step: as many as two cores take in half a second, and as one trains with on a GPU.
BATCHES = {"cpu": 2, "cuda": 64}


def networks(device: str) -> list[Network]:
    """The networks with the batch of a device."""
    return [network._replace(batch=BATCHES[device]) for network in NETWORKS]


VARIANTS = {
    "ours": "adapters and head; adapters fused",
    "adapters_torch": "adapters and head; adapters through plain PyTorch",
    "all_torch": "adapters and head; adapters and depthwise convolutions through plain PyTorch",
    # Adapters in the first block make backward run through every block; so does this bias. What
    # "ours" takes longer than this is the price of the adapters themselves.
    "no_adapters": "head and the stem's bias; backward runs through the whole network",
    "head_only": "head; backward ends there",
}


def variants(network: Network) -> list[str]:
    """Without replaced convolutions "all_torch" is "adapters_torch"."""
    return [name for name in VARIANTS if name != "all_torch" or network.replaced]


def build(
    network: Network, chosen: list[str], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable], int]:
    """(for each variant a function that makes its step, number of buffers)."""
    torch.manual_seed(0)
    shape = (network.batch, 3, network.side, network.side)
    images = [torch.randn(shape, device=device, dtype=dtype) for _ in range(BUFFERS)]
    labels = torch.arange(network.batch, device=device) % CLASSES
    make = {
        name: lambda n=name: step(trainable(network, n).to(device, dtype), images, labels, n)
        for name in chosen
    }
    return make, BUFFERS


def trainable(network: Network, variant: str) -> nn.Module:
    """The model, with gradients for what the variant trains."""
    import timm

    model = timm.create_model(network.timm_name, num_classes=CLASSES)
    if network.replaced:
        replace_depthwise_convs(model)
    if variant in ("no_adapters", "head_only"):
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        if variant == "no_adapters":
            model.get_submodule(network.stem).bias.requires_grad_(True)
    else:
        add_adapters(model, LKAConfig(bottleneck_dim=8, kernel_size=7))
    if variant == "adapters_torch":
        for _, adapter in named_adapters(model):
            adapter.forward = _through_torch(adapter.forward)
    return model.train()


def _through_torch(function: Callable) -> Callable:
    # Backward follows the backend that forward took.
    def call(*arguments, **options):
        with use_backend("torch"):
            return function(*arguments, **options)

    return call


def step(model: nn.Module, images, labels, variant: str) -> Callable[[int], None]:
    """Forward, loss, backward and an AdamW step on what is trainable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def train(index: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels).backward()
        optimizer.step()

    return _through_torch(train) if variant == "all_torch" else train
