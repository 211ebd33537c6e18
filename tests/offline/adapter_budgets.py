"""Compile the Triton kernels for GPUs that are not there; write or print what they take.

    python tests/offline/adapter_budgets.py            # JSON of every kernel to standard output
    python tests/offline/adapter_budgets.py --write    # the same to adapter_budgets.json

Run it without TRITON_INTERPRET: what the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import triton
from adapter_launches import to_compile
from compiled import compile_launch

CAPABILITIES = (80, 90, 100)
FILE = Path(__file__).with_name("adapter_budgets.json")
# Of matrix instructions: mma.sync and wgmma; tcgen05 (UTCHMMA) on compute capability 10.0.
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")


def _measure(task: tuple[str, int]) -> tuple[str, dict]:
    name, capability = task
    compiled = compile_launch(to_compile()[name], capability)
    return f"{name} sm_{capability}", {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "matrix_instructions": sum(map(compiled.count, MATRIX_INSTRUCTIONS)) > 0,
    }


def measure() -> dict:
    """Every kernel on every capability, and the Triton that compiled them."""
    tasks = [(name, capability) for name in to_compile() for capability in CAPABILITIES]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        kernels = dict(pool.imap_unordered(_measure, tasks, chunksize=8))
    return {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}


if __name__ == "__main__":
    text = json.dumps(measure(), indent=1) + "\n"
    if "--write" in sys.argv:
        FILE.write_text(text)
    else:
        print(text, end="")
