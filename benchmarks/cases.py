"""One case: a shape, direction and layout, whose peers are measured together."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from benchmarks import measure, memory, peers, replay, roofline

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Largest difference of a peer's results from ours, relative to the largest element.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


class Case(NamedTuple):
    """What all peers of one table have in common."""

    operator: str
    shape: NamedTuple  # with a name and a size in words
    direction: str
    layout: str

    def id(self) -> str:
        """For the name of the test."""
        return f"{self.shape.name}-{self.direction}-{self.layout}"


class Measured(NamedTuple):
    """All peers of one case."""

    timings: dict[str, measure.Timing]
    errors: dict[str, str]
    peak_bytes: dict[str, int]
    buffers: int
    load: float


def run(
    make: dict[str, Callable[[], Callable[[int], object]]],
    buffers: int,
    *,
    device: str,
    seconds: float,
    tolerance: float | None,
    with_memory: bool,
) -> Measured:
    """Measure the peers that ``make`` makes calls of.

    A peer that fails, or whose first result differs from that of the first that does not fail, is
    left out of the rounds; its error is kept for its own test. ``tolerance`` None compares no
    results.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    calls, first_calls, errors, peaks = {}, {}, {}, {}
    reference: tuple[str, object] | None = None
    for name, maker in make.items():
        try:
            call = maker()
            wait()
            begun = time.perf_counter()
            result = call(0)
            wait()
            first_calls[name] = time.perf_counter() - begun
            if tolerance is not None:
                reference = reference or (name, result)
                _check_agreement((name, result), reference, tolerance)
            del result
            if with_memory:
                peaks[name] = memory.peak_bytes(lambda c=call: c(0), device)
            calls[name] = call
        except Exception as error:  # the other peers can still be measured
            # As text: a traceback would keep the case's tensors.
            errors[name] = "".join(traceback.format_exception(error))
    del reference
    timings = measure.interleave(calls, first_calls, buffers, seconds, wait) if calls else {}
    return Measured(timings, errors, peaks, buffers, os.getloadavg()[0])


def _check_agreement(peer: tuple, reference: tuple, tolerance: float) -> None:
    """Raise ValueError unless two (name, result) nearly agree: else they are no peers."""
    results, references = (r if isinstance(r, tuple) else (r,) for _, r in (peer, reference))
    for index, (a, b) in enumerate(zip(results, references, strict=True)):
        wide = torch.promote_types(b.dtype, torch.float32)
        a, b = a.detach().to(wide), b.detach().to(wide)
        difference = float((a - b).abs().max() / b.abs().max())
        if not difference <= tolerance:
            raise ValueError(
                f"{peer[0]} and {reference[0]} disagree: result {index} differs by "
                f"{difference:.1e} of the largest element, more than {tolerance:.0e}"
            )


def report(
    benchmark,
    group: str,
    peer: str,
    measured: Measured,
    work: roofline.Work | None,
    peaks: dict,
    seconds: float,
    **facts,
) -> None:
    """Replay one peer's rounds into its own test, with what a number means nothing without."""
    benchmark.group = group
    if peer in measured.errors:
        pytest.fail(measured.errors[peer], pytrace=False)
    timing = measured.timings[peer]
    ours = measured.timings.get(peers.OURS)
    info = benchmark.extra_info
    info.update(facts, peer=peer, buffers=measured.buffers, load=round(measured.load, 2))
    info["first_call_seconds"] = timing.first_call
    if ours is not None and peer != peers.OURS:
        info["ratio_to_ours"] = measure.paired_ratio(timing, ours)._asdict()
        info["ratio_rounds"] = min(len(timing.rounds), len(ours.rounds))
    if len(timing.rounds) == 1:
        info["note"] = f"a call takes longer than the {seconds:g} s of the case: 1 round"
    # A replayed CUDA graph allocates nothing: its memory was taken at capture.
    if measured.peak_bytes.get(peer):
        info["peak_bytes"] = measured.peak_bytes[peer]
    if work is not None:
        floor = roofline.floor_seconds(work, peaks["bytes_per_second"], peaks["flops_per_second"])
        info.update(work._asdict(), floor_seconds=floor)
        info["fraction_of_floor"] = floor / measure.quartiles(timing.rounds).median
    replay.replay(benchmark, timing)


def summary(case: Case, measured: Measured, info: dict) -> list[tuple[float, str]]:
    """[(ratio, line)] for the end of the run; ``info`` is that of ours. Empty without a peer."""
    ours = measured.timings[peers.OURS]
    ratios = {
        name: measure.paired_ratio(timing, ours)
        for name, timing in measured.timings.items()
        if not name.startswith(peers.OURS)
    }
    if not ratios:
        return []
    best = min(ratios, key=lambda name: ratios[name].median)
    ratio = ratios[best]
    line = (
        f"{ratio.median:7.2f} ({ratio.q1:.2f} to {ratio.q3:.2f}) {best:20} "
        f"{100 * info['fraction_of_floor']:4.0f} % of floor  {case.direction} {case.layout} "
        f"{case.shape.name}"
    )
    if "peak_bytes" in info:
        line += f", peak {info['peak_bytes'] / 2**20:.1f} MiB"
    return [(ratio.median, line)]
