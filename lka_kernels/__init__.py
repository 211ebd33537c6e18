"""Large-kernel depthwise convolution and the Large Kernel Adapter, fused, for PyTorch."""

import warnings

from lka_kernels import _extension, functional
from lka_kernels.dispatch import available_backends, use_backend
from lka_kernels.functional import depthwise_conv2d, explain, large_kernel_adapter
from lka_kernels.modules import DepthwiseConv2d, FusedLKA

__version__ = "0.1.0"

__all__ = [
    "DepthwiseConv2d",
    "FusedLKA",
    "available_backends",
    "depthwise_conv2d",
    "explain",
    "functional",
    "large_kernel_adapter",
    "use_backend",
]

if not _extension.loaded():
    warnings.warn(
        "lka_kernels runs through plain PyTorch, which is slower: " + _extension.STATUS,
        RuntimeWarning,
        stacklevel=2,
    )
