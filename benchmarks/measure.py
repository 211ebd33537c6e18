"""How it is measured: the peers of a case take turns within every round, over several buffers.

A machine whose speed drifts, or that has other work to do, then slows all peers of a round alike,
and the ratio of two of them in one round means something. Calls shorter than a round's least time
are repeated. Garbage collection waits meanwhile.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Buffers add up to this many bytes, so that a call does not find its input in a cache.
BUFFER_BYTES = 64 * 2**20
MOST_BUFFERS = 16
MOST_ROUNDS = 60
ROUND_SECONDS = 2e-3

Call = Callable[[int], object]  # with the index of a buffer


class Timing(NamedTuple):
    """What was measured of one peer."""

    first_call: float  # seconds; compiles and allocates, and is not among the rounds
    repeats: int  # calls in a round
    rounds: list[float]  # seconds of one call, by round; a slow peer sits out the later rounds


class Quartiles(NamedTuple):
    """Of a sample; all the same for a single value."""

    q1: float
    median: float
    q3: float


def random_inputs(make: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors of ``make``, at least 2, of BUFFER_BYTES in all where MOST_BUFFERS allow it."""
    first = make()
    bytes_each = max(1, first.numel() * first.element_size())
    count = min(max(2, -(-BUFFER_BYTES // bytes_each)), MOST_BUFFERS)
    return [first, *(make() for _ in range(count - 1))]


def timed(
    call: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None
) -> float:
    """Seconds of one call; ``wait`` returns when the device has finished."""
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - begun) / repeats


def plan(each: float, seconds: float, peers: int) -> tuple[int, int]:
    """(repeats, rounds) of a peer whose call takes ``each``, in a case of ``seconds``.

    A round lasts ROUND_SECONDS at least, and a peer's rounds its share of the case. But there are
    5 rounds where they fit into the whole case, else 3, and 1 if a single call does not fit.
    """
    repeats = max(1, math.ceil(ROUND_SECONDS / each))
    fewest = next((n for n, fit in ((5, 5), (3, 1)) if fit * each <= seconds), 1)
    rounds = min(int(seconds / peers / (each * repeats)), MOST_ROUNDS)
    return repeats, max(fewest, rounds)


def interleave(
    calls: dict[str, Call],
    first_calls: dict[str, float],
    buffers: int,
    seconds: float,
    wait: Callable[[], object],
) -> dict[str, Timing]:
    """Time all ``calls``, each called once already, in about ``seconds``.

    The order rotates from round to round. All peers draw from one cycle of buffers, so that none
    finds in a cache what the one before has just read.
    """
    turn = itertools.cycle(range(buffers))
    plans = {}
    for name, call in calls.items():
        # Not the first call, which may have compiled.
        each = timed(lambda c=call: c(next(turn)), 1, wait)
        if each <= seconds:
            each = min(each, timed(lambda c=call: c(next(turn)), 1, wait))
        plans[name] = plan(each, seconds, len(calls))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(max(rounds for _, rounds in plans.values())):
            for name in rotated(list(calls), index):
                repeats, rounds = plans[name]
                if index < rounds:
                    call = calls[name]
                    taken[name].append(timed(lambda c=call: c(next(turn)), repeats, wait))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(first_calls[name], plans[name][0], taken[name]) for name in calls}


def rotated(names: list[str], index: int) -> list[str]:
    """``names``, beginning with another one in every round."""
    start = index % len(names)
    return names[start:] + names[:start]


def paired_ratio(peer: Timing, ours: Timing) -> Quartiles:
    """The peer's time over ours, from the rounds in which both were measured."""
    return quartiles([a / b for a, b in zip(peer.rounds, ours.rounds, strict=False)])


def quartiles(values: list[float]) -> Quartiles:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))
