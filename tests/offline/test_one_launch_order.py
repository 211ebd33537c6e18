"""The adapter's one launch reads its scratch behind a barrier, which no interpreter shows."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SCRIPT = """
import sys
import torch
from adapter_launches import launches
from compiled import intermediate
(launch,), _ = launches(1, (14, 14), 384, 8, (7, 7), torch.bfloat16, prefix=1)
print(intermediate(launch, int(sys.argv[1])))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_barrier_stands_between_stores_and_loads(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(FOLDER), str(FOLDER.parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    # "gpu.barrier" in Triton 3.6.
    (barrier,) = (
        i for i, line in enumerate(lines) if "gpu.barrier" in line or "ttg.barrier" in line
    )
    stores = [i for i, line in enumerate(lines) if "tt.store" in line]
    assert sum(i < barrier for i in stores) == 2  # z, and what goes to the scratch
    assert sum(i > barrier for i in stores) == 2  # c and y
    # The loop over the taps reads the scratch: what was read in front of the barrier would be old.
    loop = next(i for i, line in enumerate(lines) if "scf.for" in line and i > barrier)
    indentation = lines[loop][: len(lines[loop]) - len(lines[loop].lstrip())]
    end = next(i for i in range(loop + 1, len(lines)) if lines[i].startswith(indentation + "}"))
    assert any("tt.load" in line for line in lines[loop:end])
