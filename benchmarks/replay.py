"""A clock that replays measured durations, so that pytest-benchmark shows interleaved peers.

pytest-benchmark times one test after the other. Here the first test of a case times all its peers
in turns, and every peer's test then lets pytest-benchmark time a function that does nothing but
move this clock by what that peer's calls took. Its table, statistics and files hold real durations.
"""

from __future__ import annotations

from benchmarks.measure import Timing


class ReplayClock:
    """``read`` is the timer, ``advance`` the function that is timed."""

    def __init__(self):
        self._now = 0.0
        self._durations: list[float] = []
        self._repeats = 1
        self._calls = 0

    def load(self, timing: Timing) -> None:
        """Replay this timing from its first round on."""
        self._durations = timing.rounds
        self._repeats = timing.repeats
        self._calls = 0

    def read(self) -> float:
        """Seconds."""
        return self._now

    def advance(self) -> None:
        """Let the next of the recorded calls pass."""
        index = self._calls // self._repeats
        self._calls += 1
        # pytest-benchmark calls once more, untimed, for the result of a repeated function.
        if index < len(self._durations):
            self._now += self._durations[index]


CLOCK = ReplayClock()


def replay(benchmark, timing: Timing) -> None:
    """Report ``timing`` as the result of this test, which must use CLOCK as its timer."""
    CLOCK.load(timing)
    benchmark.pedantic(CLOCK.advance, rounds=len(timing.rounds), iterations=timing.repeats)
