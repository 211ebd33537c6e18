"""Tile sizes of the Triton kernels: pure functions of shape, dtype and number of multiprocessors.

Each number is reasoned, or measured where that is said, and the reason stands beside it.
``docs/kernel-notes.md`` has the estimates they lead to and what was measured on an H100.

Kernels' plans look names up here at every call, so that a measurement or a test can replace one;
what these modules use of their own stays.
"""

from lka_kernels.tiles.adapter import (
    MOST_RANK,
    AdapterTiles,
    OneLaunchTiles,
    adapter_tiles,
    one_launch_tiles,
    two_launch_clocks,
)
from lka_kernels.tiles.depthwise import (
    WEIGHT_DENSE_BLOCK,
    Correlation,
    DenseTiles,
    DirectTiles,
    PatchTiles,
    WeightGemmTiles,
    correlation_form,
    correlation_moves,
    dense_tiles,
    direct_clocks,
    direct_rows,
    direct_tiles,
    direct_weight_tiles,
    gemm_form,
    patch_tiles,
    weight_dense_fits,
    weight_gemm_tiles,
    weight_groups,
    weight_moves,
)
from lka_kernels.tiles.machine import (
    DEFAULT_MULTIPROCESSORS,
    ceil_div,
    multiprocessors,
    next_power_of_2,
)
from lka_kernels.tiles.planes import (
    move_tiles,
    plane_tiles,
    product_sum_block,
    product_tiles,
    sum_tiles,
)

__all__ = [
    "DEFAULT_MULTIPROCESSORS",
    "MOST_RANK",
    "WEIGHT_DENSE_BLOCK",
    "AdapterTiles",
    "Correlation",
    "DenseTiles",
    "DirectTiles",
    "OneLaunchTiles",
    "PatchTiles",
    "WeightGemmTiles",
    "adapter_tiles",
    "ceil_div",
    "correlation_form",
    "correlation_moves",
    "dense_tiles",
    "direct_clocks",
    "direct_rows",
    "direct_tiles",
    "direct_weight_tiles",
    "gemm_form",
    "move_tiles",
    "multiprocessors",
    "next_power_of_2",
    "one_launch_tiles",
    "patch_tiles",
    "plane_tiles",
    "product_sum_block",
    "product_tiles",
    "sum_tiles",
    "two_launch_clocks",
    "weight_dense_fits",
    "weight_gemm_tiles",
    "weight_groups",
    "weight_moves",
]
