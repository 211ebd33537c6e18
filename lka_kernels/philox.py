"""Counter-based random numbers, the same on every backend.

Philox 4×32 with ten rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011). Element ``i`` of a dropout mask depends on the seed and on ``i`` alone, so the
backward pass replays it without storing it, whatever order or tiling a kernel uses:
key = the seed's low and high 32 bits, counter = (i // 4 low, i // 4 high, 0, 0), lane = i % 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``; int64 holds no unsigned 64-bit product, so halve ``a``."""
    low_product = (a & 0xFFFF) * b
    high_product = (a >> 16) * b
    middle = (low_product >> 16) + (high_product & 0xFFFF)
    low = ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)
    return (high_product >> 16) + (middle >> 16), low


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 tensors) from a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_ROUND_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_ROUND_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def drop_threshold(p: float) -> int:
    """An element is dropped when its 32-bit word is below this number."""
    return min(math.floor(p * 2**32), 2**32)


def new_seed(device: torch.device) -> Tensor:
    """A seed (1,) int64 from torch's generator of ``device``; obeys ``torch.manual_seed``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_multiplier(seed: Tensor, shape, p: float) -> Tensor:
    """The factor (0 or 1 / (1 - p), float64) of every element of a tensor of ``shape``.

    Elements are numbered in row-major order.
    """
    numel = math.prod(shape)
    group = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(group)
    words = philox_4x32(
        (group & _MASK, group >> 32, zero, zero),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    words = torch.stack(words, dim=1).flatten()[:numel].view(shape)
    keep = words >= drop_threshold(p)
    factor = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
    return keep.to(torch.float64) * factor
