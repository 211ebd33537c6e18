"""What stands beside every number: device, threads, versions, commit, load."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from lka_kernels import info


def collect(device: str, dtype: torch.dtype) -> dict:
    """Everything that is the same for the whole run."""
    found = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else info.processor_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "instruction_set": info._extension.instruction_set(),
        "versions": info.versions(),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "malloc": malloc_settings(),
    }
    if device == "cuda":
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
    return found


def malloc_settings() -> dict[str, str]:
    """What glibc was told, which else gives large tensors back to the system, so that fresh pages
    cost time, or hands out another block at every call.
    """
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    }


def commit() -> str:
    """The commit of this source tree, marked if files differ from it; "unknown" outside git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # there is no git
        return "unknown"
    return result.stdout.strip() or "unknown"
