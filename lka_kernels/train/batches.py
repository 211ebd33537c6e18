"""Batches of images from memory or disk, in an order and with augmentation fixed by the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import fit, read_rgb


@dataclass(frozen=True)
class Images:
    """The images of one half: from ``pixels`` if they were kept, else read again when needed.

    Attributes:
        paths: one file an image.
        labels: (N,) int64 on the CPU.
        pixels: (N, size, size, 3) uint8, or None.
        size: side in pixels.
        resize: how images are made square, see :func:`lka_kernels.train.images.fit`.
        sixteen_bit_max: value that counts as white in 16-bit images.
        workers: decoding threads.
    """

    paths: list[Path]
    labels: Tensor
    pixels: np.ndarray | None
    size: int
    resize: str = "squash"
    sixteen_bit_max: int = 65535
    workers: int = 2

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, index: int) -> np.ndarray:
        return fit(read_rgb(self.paths[index], self.sixteen_bit_max), self.size, self.resize)

    def batches(self, orders: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yields (indices, uint8 (B, 3, size, size) in channels_last) for each array of indices."""
        if self.pixels is not None:
            for indices in orders:
                yield indices, torch.from_numpy(self.pixels[indices]).permute(0, 3, 1, 2)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            # One batch is read ahead while the model works on the one before it.
            ahead = [pool.submit(self._read, i) for i in orders[0]] if len(orders) else []
            for place, indices in enumerate(orders):
                current = ahead
                following = orders[place + 1] if place + 1 < len(orders) else ()
                ahead = [pool.submit(self._read, i) for i in following]
                stacked = np.stack([future.result() for future in current])
                yield indices, torch.from_numpy(stacked).permute(0, 3, 1, 2)


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled index arrays of one epoch; a function of seed and epoch only.

    A last batch of a single image is left out, unless all are: batch statistics are undefined
    on it.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    parts = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return parts[:-1] if len(parts) > 1 and len(parts[-1]) == 1 < batch_size else parts


def in_order(count: int, batch_size: int) -> list[np.ndarray]:
    """Index arrays of an evaluation pass."""
    return [np.arange(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 or float (B, 3, H, W) in 0..255 to float32 with the model's mean and deviation."""
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1) * 255.0
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1) * 255.0
    return (images.float() - shift) / scale


def augment(images: Tensor, indices: np.ndarray, kind: str, seed: int, epoch: int) -> Tensor:
    """Augments a batch; what an image gets depends on (seed, epoch, index) and nothing else.

    "flip" mirrors left-right in half of the cases. "affine" adds rotation of up to 10 degrees,
    scale 0.85 to 1.15, shift of up to 5 % of the side, contrast and brightness of up to 10 %.

    Args:
        images: (B, 3, H, W) uint8.
        indices: (B,) index of each image in its half.

    Returns:
        uint8 for "none" and "flip", float32 in 0..255 for "affine".
    """
    if kind == "none":
        return images
    # Philox is counter-based: every (epoch, index) has an independent stream at no set-up cost.
    draws = np.stack(
        [
            np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, int(i)])).random(7)
            for i in indices
        ]
    )
    flips = torch.from_numpy(draws[:, 0] < 0.5)
    if kind == "flip":
        return torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    signed = torch.from_numpy(draws[:, 1:] * 2 - 1).float()
    angle = signed[:, 0] * (10 * torch.pi / 180)
    scale = 1 + 0.15 * signed[:, 1]
    mirror = torch.where(flips, -1.0, 1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # Shifts are in units of half the side, as affine_grid has them: 0.1 is 5 % of the side.
    rows = [
        torch.stack([cos * mirror, -sin, 0.1 * signed[:, 2]], 1),
        torch.stack([sin * mirror, cos, 0.1 * signed[:, 3]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, align_corners=False)
    contrast = (1 + 0.1 * signed[:, 4]).view(-1, 1, 1, 1)
    brightness = (25.5 * signed[:, 5]).view(-1, 1, 1, 1)
    return ((moved - 127.5) * contrast + 127.5 + brightness).clamp(0, 255)
