"""Compile the Triton kernels around torch.fft for GPUs that are not there; see ``budgets.py``."""

from pathlib import Path

from budgets import Kernels, main
from fft_launches import to_compile

KERNELS = Kernels(
    Path(__file__).with_name("fft_budgets.json"), to_compile, multiplies=lambda name: False
)

if __name__ == "__main__":
    main(KERNELS)
