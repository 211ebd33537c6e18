"""The method that "auto" chooses is among the best, by the results that are kept."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.results import FOLDER, load
from lka_kernels import _extension

# What a wrong choice may cost, and the noise of the machine.
MOST = 1.25
DIRECTIONS = {"forward": "forward", "dX": "backward_input", "dW": "backward_weight"}


def measured() -> list:
    """(key, peers) of every case on a CPU whose methods were measured beside "auto"."""
    results = [load(file) for file in sorted(Path(FOLDER).glob("*.json"))]
    return [
        pytest.param(key, peers, id=f"{result.path.stem} {key}")
        for result in results
        if result.facts["device"] == "cpu"
        for key, peers in result.cases.items()
        if {"ours", "ours_direct", "ours_fft"} <= peers.keys()
    ]


def test_the_methods_were_measured():
    """`make bench BENCH_ARGS=--bench-methods BENCH_JSON=benchmarks/results/…` does it."""
    assert len(measured()) >= 50


@pytest.mark.parametrize(("key", "peers"), measured())
def test_what_auto_chose_was_among_the_best(key, peers):
    assert min(peers[f"ours_{m}"].ratio.median for m in ("direct", "fft")) >= 1 / MOST


@pytest.mark.skipif(not _extension.loaded(), reason="the planner is compiled")
@pytest.mark.parametrize(
    ("key", "peers"), [p for p in measured() if p.values[0].direction in DIRECTIONS]
)
def test_what_the_planner_chooses_now_is_among_the_best(key, peers):
    numbers = [int(n) for n in re.findall(r"\d+", key.size)]
    (height, width), dilation = numbers[4:6], (numbers[6:] or [1])[0]
    padding = (dilation * (height // 2), dilation * (width // 2)) * 2
    name = _extension.depthwise_kernel_name(
        DIRECTIONS[key.direction],
        getattr(torch, key.dtype),
        numbers[:4],
        (height, width),
        (1, 1),
        padding,
        (dilation, dilation),
        key.layout == "channels_last",
    )
    seconds = {m: peers[f"ours_{m}"].seconds.median for m in ("direct", "fft")}
    chosen = "fft" if name == "fft" else "direct"
    assert seconds[chosen] <= MOST * min(seconds.values())
