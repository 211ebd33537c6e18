"""What compiled kernels may take, kept in a file: compare with it or renew it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Another compiler gives other numbers, and some kernels a few bytes of stack.
STACK_OF_ANOTHER_COMPILER = 32


class Budgets(NamedTuple):
    """The budgets of a set of kernels.

    Attributes:
        file: JSON, {compiler: its version, "kernels": {name: {"registers": …, …}}}.
        compiler: what compiled the kernels; another version gives other numbers.
        version: of the compiler at hand, None if it cannot be told.
        multiplies: whether the kernel of that name must have matrix instructions.
        most_stack: bytes of a thread's stack, where registers that did not fit are kept.
        complete: whether every kernel of the file is to be found.
    """

    file: Path
    compiler: str
    version: str | None
    multiplies: Callable[[str], bool]
    most_stack: int = 0
    complete: bool = True

    def complaints(self, found: dict[str, dict]) -> list[str]:
        """What must not be: spills, products without the tensor cores, more than the budget."""
        budgets = json.loads(self.file.read_text())
        same_compiler = budgets[self.compiler] == self.version
        most_stack = self.most_stack + (0 if same_compiler else STACK_OF_ANOTHER_COMPILER)
        wrong = []
        for name, result in found.items():
            stack = result.get("stack", 0)
            if stack > most_stack:
                wrong.append(f"{name}: {stack} bytes of stack, where spilled registers go")
            if self.multiplies(name) and not result["matrix_instructions"]:
                wrong.append(f"{name}: no instruction of the tensor cores")
        if not same_compiler:
            return wrong
        kept = budgets["kernels"]
        wrong += [f"{name}: no budget" for name in found.keys() - kept.keys()]
        if self.complete:
            wrong += [f"{name}: no such kernel" for name in kept.keys() - found.keys()]
        for name in found.keys() & kept.keys():
            for what in found[name].keys() & {"registers", "stack", "shared"}:
                if found[name][what] > kept[name][what]:
                    wrong.append(f"{name}: {what} {found[name][what]}, budget {kept[name][what]}")
        return wrong

    def main(self, found: dict[str, dict]) -> None:
        """Compare or, with --write, keep; ends the process, with status 1 after complaints."""
        if "--write" in sys.argv:
            written = {self.compiler: self.version, "kernels": found}
            self.file.write_text(json.dumps(written, indent=1) + "\n")
        wrong = self.complaints(found)
        print("\n".join(wrong))
        sys.exit(1 if wrong else 0)
