"""Adapters in timm's ConvNeXt, V1 and V2."""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import (
    AdaptedBlock,
    PlannedBlock,
    adapt_after,
    add_branch,
    plan_adapter,
)

SUPPORTED = "ConvNeXt with ConvNeXtBlock (V1 and V2, both layouts)"
BLOCKS = (ConvNeXtBlock,)


class LKAConvNeXtBlock(AdaptedBlock, ConvNeXtBlock):
    """``ConvNeXtBlock`` with an adapter for the token mixer and one for the MLP; (B, C, H, W).

    A ConvNeXt block is one residual branch, h = gamma·MLP(n), n = norm(conv_dw(x)), where a
    transformer block has two. "attn" belongs to the token mixer conv_dw, "mlp" to the MLP:

    - parallel: x + D(h + LKA_attn(x) + LKA_mlp(n)); each reads what its counterpart reads, and
      both join the residual sum itself, beside the frozen gamma (which may be 1e-6);
    - before_residual: each in sequence after its counterpart, m + LKA_attn(m) with
      m = conv_dw(x), and h + LKA_mlp(h);
    - after_residual: the block has one residual sum, so both follow it, "attn" first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As ``ConvNeXtBlock.forward``."""
        placement = self.lka_placement
        m = self.conv_dw(x)
        if placement == "before_residual" and self.lka_attn is not None:
            m = m + self.lka_attn(m)  # not residual=m: the sum keeps the layout of m
        if not self.use_conv_mlp:
            m = m.permute(0, 2, 3, 1)
        n = self.norm(m)
        h = self.mlp(n)
        if not self.use_conv_mlp:
            n, h = n.permute(0, 3, 1, 2), h.permute(0, 3, 1, 2)
        if self.gamma is not None:
            h = h.mul(self.gamma.reshape(1, -1, 1, 1))
        if placement == "parallel" and self.lka_attn is not None:
            h = self.lka_attn(x, residual=h)
        x = self.shortcut(x)
        if placement == "after_residual":
            return adapt_after(x, h, [adapter for _, adapter in self.adapters()], self.drop_path)
        return add_branch(x, n, h, self.lka_mlp, placement, self.drop_path)


def plan(model: nn.Module, config: LKAConfig) -> Iterator[PlannedBlock]:
    """The changes to every ``ConvNeXtBlock`` in ``model``.

    Raises:
        ValueError: a block changes width or resolution, so that no adapter fits beside it.
    """
    for name, block in model.named_modules():
        if type(block) is not ConvNeXtBlock:
            continue
        conv = block.conv_dw
        if conv.in_channels != conv.out_channels or tuple(conv.stride) != (1, 1):
            raise ValueError(
                f"model has a ConvNeXtBlock, {name}, that changes width or resolution "
                f"({conv.in_channels} to {conv.out_channels} channels, stride {conv.stride}); "
                "adapters need blocks that keep both"
            )
        yield PlannedBlock(
            name,
            block,
            LKAConvNeXtBlock,
            {
                f"lka_{site}": plan_adapter(
                    config, block, conv.out_channels, data_format="channels_first"
                )
                if site in config.sites
                else None
                for site in ("attn", "mlp")
            },
            {"lka_placement": config.placement},
        )
