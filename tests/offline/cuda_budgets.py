"""What the compiled library's CUDA kernels take, and what representative calls launch.

    python tests/offline/cuda_budgets.py            # compare with cuda_budgets.json
    python tests/offline/cuda_budgets.py --write    # replace it

For every kernel and architecture in the library: registers and stack of a thread, shared memory
that it declares, matrix instructions. For calls of real networks: the shared memory that a block of
the plan asks for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from budgets import Budgets
from compiled import TENSOR_CORES, read_library

from lka_kernels import _extension

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "cuda_on_cpu"))
sys.path.append(str(ROOT / "tests"))
import adapter_on_cpu  # noqa: E402
import on_cpu  # noqa: E402
from adapter_cases import AdapterCase  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a")


class Call(NamedTuple):
    """A bfloat16 call with "same" padding on a map of (batch, channels, height, width)."""

    direction: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    channels_last: bool = False
    dilation: int = 1
    form: str = "toeplitz"

    @property
    def name(self) -> str:
        batch, channels, height, width = self.shape
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"k{self.kernel[0]}x{self.kernel[1]} d{self.dilation}"
        direction = self.direction if self.form == "toeplitz" else f"{self.form} {self.direction}"
        return f"{direction} {batch}x{channels}@{height}x{width} {kernel} {layout}"

    def plan(self) -> dict[str, int]:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        maps = torch.empty(self.shape, dtype=torch.bfloat16, device="meta", memory_format=layout)
        padding = [self.dilation * (k - 1) // 2 for k in self.kernel]
        call = on_cpu.params(maps, maps, self.kernel, padding, (self.dilation, self.dilation))
        call.input.data = call.output.data = 1024
        plan = "plan" if self.form == "toeplitz" else f"{self.form}_plan"
        return on_cpu.plan(call, self.direction, 132, plan)


CALLS = [
    Call(direction, *arguments)
    for direction in ("forward", "backward_weight")
    for arguments in (
        ((64, 192, 56, 56), (7, 7)),
        ((64, 192, 56, 56), (7, 7), True),
        ((64, 768, 14, 14), (7, 7)),
        ((64, 1536, 7, 7), (7, 7), True),
        ((64, 128, 56, 56), (31, 31)),
        ((64, 128, 56, 56), (31, 31), True),
        ((64, 512, 14, 14), (27, 27)),
        ((64, 96, 56, 56), (51, 5)),
        ((64, 96, 56, 56), (5, 51)),
        ((64, 96, 56, 56), (51, 51)),
        ((64, 64, 56, 56), (7, 7), True, 3),
        ((1, 1536, 90, 180), (7, 7)),
    )
]

CALLS += [
    Call(direction, *arguments, form="dense")
    for direction in ("forward", "backward_weight")
    for arguments in (
        ((64, 1536, 7, 7), (7, 7)),
        ((64, 512, 14, 14), (27, 27)),
        ((1, 512, 14, 14), (27, 27)),
        ((64, 384, 16, 16), (31, 31)),
    )
]
CALLS += [Call("forward", (64, 256, 28, 28), (29, 29), form="dense")]

CALLS += [
    Call(direction, *arguments, form="fft")
    for direction in ("forward", "backward_weight")
    for arguments in (
        ((64, 512, 14, 14), (27, 27)),
        ((64, 256, 28, 28), (29, 29)),
        ((64, 256, 28, 28), (29, 29), True),
        ((64, 128, 56, 56), (13, 13)),
        ((64, 128, 56, 56), (31, 31)),
        ((64, 128, 56, 56), (31, 31), True),
        ((8, 96, 112, 112), (31, 31)),
    )
]


# bfloat16 on contiguous tokens, with all gradients.
ADAPTERS = [
    AdapterCase(*sizes)
    for sizes in (
        (64, 1024, 8, (14, 14), (7, 7), 1),
        (64, 192, 8, (56, 56), (7, 7)),
        (64, 384, 8, (28, 28), (7, 7)),
        (64, 1536, 8, (7, 7), (7, 7)),
        (64, 384, 64, (28, 28), (31, 31)),
        (64, 768, 256, (14, 14), (51, 51)),
        (1, 1024, 8, (14, 14), (7, 7), 1),
    )
]


def adapter_name(case: AdapterCase) -> str:
    tokens = f"{case.batch}x{case.grid[0]}x{case.grid[1]}+{case.prefix}x{case.dim}"
    return f"adapter {tokens} r{case.r} k{case.kernel[0]}"


def why_not() -> str | None:
    """Why nothing can be measured here, or None."""
    if not _extension.built_with_cuda():
        return "the library has no CUDA kernels"
    if shutil.which("c++filt") is None or on_cpu.compiler() is None:
        return "no C++ compiler with c++filt"
    return None


def nvcc_version() -> str | None:
    """The release of the nvcc that would build the library."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def kernels() -> dict[str, dict]:
    """Kernel and architecture -> what the assembler made of it."""
    compiled = read_library(Path(_extension.MODULE.__file__))
    mangled = "\n".join(name for name, _ in compiled)
    demangled = subprocess.run(
        ["c++filt"], input=mangled, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    found = {}
    for (_, architecture), name, kernel in zip(
        compiled, demangled, compiled.values(), strict=False
    ):
        if architecture not in ARCHITECTURES:
            continue
        short = re.search(r"(\w+_kernel(<.*?>)?)\(", name)[1].replace("lka::cuda::", "")
        found[f"{short} {architecture}"] = {
            "registers": kernel.registers,
            "stack": kernel.stack,
            "shared": kernel.shared,
            "matrix_instructions": kernel.count(TENSOR_CORES),
        }
    return dict(sorted(found.items()))


def launches() -> dict[str, dict]:
    """Call -> blocks, threads and shared memory of a block on a device of 132 multiprocessors."""
    found = {call.name: call.plan() for call in CALLS}
    for case in ADAPTERS:
        call = adapter_on_cpu.without_memory(case, torch.bfloat16)
        for backward, direction in ((False, "forward"), (True, "backward")):
            for launch, takes in adapter_on_cpu.plan(call, backward).items():
                found[f"{adapter_name(case)} {direction} {launch}"] = takes
    return found


_PROJECTIONS = tuple(
    f"adapter_{name}_kernel<{storage}"
    for name in ("down", "up", "up_backward", "down_backward", "weight_gradient")
    for storage in ("Float16", "BFloat16")
)


def multiplies(name: str) -> bool:
    depthwise = ("correlate_kernel", "weight_gradient_kernel")
    dense = tuple(f"dense_{kernel}" for kernel in depthwise)
    return name.startswith((*depthwise, *dense, *_PROJECTIONS, "adapter_narrow_"))


def main() -> None:
    """Compare or, with --write, keep."""
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    file = Path(__file__).with_name("cuda_budgets.json")
    # A library may be built for fewer architectures than the file has.
    budgets = Budgets(file, "nvcc", nvcc_version(), multiplies, complete=False)
    budgets.main({**kernels(), **launches()})


if __name__ == "__main__":
    main()
