"""The kernels of every instruction set give the same results, chosen by LKA_CPU_CAPABILITY.

The choice is made once per process, so each is tried in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lka_kernels import _extension

LIMITS = ("avx512_bf16", "avx512", "avx2", "baseline")

# Each vector width meets full and half vectors, idle lanes, lanes of several images, every dtype.
SCRIPT = """
import sys
import torch
from closeness import assert_close_to_truth
from test_depthwise_conv2d import Case, check_case
from adapter_cases import AdapterCase, check_backend
from lka_kernels import _extension

torch.set_num_threads(2)
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
for channels in (1, 3, 8, 20, 37):
    for layout in ("contiguous", "channels_last", "sliced"):
        for kernel, options in (
            ((7, 7), {"padding": "same"}),
            ((3, 3), {"padding": (1, 1)}),
            ((4, 5), {"padding": (3, 1), "stride": (2, 1), "dilation": (1, 2)}),
        ):
            case = Case(2, channels, 15, 14, kernel, layout=layout, **options)
            for dtype in dtypes:
                check_case(case, dtype, "direct")
        for case in (
            Case(2, channels, 5, 6, (9, 11), padding="same", layout=layout),
            Case(1, channels, 9, 37, (5, 5), padding="same", layout=layout),
        ):
            for dtype in dtypes:
                check_case(case, dtype, "direct")
                check_case(case, dtype, "fft")
for r in (3, 8, 17):
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        case = AdapterCase(2, 29, r, (9, 8), (7, 5), prefix=1, activation=activation,
                           position="both", dropout=0.2, residual=True)
        for dtype in dtypes:
            check_backend(case, dtype, "cpu")
print(_extension.instruction_set())
"""


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("limit", LIMITS)
def test_every_instruction_set(limit):
    widest = LIMITS.index(_extension.instruction_set())
    if os.environ.get("LKA_CPU_CAPABILITY") and LIMITS.index(limit) < widest:
        pytest.skip("this run is limited by LKA_CPU_CAPABILITY itself")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "LKA_CPU_CAPABILITY": limit},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A limit never asks for more than the processor has.
    expected = LIMITS[max(LIMITS.index(limit), widest)]
    assert done.stdout.split()[-1] == expected


def test_no_instruction_set_shares_a_function_with_another():
    """Of an inline function of several objects the linker keeps one, perhaps the widest set's."""
    root = Path(__file__).parents[1]
    objects = sorted(root.glob("build/temp*/csrc/cpu/kernels_*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of a build in this tree and nm")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert symbols, path
        weak = [line for line in symbols if line.split()[1] in "WVu"]
        assert not weak, (path.name, weak[:5])
