"""Who is measured: this library, and what one would use instead of it.

All peers of a case get their input in the case's layout and give their result in it. One that
computes in another layout converts, and the conversion is part of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda_peers, torch_fft
from lka_kernels import available_backends, depthwise_conv2d, large_kernel_adapter, use_backend
from lka_kernels.fft_plan import plan_dimension

OURS = "ours"


class Peer(NamedTuple):
    """One way to compute the operator."""

    name: str
    call: Callable[..., Tensor]
    computes_in: torch.memory_format | None = None  # None: in whatever it is given
    compiled: str | None = None  # a mode of torch.compile
    graphed: bool = False  # captured into a CUDA graph
    # Why it does not serve a shape in a dtype, or None.
    refuses: Callable[[object, torch.dtype], str | None] = lambda shape, dtype: None
    full_only: bool = False


def missing(peer: Peer, shape, dtype: torch.dtype, suite: str) -> str | None:
    """Why ``peer`` is not measured, or None."""
    if peer.full_only and suite != "full":
        return "only in --suite full"
    return peer.refuses(shape, dtype)


# --- depthwise convolution ----------------------------------------------------------------------


def _ours(x, weight, bias, padding, dilation, method="auto") -> Tensor:
    return depthwise_conv2d(x, weight, bias, 1, padding, dilation, method=method)


def _ours_in_triton(x, weight, bias, padding, dilation, method="auto") -> Tensor:
    with use_backend("triton"):
        return _ours(x, weight, bias, padding, dilation, method)


def _direct_in_triton(x, weight, bias, padding, dilation) -> Tensor:
    return _ours_in_triton(x, weight, bias, padding, dilation, method="direct")


def _implicit_gemm(x, weight, bias, padding, dilation) -> Tensor:
    return _ours_in_triton(x, weight, bias, padding, dilation, method="implicit_gemm")


def _ours_on_cuda(x, weight, bias, padding, dilation, method="auto") -> Tensor:
    with use_backend("cuda"):
        return _ours(x, weight, bias, padding, dilation, method)


def _fft_on_cuda(x, weight, bias, padding, dilation) -> Tensor:
    return _ours_on_cuda(x, weight, bias, padding, dilation, method="fft")


def _status_refuses(backend: str) -> Callable[[object, torch.dtype], str | None]:
    def refuses(shape, dtype) -> str | None:
        status = available_backends()[backend]
        return None if status == "ready" else status

    return refuses


_cuda_refuses, _triton_refuses = _status_refuses("cuda"), _status_refuses("triton")


def _cuda_fft_refuses(shape, dtype) -> str | None:
    for n, k, p in zip((shape.height, shape.width), shape.kernel, shape.padding, strict=True):
        if plan_dimension(n, n, k, 1, p, shape.dilation).fft_size > 128:
            return "transforms of more than 128 rows or columns"
    return _cuda_refuses(shape, dtype)


def _direct(x, weight, bias, padding, dilation) -> Tensor:
    return _ours(x, weight, bias, padding, dilation, method="direct")


def _fft(x, weight, bias, padding, dilation) -> Tensor:
    return _ours(x, weight, bias, padding, dilation, method="fft")


def _torch(x, weight, bias, padding, dilation) -> Tensor:
    return F.conv2d(x, weight, bias, 1, padding, dilation, x.shape[1])


def depthwise_peers(device: str, methods: bool) -> list[Peer]:
    """The peers of ``depthwise_conv2d``, ours first: the library as it is without a choice.

    ``methods`` adds the methods that "auto" chooses from on a CPU. On a GPU what it chooses from is
    always there.
    """
    found = [
        Peer(OURS, _ours),
        Peer("torch_contiguous", _torch, torch.contiguous_format),
        Peer("torch_channels_last", _torch, torch.channels_last),
        Peer("torch_fft", torch_fft.depthwise_conv2d, torch.contiguous_format),
    ]
    if methods:
        direct = _direct_in_triton if device == "cuda" else _direct
        found += [Peer("ours_direct", direct), Peer("ours_fft", _fft)]
    if methods and device == "cuda":
        found.append(Peer("ours_implicit_gemm", _implicit_gemm))
    if device == "cuda":
        found += [
            Peer("ours_triton", _ours_in_triton, refuses=_triton_refuses),
            Peer("ours_cuda", _ours_on_cuda, refuses=_cuda_refuses),
            Peer("ours_cuda_fft", _fft_on_cuda, refuses=_cuda_fft_refuses),
            Peer("torch_compiled", _torch, compiled="max-autotune-no-cudagraphs"),
            *(
                Peer(name, call, torch.contiguous_format, refuses=refuses)
                for name, call, refuses in cuda_peers.DEPTHWISE
            ),
        ]
    return found


class _Convert(torch.autograd.Function):
    """Another memory format, and back again for the gradient, which autograd would leave as is."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.there, ctx.back = there, back
        return x.contiguous(memory_format=there)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=ctx.back), None, None


def compiled(peer: Peer) -> Callable[..., Tensor]:
    """The call of ``peer``, through torch.compile if it says so."""
    if peer.compiled is None:
        return peer.call
    # Each case anew: after a few shapes torch.compile gives a function up.
    torch.compiler.reset()
    return torch.compile(peer.call, mode=peer.compiled, dynamic=False, fullgraph=True)


def in_layout(peer: Peer, layout: torch.memory_format) -> Callable[..., Tensor]:
    """The call of ``peer`` on inputs in ``layout``, conversions included."""
    call = compiled(peer)
    native = peer.computes_in
    if native is None or native == layout:
        return call

    def converted(x, *arguments):
        y = call(_Convert.apply(x, native, layout), *arguments)
        return _Convert.apply(y, layout, native)

    return converted


# --- adapter ------------------------------------------------------------------------------------


def eager_adapter(x, down, down_bias, conv, conv_bias, up, up_bias, prefix, layout) -> Tensor:
    """The adapter with its residual as one writes it in PyTorch, convolving in ``layout``.

    Tokens (B, P+N, C) seen as images are channels_last without a copy; contiguous images are one.
    """
    z = F.gelu(F.linear(x, down, down_bias))
    side = round((x.shape[1] - prefix) ** 0.5)
    images = z[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    images = images.contiguous(memory_format=layout)
    images = F.conv2d(images, conv, conv_bias, padding="same", groups=conv.shape[0])
    c = images.flatten(2).transpose(1, 2)
    if prefix:
        center = conv[:, 0, conv.shape[2] // 2, conv.shape[3] // 2]
        c = torch.cat([z[:, :prefix] * center + conv_bias, c], dim=1)
    return x + F.linear(c, up, up_bias)


def _ours_adapter(x, *weights_and_prefix) -> Tensor:
    *weights, prefix = weights_and_prefix
    return large_kernel_adapter(x, *weights, num_prefix_tokens=prefix, residual=x)


def _ours_adapter_in_triton(*arguments) -> Tensor:
    with use_backend("triton"):
        return _ours_adapter(*arguments)


def _ours_adapter_on_cuda(*arguments) -> Tensor:
    with use_backend("cuda"):
        return _ours_adapter(*arguments)


def _eager_contiguous(*arguments) -> Tensor:
    return eager_adapter(*arguments, torch.contiguous_format)


def _eager_channels_last(*arguments) -> Tensor:
    return eager_adapter(*arguments, torch.channels_last)


def adapter_peers(device: str) -> list[Peer]:
    """The peers of ``large_kernel_adapter``, ours first."""
    on_gpu = device == "cuda"
    mode = "max-autotune-no-cudagraphs" if on_gpu else "default"
    found = [
        Peer(OURS, _ours_adapter),
        Peer("eager_contiguous", _eager_contiguous),
        Peer("eager_channels_last", _eager_channels_last),
        # Compilation takes a minute for each shape on a small CPU.
        Peer("compiled", _eager_channels_last, compiled=mode, full_only=not on_gpu),
    ]
    if on_gpu:
        found += [
            Peer("ours_triton", _ours_adapter_in_triton, refuses=_triton_refuses),
            Peer("ours_cuda", _ours_adapter_on_cuda, refuses=_cuda_refuses),
            Peer("ours_graphed", _ours_adapter, graphed=True),
            Peer("eager_graphed", _eager_channels_last, graphed=True),
        ]
    return found
