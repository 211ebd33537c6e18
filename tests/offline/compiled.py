"""Compile a launch of a Triton kernel for a GPU that is not there, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
TENSOR_CORES = r"(HMMA|HGMMA|UTCHMMA)"
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """What the assembler made of a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's stack, where registers that did not fit are kept.
        shared: bytes of shared memory of a program.
        sass: the machine code, as text.
    """

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions begin with ``instruction``, e.g. "HMMA"."""
        return len(re.findall(rf"\b{instruction}", self.sass))


def signature(launch) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility of a launch's arguments, as Triton would find at run time.

    Integers that are 1 and arguments that are None become constants; integers that are multiples
    of 16, and all pointers as torch allocates, are known to be so.
    """
    names = launch.kernel.arg_names
    types, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        if index >= len(launch.arguments):
            types[name] = "constexpr"
            constants[(index,)] = launch.constants[name]
            continue
        value = launch.arguments[index]
        if value is None or (isinstance(value, int) and value == 1):
            types[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            types[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _compile(launch, capability: int):
    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def intermediate(launch, capability: int) -> str:
    """Triton's last form of a kernel before LLVM's, as text."""
    return _compile(launch, capability).asm["ttgir"]


def compile_launch(launch, capability: int) -> Compiled:
    """Compile for compute capability ``capability`` (90 for 9.0)."""
    kernel = _compile(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    return _compiled(usage, sass)._replace(shared=kernel.metadata.shared)


def _compiled(usage: str, sass: str) -> Compiled:
    found = {k: int(n) for k, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"], sass)


def read_library(path: Path) -> dict[tuple[str, str], Compiled]:
    """(mangled name, architecture) -> every kernel in a library or object file."""
    machine_code = {}
    for architecture, text in _by_architecture(_run("cuobjdump", "-sass", str(path))):
        for part in text.split("Function : ")[1:]:
            name, sass = part.split("\n", 1)
            machine_code[name.strip(), architecture] = sass
    found = {}
    for architecture, text in _by_architecture(_run("cuobjdump", "-res-usage", str(path))):
        for name, usage in re.findall(r"Function (\S+):\n(.*)", text):
            key = name, architecture
            found[key] = _compiled(usage, machine_code[key])
    return found


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"\narch = (\S+)\n", text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _run(program: str, *arguments: str) -> str:
    return subprocess.run(
        [_BINARIES / program, *arguments], check=True, capture_output=True, text=True
    ).stdout
