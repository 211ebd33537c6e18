"""Adapters in timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP image towers, hybrids)."""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers import PatchDropout
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import (
    AdaptedBlock,
    PlannedBlock,
    PlannedHook,
    add_branch,
    plan_adapter,
)
from lka_kernels.integrations.token_grid import TokenGrid

SUPPORTED = "VisionTransformer with Block (ViT, DeiT, DINOv2, CLIP, hybrid ViT)"
BLOCKS = (Block,)


class LKABlock(AdaptedBlock, Block):
    """``Block`` with an adapter for the attention and one for the MLP; tokens (B, P+N, C).

    "attn" reads norm1(x) and joins the attention after its LayerScale; "mlp" reads norm2(x) and
    joins the MLP after its LayerScale.
    """

    lka_grid: TokenGrid
    lka_num_prefix_tokens: int

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As ``Block.forward``; further arguments (masks) go to the attention alone."""
        grid_size = self.lka_grid.of(x.shape[1] - self.lka_num_prefix_tokens)
        n = self.norm1(x)
        h = self.ls1(self.attn(n, *args, **kwargs))
        x = add_branch(x, n, h, self.lka_attn, self.lka_placement, self.drop_path1, grid_size)
        n = self.norm2(x)
        h = self.ls2(self.mlp(n))
        return add_branch(x, n, h, self.lka_mlp, self.lka_placement, self.drop_path2, grid_size)


def plan(model: nn.Module, config: LKAConfig) -> Iterator[PlannedBlock | PlannedHook]:
    """The changes to every ``Block`` of every VisionTransformer in ``model``."""
    for prefix, vit in model.named_modules():
        if not isinstance(vit, VisionTransformer):
            continue
        blocks = [(name, b) for name, b in vit.named_modules(prefix=prefix) if type(b) is Block]
        if not blocks:
            continue
        if isinstance(vit.patch_drop, PatchDropout) and vit.patch_drop.prob > 0:
            raise ValueError(
                f"model drops patches in training (patch_drop_rate={vit.patch_drop.prob}), which "
                "leaves no grid to convolve; adapters need patch_drop_rate=0"
            )
        grid = TokenGrid(vit.patch_embed.grid_size)
        yield PlannedHook(vit.patch_embed, grid.record)
        for name, block in blocks:
            yield PlannedBlock(
                name,
                block,
                LKABlock,
                {
                    f"lka_{site}": plan_adapter(
                        config, block, vit.embed_dim, num_prefix_tokens=vit.num_prefix_tokens
                    )
                    if site in config.sites
                    else None
                    for site in ("attn", "mlp")
                },
                {
                    "lka_placement": config.placement,
                    "lka_grid": grid,
                    "lka_num_prefix_tokens": vit.num_prefix_tokens,
                },
            )
