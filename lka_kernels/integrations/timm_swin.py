"""Adapters in timm's SwinTransformer."""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import (
    AdaptedBlock,
    PlannedBlock,
    add_branch,
    plan_adapter,
)

SUPPORTED = "SwinTransformer with SwinTransformerBlock (Swin, not Swin V2)"
BLOCKS = (SwinTransformerBlock,)


class LKASwinTransformerBlock(AdaptedBlock, SwinTransformerBlock):
    """``SwinTransformerBlock`` with an adapter for the attention and one for the MLP; (B, H, W, C).

    The adapters see the whole map in its true order, outside of the shifted windows: "attn"
    reads norm1(x) beside shift, windows and attention; "mlp" reads norm2(x) beside the MLP.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As ``SwinTransformerBlock.forward``."""
        n = self.norm1(x)
        x = add_branch(x, n, self._attn(n), self.lka_attn, self.lka_placement, self.drop_path1)
        n = self.norm2(x)
        return add_branch(x, n, self.mlp(n), self.lka_mlp, self.lka_placement, self.drop_path2)


def plan(model: nn.Module, config: LKAConfig) -> Iterator[PlannedBlock]:
    """The changes to every ``SwinTransformerBlock`` in ``model``."""
    for name, block in model.named_modules():
        if type(block) is SwinTransformerBlock:
            yield PlannedBlock(
                name,
                block,
                LKASwinTransformerBlock,
                {
                    f"lka_{site}": plan_adapter(config, block, block.dim)
                    if site in config.sites
                    else None
                    for site in ("attn", "mlp")
                },
                {"lka_placement": config.placement},
            )
