"""Large-kernel depthwise convolution and the Large Kernel Adapter, fused, for PyTorch."""

import warnings

from lka_kernels import _extension, functional
from lka_kernels.adapter_files import load_adapters, save_adapters
from lka_kernels.adapters import (
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    freeze_batch_norm,
)
from lka_kernels.config import LKAConfig
from lka_kernels.depthwise_replacement import replace_depthwise_convs
from lka_kernels.dispatch import available_backends, use_backend
from lka_kernels.functional import depthwise_conv2d, explain, large_kernel_adapter
from lka_kernels.modules import DepthwiseConv2d, FusedLKA
from lka_kernels.version import __version__

__all__ = [
    "DepthwiseConv2d",
    "FusedLKA",
    "LKAConfig",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapters",
    "available_backends",
    "depthwise_conv2d",
    "explain",
    "freeze_batch_norm",
    "functional",
    "large_kernel_adapter",
    "load_adapters",
    "replace_depthwise_convs",
    "save_adapters",
    "use_backend",
]

if not _extension.loaded():
    warnings.warn(
        "lka_kernels runs through plain PyTorch, which is slower: " + _extension.STATUS,
        RuntimeWarning,
        stacklevel=2,
    )
