"""``nn.Conv2d(channels, channels, kernel_size, groups=channels)`` on this library's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lka_kernels import checks
from lka_kernels.functional import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution, one filter per channel.

    Loads and saves the state_dict of the ``nn.Conv2d(channels, channels, kernel_size,
    groups=channels)`` that it replaces, initialises as it does, and returns the same values.

    Args:
        channels: C, at least 1.
        kernel_size, stride, dilation: int or pair.
        padding: int, pair, "same" or "valid".
        bias: whether there is a bias (C,).
        method: as ``lka_kernels.functional.depthwise_conv2d``.

    Shape: (B, C, H, W) -> (B, C, H', W').

    torch.jit.trace takes it under torch.no_grad() only: with gradients it records a Python
    function, which its second, checking pass does not meet. torch.compile has no such limit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        bias: bool = True,
        *,
        method: str = "auto",
        device=None,
        dtype=None,
    ):
        checks.one_of("method", method, checks.METHODS)
        if not checks.is_int(channels):
            raise TypeError(f"channels must be an int; got {channels!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1; got {channels}")
        kernel_size = checks.pair("kernel_size", kernel_size, minimum=1)
        stride = checks.pair("stride", stride, minimum=1)
        dilation = checks.pair("dilation", dilation, minimum=1)
        checks.padding_tlbr(padding, stride, dilation, kernel_size)
        if not isinstance(padding, str):
            padding = checks.pair("padding", padding, minimum=0)
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.method = method

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        return depthwise_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            method=self.method,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.method == "auto" else f"{text}, method={self.method!r}"

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, *, method: str = "auto") -> DepthwiseConv2d:
        """The replacement of ``conv``, sharing its parameters.

        Raises:
            ValueError: ``conv`` is not depthwise with one filter per channel, or does not pad
                with zeros.
        """
        channels = conv.in_channels
        if conv.groups != channels or conv.out_channels != channels:
            raise ValueError(
                "conv must have groups == in_channels == out_channels; got "
                f"groups={conv.groups}, in_channels={channels}, out_channels={conv.out_channels}"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv must have padding_mode='zeros'; got {conv.padding_mode!r}")
        new = cls(
            channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            method=method,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)
