"""Who is measured: this library and what one would use instead of it.

A peer is a name, the memory format of its inputs and the call. Each gets inputs in the format it
is named after: turning them into it is not part of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lka_kernels import depthwise_conv2d, large_kernel_adapter, use_backend


class Peer(NamedTuple):
    """One way to compute the operator."""

    name: str
    memory_format: torch.memory_format
    call: Callable[..., Tensor]


def _ours(x, weight, bias, padding, dilation, method="auto") -> Tensor:
    return depthwise_conv2d(x, weight, bias, 1, padding, dilation, method=method)


def _ours_on_cuda(x, weight, bias, padding, dilation) -> Tensor:
    # "auto" leaves CUDA tensors to torch, which is the peer: ask for the compiled kernel.
    with use_backend("cuda"):
        return _ours(x, weight, bias, padding, dilation)


def _fft(x, weight, bias, padding, dilation) -> Tensor:
    return _ours(x, weight, bias, padding, dilation, method="fft")


def _torch(x, weight, bias, padding, dilation) -> Tensor:
    return F.conv2d(x, weight, bias, 1, padding, dilation, x.shape[1])


def depthwise_peers(device: str) -> list[Peer]:
    """The peers of ``depthwise_conv2d`` on ``device``, ours first in each memory format."""
    ours = _ours_on_cuda if device == "cuda" else _ours
    return [
        Peer("ours_contiguous", torch.contiguous_format, ours),
        Peer("ours_channels_last", torch.channels_last, ours),
        Peer("torch_contiguous", torch.contiguous_format, _torch),
        Peer("torch_channels_last", torch.channels_last, _torch),
        Peer("torch_fft", torch.contiguous_format, _fft),
    ]


def _adapter_through_torch(*arguments, **options) -> Tensor:
    with use_backend("torch"):
        return large_kernel_adapter(*arguments, **options)


def adapter_peers() -> list[Peer]:
    """The peers of ``large_kernel_adapter``: "auto" against the plain PyTorch reference."""
    return [
        Peer("ours", torch.contiguous_format, large_kernel_adapter),
        Peer("torch", torch.contiguous_format, _adapter_through_torch),
    ]
