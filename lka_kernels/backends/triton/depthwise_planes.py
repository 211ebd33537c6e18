"""channels_last maps as planes: the launches in front of and behind kernels that read rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import tiles
from lka_kernels.backends.triton.depthwise_geometry import INT32_END, channels_in_lanes
from lka_kernels.backends.triton.depthwise_planes_kernel import move_planes_kernel
from lka_kernels.backends.triton.launch import Launch


def as_planes(t: Tensor, device: torch.device | str | None = None) -> Tensor:
    """``t``, or a tensor of its shape whose planes are contiguous where those of ``t`` are not.

    On the device "meta" it takes no memory: enough to decide by.
    """
    if not channels_in_lanes(t):
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=device or t.device)


def move(source: Tensor, result: Tensor) -> list[Launch]:
    """The launch that copies between ``t`` and ``as_planes(t)``, either way; none for itself."""
    if source is result:
        return []
    to_planes = channels_in_lanes(source)
    in_lanes = source if to_planes else result
    batch, channels, height, width = source.shape
    stride_b, _, stride_y, stride_x = in_lanes.stride()
    block_c, block_p = tiles.move_tiles(channels, height * width)
    programs = batch * tiles.ceil_div(channels, block_c) * tiles.ceil_div(height * width, block_p)
    return [
        Launch(
            move_planes_kernel,
            programs,
            (source, result, channels, width, height * width, stride_b, stride_y, stride_x),
            {
                "TO_PLANES": to_planes,
                "BLOCK_P": block_p,
                "BLOCK_C": block_c,
                "WIDE": height * width + block_p >= INT32_END,
            },
            4,
            3,
        )
    ]
