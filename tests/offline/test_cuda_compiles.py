"""The library's CUDA kernels have no spills and keep to their budgets."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="cuobjdump comes with Triton's wheel"
)
def test_budgets():
    import cuda_budgets

    reason = cuda_budgets.why_not()
    if reason is not None:
        pytest.skip(reason)
    script = Path(__file__).with_name("cuda_budgets.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
