"""What all blocks with adapters share: the placements, and the plan that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.modules.adapter_variants import build_adapter


class AdaptedBlock:
    """Mixin of the block classes that carry adapters; ``lka_*`` are their only new members."""

    ADAPTERS = ("lka_attn", "lka_mlp")
    lka_placement: str

    def adapters(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of each adapter in the block."""
        for name in self.ADAPTERS:
            adapter = getattr(self, name)
            if adapter is not None:
                yield name, adapter


@dataclass
class PlannedBlock:
    """A change to one block, ready to be made: building it may fail, making it may not."""

    name: str
    block: nn.Module
    block_class: type
    adapters: dict[str, nn.Module | None]
    attributes: dict[str, object] = field(default_factory=dict)

    def install(self) -> None:
        """Turn the block into one with adapters, in place."""
        self.block.__class__ = self.block_class
        for name, value in self.attributes.items():
            setattr(self.block, name, value)
        for name, adapter in self.adapters.items():
            self.block.register_module(name, adapter)


@dataclass
class PlannedHook:
    """A forward pre-hook to put on a module that is not itself a block."""

    module: nn.Module
    hook: Callable

    def install(self) -> None:
        """Register the hook."""
        self.module.register_forward_pre_hook(self.hook)


def plan_adapter(config: LKAConfig, block: nn.Module, dim: int, **options) -> nn.Module:
    """An adapter with the device, dtype and training mode of ``block``."""
    # Norms may be kept in float32 beside narrower layers, so a weight matrix decides.
    weight = next((p for p in block.parameters() if p.dim() > 1), next(block.parameters()))
    adapter = build_adapter(config, dim, device=weight.device, dtype=weight.dtype, **options)
    return adapter.train(block.training)


def add_branch(
    x: Tensor,
    branch_input: Tensor,
    branch_output: Tensor,
    adapter: nn.Module | None,
    placement: str,
    drop_path: nn.Module,
    grid_size: tuple[int, int] | None = None,
) -> Tensor:
    """A block's residual sum x + branch_output with an adapter in or beside it.

    With h = ``branch_output``, n = ``branch_input`` (what the branch read, after its norm) and
    D = ``drop_path``, which drops an image's branch and adapter together, as one draw:

    - parallel (a): x + D(h + LKA(n));
    - before_residual (b): x + D(h + LKA(h));
    - after_residual (c): s + D(LKA(s)), s = x + D(h).

    (b) and (c) stand in sequence, and carry their own skip connection as the adapter of Houlsby
    et al. does (ICML 2019): without it an adapter that gives zero would cut the branch off.
    """
    if adapter is None:
        return x + drop_path(branch_output)
    if placement == "parallel":
        return x + drop_path(adapter(branch_input, grid_size, residual=branch_output))
    if placement == "before_residual":
        return x + drop_path(adapter(branch_output, grid_size, residual=branch_output))
    return adapt_after(x, branch_output, (adapter,), drop_path, grid_size)


def adapt_after(
    x: Tensor,
    branch_output: Tensor,
    adapters: Iterable[nn.Module],
    drop_path: nn.Module,
    grid_size: tuple[int, int] | None = None,
) -> Tensor:
    """The residual sum s = x + D(h), then s + D(LKA(s)) for each of ``adapters`` in turn."""
    if drop_path.training and getattr(drop_path, "drop_prob", 0.0):
        # The factors that drop_path(branch_output) would draw, (B, 1, …), used for every sum: a
        # second draw would shift every later random number of the base model.
        kept = drop_path(branch_output.new_ones(x.shape[0], *(1,) * (x.dim() - 1)))
        x = x + branch_output * kept
        for adapter in adapters:
            x = x + adapter(x, grid_size) * kept
        return x
    x = x + drop_path(branch_output)
    for adapter in adapters:
        # Not residual=x: the sum keeps the memory layout of x, on which the rounding of the
        # base model's next convolution depends; an adapter's own result is channels last.
        x = x + adapter(x, grid_size)
    return x
