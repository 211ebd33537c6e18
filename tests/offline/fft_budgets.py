"""Compile the Triton kernels around torch.fft for other GPUs; see ``triton_budgets.py``."""

from pathlib import Path

from fft_launches import to_compile
from triton_budgets import Kernels, main

KERNELS = Kernels(
    Path(__file__).with_name("fft_budgets.json"), to_compile, multiplies=lambda name: False
)

if __name__ == "__main__":
    main(KERNELS)
