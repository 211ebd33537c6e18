"""Finds the blocks of a timm model that take adapters, and plans what each becomes."""

from __future__ import annotations

from torch import nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import PlannedBlock, PlannedHook


def plan_adapters(model: nn.Module, config: LKAConfig) -> list[PlannedBlock | PlannedHook]:
    """Build the adapters of ``model`` without touching it.

    Returns:
        The changes to make, in the order of ``model.named_modules()`` within each family.

    Raises:
        ImportError: timm is not installed.
        ValueError: the model has no block that is supported, or has a residual block of a
            supported family that is not; the message lists what is supported and what was found.
    """
    families = _families()
    planned = [change for family in families for change in family.plan(model, config)]
    changed = {id(change.block) for change in planned if isinstance(change, PlannedBlock)}
    left = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if id(module) not in changed and _needs_adapter(module, families)
    ]
    if not changed or left:
        raise ValueError(_unsupported(model, families, left))
    return planned


def _families() -> tuple:
    try:
        from lka_kernels.integrations import (
            timm_convnext,
            timm_efficientnet,
            timm_swin,
            timm_vit,
        )
    except ImportError as error:
        raise ImportError(
            f"add_adapters needs timm (pip install timm), which does not import: {error}"
        ) from error
    return timm_vit, timm_swin, timm_convnext, timm_efficientnet


def _needs_adapter(module: nn.Module, families) -> bool:
    """Whether leaving ``module`` without an adapter would adapt only part of the model.

    Blocks with ``has_skip`` are timm's residual blocks; those without a skip take no adapter.
    """
    if hasattr(module, "has_skip"):
        return bool(module.has_skip)
    return any(type(module) in family.BLOCKS for family in families)


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _unsupported(model: nn.Module, families, left: list[str]) -> str:
    names = {type(m).__name__ for m in model.modules() if not _of_torch(m)}
    words = ("block", "residual", "bottleneck", "layer", "stage")
    found = sorted(n for n in names if n.lower().endswith(words)) or sorted(names)
    supported = "; ".join(family.SUPPORTED for family in families)
    problem = (
        f"has residual blocks that cannot take adapters, {', '.join(left[:4])}"
        + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        if left
        else "has no block that takes adapters"
    )
    return (
        f"model {type(model).__name__} {problem}. Supported (timm): {supported}. "
        f"Block classes found: {', '.join(found) or 'none'}"
    )
