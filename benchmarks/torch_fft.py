"""The peer "torch_fft": depthwise convolution as one would write it with torch.fft.

Real transforms of the smallest good size for "same" padding, where the wrap of the circular
convolution falls on cropped positions; float32 for 16-bit tensors. Forward keeps the spectra of
input and weight for backward. Not ``method="fft"`` of the library, which is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels.fft_plan import good_size


class _TorchFFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, padding, dilation):
        height, width = x.shape[2:]
        extents = [dilation * (k - 1) + 1 for k in weight.shape[2:]]
        size = [
            good_size(max(n + p, e))
            for n, p, e in zip((height, width), padding, extents, strict=True)
        ]
        # Tap k of the kernel stands at k·dilation - padding, modulo the size.
        rows, columns = (
            (torch.arange(k, device=x.device) * dilation - p) % n
            for k, p, n in zip(weight.shape[2:], padding, size, strict=True)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        rolled = x.new_zeros(weight.shape[0], *size, dtype=wide)
        rolled[:, rows[:, None], columns] = weight[:, 0].to(wide)
        x_spectrum = torch.fft.rfft2(x.to(wide), s=size)
        weight_spectrum = torch.fft.rfft2(rolled)
        ctx.save_for_backward(x_spectrum, weight_spectrum, rows, columns)
        ctx.size = size
        y = torch.fft.irfft2(x_spectrum * weight_spectrum.conj(), s=size)
        return y[:, :, :height, :width].to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x_spectrum, weight_spectrum, rows, columns = ctx.saved_tensors
        height, width = grad.shape[2:]
        wide = torch.promote_types(grad.dtype, torch.float32)
        spectrum = torch.fft.rfft2(grad.to(wide), s=ctx.size)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.fft.irfft2(spectrum * weight_spectrum, s=ctx.size)
            dx = dx[:, :, :height, :width].to(grad.dtype).contiguous()
        if ctx.needs_input_grad[1]:
            summed = (x_spectrum * spectrum.conj()).sum(0)
            dw = torch.fft.irfft2(summed, s=ctx.size)[:, rows[:, None], columns]
            dw = dw.unsqueeze(1).to(grad.dtype)
        return dx, dw, None, None


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding, dilation) -> Tensor:
    """``F.conv2d`` with one group per channel and "same" padding of an odd kernel."""
    y = _TorchFFT.apply(x, weight, padding, dilation)
    return y + bias[:, None, None]
