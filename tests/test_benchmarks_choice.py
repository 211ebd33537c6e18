"""The method that "auto" chose is among the best, in the results that are kept."""

from pathlib import Path

import pytest

from benchmarks.results import FOLDER, load

# What a wrong choice may cost, and the noise of the machine.
MOST = 1.25


def choices() -> list:
    """(case, method -> its time over that of "auto", median over the rounds)."""
    return [
        pytest.param(
            {method: peers[f"ours_{method}"].ratio.median for method in ("direct", "fft")},
            id=f"{file.stem} {key}",
        )
        for file in sorted(Path(FOLDER).glob("*.json"))
        for key, peers in load(file).cases.items()
        if {"ours", "ours_direct", "ours_fft"} <= peers.keys()
    ]


def test_the_methods_were_measured():
    """`make bench BENCH_ARGS=--bench-methods BENCH_JSON=benchmarks/results/…` does it."""
    assert len(choices()) >= 50


@pytest.mark.parametrize("ratios", choices())
def test_auto_is_among_the_best(ratios):
    assert min(ratios.values()) >= 1 / MOST
