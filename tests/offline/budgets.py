"""What compiled kernels may take, kept in a file: compare with it or renew it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Budgets(NamedTuple):
    """The budgets of a set of kernels.

    Attributes:
        file: JSON, {compiler: its version, "kernels": {name: {"registers": …, …}}}.
        compiler: what compiled the kernels; another version gives other numbers.
        version: of the compiler at hand, None if it cannot be told.
        takes_tensor_cores: whether a kernel of this name must have their instructions.
    """

    file: Path
    compiler: str
    version: str | None
    takes_tensor_cores: Callable[[str], bool]

    def complaints(self, found: dict[str, dict]) -> list[str]:
        """What must not be: spills, products without the tensor cores, more than the budget."""
        wrong = []
        budgets = json.loads(self.file.read_text())
        same_compiler = budgets[self.compiler] == self.version
        for name, result in found.items():
            # Another compiler gives some kernels a few bytes of stack.
            if result.get("stack", 0) > (0 if same_compiler else 32):
                wrong.append(
                    f"{name}: {result['stack']} bytes of stack, where spilled registers go"
                )
            if not result.get("matrix_instructions") and self.takes_tensor_cores(name):
                wrong.append(f"{name}: no instruction of the tensor cores")
            if not same_compiler:
                continue
            budget = budgets["kernels"].get(name)
            if budget is None:
                wrong.append(f"{name}: no budget")
                continue
            for what in result.keys() & {"registers", "shared"}:
                if result[what] > budget[what]:
                    wrong.append(f"{name}: {what} {result[what]}, budget {budget[what]}")
        return wrong

    def main(self, found: dict[str, dict]) -> None:
        """Compare or, with --write, keep; exits with an error where something is wrong."""
        if "--write" in sys.argv:
            written = {self.compiler: self.version, "kernels": found}
            self.file.write_text(json.dumps(written, indent=1) + "\n")
        wrong = self.complaints(found)
        print("\n".join(wrong))
        sys.exit(1 if wrong else 0)
