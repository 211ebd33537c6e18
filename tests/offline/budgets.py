"""What the budget scripts share: compile launches for GPUs that are not there, and judge.

    python tests/offline/adapter_budgets.py            # compare with adapter_budgets.json
    python tests/offline/adapter_budgets.py --write    # replace it

and so for the other scripts. Of every kernel: registers and stack of a thread, shared memory of a
program, whether it has matrix instructions. Must run in a process of its own, without
TRITON_INTERPRET: what the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from compiled import compile_launch

from lka_kernels.backends.triton.launch import Launch

CAPABILITIES = (80, 90, 100)
# Of matrix instructions: mma.sync and wgmma; tcgen05 (UTCHMMA) on compute capability 10.0.
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
# Another compiler gives other numbers, and some kernels a few bytes of stack.
STACK_OF_ANOTHER_COMPILER = 32


class Kernels(NamedTuple):
    """Kernels that share a file of budgets.

    Attributes:
        file: the budgets.
        launches: a function at the top of a module, called anew in every process; by names that
            stay the same from run to run.
        multiplies: whether the kernel of that name must have matrix instructions.
        most_stack: bytes of a thread's stack, where registers that did not fit are kept.
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
        "matrix_instructions": sum(map(compiled.count, MATRIX_INSTRUCTIONS)) > 0,
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


def complaints(kernels: Kernels, found: dict[str, dict], budgets: dict) -> list[str]:
    """What must not be: spills, products without the tensor cores, more than the budget."""
    same_compiler = budgets["triton"] == triton.__version__
    most_stack = kernels.most_stack + (0 if same_compiler else STACK_OF_ANOTHER_COMPILER)
    wrong = []
    for name, result in found.items():
        if result["stack"] > most_stack:
            wrong.append(f"{name}: {result['stack']} bytes of stack, where spilled registers go")
        if kernels.multiplies(name) and not result["matrix_instructions"]:
            wrong.append(f"{name}: no instruction of the tensor cores")
    if not same_compiler:
        return wrong
    wrong += [f"{name}: no budget" for name in found.keys() - budgets["kernels"].keys()]
    wrong += [f"{name}: no such kernel" for name in budgets["kernels"].keys() - found.keys()]
    for name in found.keys() & budgets["kernels"].keys():
        budget = budgets["kernels"][name]
        for what in ("registers", "stack", "shared"):
            if found[name][what] > budget[what]:
                wrong.append(f"{name}: {what} {found[name][what]}, budget {budget[what]}")
    return wrong


def main(kernels: Kernels) -> None:
    """Compare or, with --write, keep; ends the process, with status 1 after complaints."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    found = measure(kernels)
    if "--write" in sys.argv:
        written = {"triton": triton.__version__, "kernels": found}
        kernels.file.write_text(json.dumps(written, indent=1) + "\n")
    wrong = complaints(kernels, found, json.loads(kernels.file.read_text()))
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)
