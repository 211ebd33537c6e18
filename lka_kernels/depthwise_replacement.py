"""Swaps a model's own depthwise convolutions for ``DepthwiseConv2d``."""

from __future__ import annotations

from torch import nn

from lka_kernels import checks
from lka_kernels.modules import DepthwiseConv2d, FusedLKA


def replace_depthwise_convs(model: nn.Module, *, min_kernel_size: int = 5) -> int:
    """Replace eligible ``nn.Conv2d`` layers of ``model`` by ``DepthwiseConv2d``, in place.

    Eligible is a layer of class ``nn.Conv2d`` itself (a subclass, such as timm's ``Conv2dSame``,
    may compute something else) with groups == in_channels == out_channels, zero padding, a
    kernel of which one side at least is ``min_kernel_size``, and no hooks. The new layer shares
    its parameters with the old one, so that ``state_dict`` keys and optimizers stay valid; a
    layer used in several places stays one layer. ``model`` itself is never replaced.

    Args:
        model: any module.
        min_kernel_size: at least 1; small kernels are served well by PyTorch.

    Returns:
        The number of layers replaced.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not checks.is_int(min_kernel_size):
        raise TypeError(f"min_kernel_size must be an int; got {min_kernel_size!r}")
    if min_kernel_size < 1:
        raise ValueError(f"min_kernel_size must be at least 1; got {min_kernel_size}")
    replaced: dict[nn.Module, DepthwiseConv2d] = {}
    for parent in list(model.modules()):
        if isinstance(parent, FusedLKA):
            continue  # its convolution is part of the fused operator already
        for name, child in parent._modules.items():
            if not _eligible(child, min_kernel_size):
                continue
            if child not in replaced:
                replaced[child] = DepthwiseConv2d.from_conv(child)
            parent._modules[name] = replaced[child]
    return len(replaced)


def _eligible(module: nn.Module | None, min_kernel_size: int) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.padding_mode == "zeros"
        and max(module.kernel_size) >= min_kernel_size
        and not _has_hooks(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks (also those of ``nn.utils.weight_norm``) would be lost with the module."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
