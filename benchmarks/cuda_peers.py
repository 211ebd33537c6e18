"""Peers that run on NVIDIA GPUs only: other libraries' depthwise convolutions, CUDA graphs.

Each library is imported when it is first called, and skipped with a reason where it is not
installed. ``cases.run`` compares every peer's first result with ours, so that a wrong call of a
library is an error and not a number.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F


def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


# --- fused_fft_conv2d of NVIDIA's subquadratic_ops_torch ----------------------------------------


def fused_fft(x, weight, bias, padding, dilation):
    """One launch for transform, product and inverse; crops at fft_size // 2 and convolves.

    So the kernel is flipped, and padded at its top and left until its centre is there.
    """
    from subquadratic_ops_torch.fused_fft_conv2d import fused_fft_conv2d

    size = _fused_fft_size(x.shape[2], x.shape[3], weight.shape[2:])
    top, left = (size // 2 - k // 2 for k in weight.shape[2:])
    kernel = F.pad(weight[:, 0].flip(1, 2), (left, 0, top, 0)).unsqueeze(0)
    y = fused_fft_conv2d(x.contiguous(), kernel.contiguous(), fft_size=size)
    return y + bias[:, None, None]


def _fused_fft_size(height, width, kernel) -> int:
    return max(8, 1 << (max(2 * height, 2 * width, *kernel) - 1).bit_length())


def _fused_fft_refuses(shape, dtype) -> str | None:
    if shape.dilation != 1:
        return "fused_fft_conv2d has no dilation"
    if _fused_fft_size(shape.height, shape.width, shape.kernel) > 128:
        return "fused_fft_conv2d takes maps up to 64x64"
    return _not_installed("subquadratic_ops_torch")


# --- RepLKNet's CUTLASS extension ---------------------------------------------------------------


class _RepLKNet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        import _depthwise_conv2d_implicit_gemm_C as extension

        ctx.save_for_backward(x, weight)
        ctx.suffix = "fp16" if x.dtype == torch.float16 else "fp32"
        return getattr(extension, f"forward_{ctx.suffix}")(x, weight)

    @staticmethod
    def backward(ctx, grad):
        import _depthwise_conv2d_implicit_gemm_C as extension

        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = getattr(extension, f"backward_data_{ctx.suffix}")(grad, weight)
        if ctx.needs_input_grad[1]:
            dw = getattr(extension, f"backward_filter_{ctx.suffix}")(grad, x, weight)
        return dx, None if dw is None else dw.to(weight.dtype)


def replknet(x, weight, bias, padding, dilation):
    """RepLKNet's implicit GEMM, "same" padding."""
    return _RepLKNet.apply(x, weight) + bias[:, None, None]


def _replknet_refuses(shape, dtype) -> str | None:
    if shape.dilation != 1 or shape.kernel[0] != shape.kernel[1]:
        return "RepLKNet's extension takes square kernels without dilation"
    if dtype not in (torch.float32, torch.float16):
        return "RepLKNet's extension takes float32 and float16"
    return _not_installed("_depthwise_conv2d_implicit_gemm_C")


# --- FlashFFTConv -------------------------------------------------------------------------------


def as_sequences(x, weight):
    """(sequences, kernels, crop): a 2-D correlation as a causal 1-D convolution of its rows.

    Rows are followed by as many zeros as the kernel reaches past them, and the map by as many such
    rows; the flipped kernel's rows are as far apart. ``crop`` takes the map out of the result.
    """
    height, width = x.shape[2:]
    rows, columns = (k // 2 for k in weight.shape[2:])
    padded = F.pad(x, (0, columns, 0, rows))
    kernel = F.pad(weight[:, 0].flip(1, 2), (0, width + columns - weight.shape[3]))

    def crop(y):
        # The kernel's centre is read this much later; what wraps around is cropped.
        late = rows * (width + columns) + columns
        y = F.pad(y[:, :, late:], (0, late))
        return y.unflatten(2, (height + rows, width + columns))[:, :, :height, :width]

    return padded.flatten(2), kernel.flatten(1), crop


@functools.cache
def _flash_fft_convolution(length: int, dtype: torch.dtype):
    from flashfftconv import FlashFFTConv

    return FlashFFTConv(length, dtype=dtype).cuda()


def flash_fft(x, weight, bias, padding, dilation):
    """FlashFFTConv, a causal 1-D convolution, on the map's rows one after the other."""
    sequences, kernels, crop = as_sequences(x, weight)
    total = sequences.shape[2]
    length = max(256, 1 << (total + kernels.shape[1] - 1).bit_length())
    convolve = _flash_fft_convolution(length, x.dtype)
    sequences = F.pad(sequences, (0, length - total)).contiguous()
    kernels = F.pad(kernels.float(), (0, length - kernels.shape[1])).contiguous()
    return crop(convolve(sequences, kernels)[:, :, :total]) + bias[:, None, None]


def _flash_fft_refuses(shape, dtype) -> str | None:
    if shape.dilation != 1:
        return "this use of FlashFFTConv has no dilation"
    if shape.kernel[1] > shape.width + shape.kernel[1] // 2:
        return "this use of FlashFFTConv needs rows as long as half of the kernel"
    if dtype not in (torch.float16, torch.bfloat16):
        return "FlashFFTConv takes float16 and bfloat16"
    return _not_installed("flashfftconv")


# Name, call, why it does not serve a shape in a dtype.
DEPTHWISE = [
    ("fused_fft_conv2d", fused_fft, _fused_fft_refuses),
    ("replknet_cutlass", replknet, _replknet_refuses),
    ("flashfftconv", flash_fft, _flash_fft_refuses),
]


def graphed(call: Callable[[int], object], buffers: int) -> Callable[[int], object]:
    """``call`` captured into one CUDA graph for each buffer; replaying returns its result."""
    # Warm-up on a side stream, as capture demands; it also makes the libraries' handles.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(buffers):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    captured = []
    for index in range(buffers):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(index)
        captured.append((graph, result))

    def replayed(index: int):
        graph, result = captured[index]
        graph.replay()
        return result

    return replayed
