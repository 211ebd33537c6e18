"""What the Triton budget scripts share: compile launches for GPUs that are not there.

    python tests/offline/adapter_budgets.py            # compare with adapter_budgets.json
    python tests/offline/adapter_budgets.py --write    # replace it

and so for the other scripts. Of every kernel: registers and stack of a thread, shared memory of a
program, whether it has matrix instructions. Must run in a process of its own, without
TRITON_INTERPRET: what the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from budgets import Budgets
from compiled import TENSOR_CORES, compile_launch

from lka_kernels.backends.triton.launch import Launch

CAPABILITIES = (80, 90, 100)


class Kernels(NamedTuple):
    """Kernels that share a file of budgets.

    Attributes:
        file, multiplies, most_stack: as ``Budgets`` has them.
        launches: a function at the top of a module, called anew in every process; by names that
            stay the same from run to run.
        compiled_for: the capabilities for which the launch of that index is compiled.
    """

    file: Path
    launches: Callable[[], dict[str, Launch]]
    multiplies: Callable[[str], bool]
    most_stack: int = 0
    compiled_for: Callable[[int], tuple[int, ...]] = lambda index: CAPABILITIES


@functools.cache
def _launches(function: Callable) -> dict[str, Launch]:
    return function()


def _measure(task: tuple[Callable, str, int]) -> tuple[str, dict]:
    function, name, capability = task
    compiled = compile_launch(_launches(function)[name], capability)
    return f"{name} sm_{capability}", {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "matrix_instructions": compiled.count(TENSOR_CORES) > 0,
    }


def measure(kernels: Kernels) -> dict[str, dict]:
    """Name and capability -> what came out, on all cores."""
    tasks = [
        (kernels.launches, name, capability)
        for index, name in enumerate(kernels.launches())
        for capability in kernels.compiled_for(index)
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return dict(sorted(pool.imap_unordered(_measure, tasks, chunksize=4)))


def main(kernels: Kernels) -> None:
    """Compare or, with --write, keep; ends the process, with status 1 after complaints."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    budgets = Budgets(
        kernels.file, "triton", triton.__version__, kernels.multiplies, kernels.most_stack
    )
    budgets.main(measure(kernels))
