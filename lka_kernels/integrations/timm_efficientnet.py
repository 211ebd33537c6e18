"""Adapters in the residual blocks of timm's EfficientNet and its relatives."""

from __future__ import annotations

from collections.abc import Iterator

from timm.models._efficientnet_blocks import (
    CondConvResidual,
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    UniversalInvertedResidual,
)
from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import (
    AdaptedBlock,
    PlannedBlock,
    add_branch,
    plan_adapter,
)

SUPPORTED = (
    "EfficientNet and MobileNet families with InvertedResidual, DepthwiseSeparableConv, "
    "EdgeResidual, CondConvResidual, UniversalInvertedResidual or ConvBnAct (where they carry a "
    "residual)"
)


class AdaptedResidual(AdaptedBlock):
    """A convolutional residual block with one adapter, ``lka_block``; (B, C, H, W).

    Token mixing and channel mixing are one branch here, so that one adapter serves whichever of
    the sites "attn" and "mlp" are asked for. It reads the block's input, which no norm precedes.

    ``has_skip`` is False on the instance: the base class then returns its branch alone, and this
    class adds the drop-path and the skip connection that ``has_skip`` stood for.
    """

    ADAPTERS = ("lka_block",)

    def forward(self, x: Tensor) -> Tensor:
        """As the base class."""
        h = super().forward(x)
        return add_branch(x, x, h, self.lka_block, self.lka_placement, self.drop_path)


class LKAInvertedResidual(AdaptedResidual, InvertedResidual):
    """``InvertedResidual`` (MBConv) with an adapter."""


class LKADepthwiseSeparableConv(AdaptedResidual, DepthwiseSeparableConv):
    """``DepthwiseSeparableConv`` with an adapter."""


class LKAEdgeResidual(AdaptedResidual, EdgeResidual):
    """``EdgeResidual`` (fused MBConv) with an adapter."""


class LKACondConvResidual(AdaptedResidual, CondConvResidual):
    """``CondConvResidual`` with an adapter."""


class LKAConvBnAct(AdaptedResidual, ConvBnAct):
    """``ConvBnAct`` (first stage of EfficientNetV2) with an adapter."""


class LKAUniversalInvertedResidual(AdaptedResidual, UniversalInvertedResidual):
    """``UniversalInvertedResidual`` (MobileNetV4) with an adapter."""


_BLOCK_CLASSES = {
    InvertedResidual: LKAInvertedResidual,
    DepthwiseSeparableConv: LKADepthwiseSeparableConv,
    EdgeResidual: LKAEdgeResidual,
    CondConvResidual: LKACondConvResidual,
    ConvBnAct: LKAConvBnAct,
    UniversalInvertedResidual: LKAUniversalInvertedResidual,
}
BLOCKS = tuple(_BLOCK_CLASSES)


def plan(model: nn.Module, config: LKAConfig) -> Iterator[PlannedBlock]:
    """The changes to every block in ``model`` that has a skip connection.

    A block that changes width or resolution has none, and is left as it is.
    """
    for name, block in model.named_modules():
        if type(block) in _BLOCK_CLASSES and block.has_skip:
            dim = block.feature_info("bottleneck")["num_chs"]
            yield PlannedBlock(
                name,
                block,
                _BLOCK_CLASSES[type(block)],
                {"lka_block": plan_adapter(config, block, dim, data_format="channels_first")},
                {"lka_placement": config.placement, "has_skip": False},
            )
