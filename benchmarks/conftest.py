"""Options of the benchmarks, and the facts that stand beside every number."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from lka_kernels import info

LOAD = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("lka_kernels")
    group.addoption("--bench-device", default="cpu", choices=["cpu", "cuda"])
    group.addoption(
        "--bench-dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"]
    )
    group.addoption("--bench-all", action="store_true", help="every shape of shapes.py")
    group.addoption("--bench-seconds", type=float, default=0.5, help="time for each line")


def pytest_configure(config):
    # Fails before anything is measured; a result named after a device that is not there misleads.
    if config.getoption("--bench-device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: torch finds no CUDA device")


@pytest.fixture
def device(request) -> str:
    """The device to measure on."""
    return request.config.getoption("--bench-device")


@pytest.fixture
def dtype(request) -> torch.dtype:
    """The dtype of all tensors."""
    return getattr(torch, request.config.getoption("--bench-dtype"))


@pytest.fixture
def seconds(request) -> float:
    """About how long each line is measured."""
    return request.config.getoption("--bench-seconds")


@pytest.fixture(autouse=True)
def facts(benchmark, device, dtype):
    """What a number means nothing without."""
    torch.manual_seed(0)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if device == "cuda" else info.processor_name(),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        instruction_set=info._extension.instruction_set(),
        versions=info.versions(),
        commit=commit(),
        load_before=round(os.getloadavg()[0], 2),
    )


def pytest_benchmark_update_machine_info(config, machine_info):
    """The machine's network name says nothing about speed."""
    machine_info.pop("node", None)


def pytest_sessionstart(session):
    session.config.stash[LOAD] = os.getloadavg()[0]


def pytest_terminal_summary(terminalreporter, config):
    """Threads that wait for a busy core make any ratio meaningless: say so beside the table."""
    before = config.stash.get(LOAD, 0.0)
    if before > 0.25 * (os.cpu_count() or 1):
        terminalreporter.write_line(
            f"These numbers are not to be quoted: {os.cpu_count()} CPUs were busy before the "
            f"first measurement (load average {before:.2f})",
            yellow=True,
        )


def commit() -> str:
    """The commit of this source tree, marked if files differ from it; "unknown" outside git."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or "unknown"
