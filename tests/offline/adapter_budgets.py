"""Compile the adapter's Triton kernels for other GPUs; see ``triton_budgets.py``."""

from pathlib import Path

from adapter_launches import to_compile
from triton_budgets import Kernels, main


def multiplies(name: str) -> bool:
    """The kernels that multiply matrices; in float32 they use the FMA units."""
    return "float32" not in name and any(
        part in name for part in (" down", " up", " weight_backward", " forward")
    )


# ptxas gives some kernels that are far from the limit of registers a few bytes of stack.
KERNELS = Kernels(
    Path(__file__).with_name("adapter_budgets.json"), to_compile, multiplies, most_stack=32
)

if __name__ == "__main__":
    main(KERNELS)
