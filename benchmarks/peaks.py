"""What the device can do at most, measured in the same run as the cases."""

from __future__ import annotations

import time

import torch

from lka_kernels import info

# Large enough that a matmul runs at its best rate, small enough to take milliseconds.
SIDE = {"cpu": 1536, "cuda": 8192}


def measure(device: str, dtype: torch.dtype) -> dict:
    """Copy bandwidth and multiply-add rate, each the fastest of several repeats.

    The fastest, as a floor must not move with the load of the machine. On a CPU the rate is that
    of float32 for 16-bit dtypes, which the kernels widen on load; on a GPU it is that of the
    dtype's matrix product.
    """
    copy = info.copy_bandwidth(device)
    multiplied = dtype
    if device == "cpu" and dtype in (torch.bfloat16, torch.float16):
        multiplied = torch.float32
    return {
        "bytes_per_second": 1e9 * copy["fastest"],
        "flops_per_second": matmul_rate(device, multiplied, SIDE[device]),
        "how": f"fastest of {copy['repeats']} copies of {copy['mebibytes']} MiB, read and "
        f"written; fastest of 9 {multiplied} products of {SIDE[device]}² matrices".replace(
            "torch.", ""
        ),
    }


def matmul_rate(device: str, dtype: torch.dtype, side: int, repeats: int = 9) -> float:
    """FLOPs per second of the fastest of ``repeats`` products of square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    fastest = float("inf")
    for _ in range(repeats + 2):  # the first ones start threads and meet untouched pages
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * side**3 / fastest
