"""Drop-in modules."""

from lka_kernels.modules.depthwise_conv import DepthwiseConv2d
from lka_kernels.modules.large_kernel_adapter import FusedLKA

__all__ = ["DepthwiseConv2d", "FusedLKA"]
