"""Reads the files that ``--benchmark-json`` writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Quartiles

OURS = "ours"
FOLDER = Path(__file__).parent / "results"


class ResultError(Exception):
    """A file that cannot be used; the message names it and says why."""


class Key(NamedTuple):
    """What two runs must have in common for their numbers to be compared."""

    operator: str
    direction: str
    layout: str
    dtype: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"{self.operator} {self.direction} {self.layout} {self.dtype} {self.shape}"


class Row(NamedTuple):
    """One peer of one case."""

    seconds: Quartiles
    rounds: int
    ratio: Quartiles | None  # its time over ours; None for ours, or if ours was not measured
    ratio_rounds: int
    info: dict  # everything else, as benchmarks/cases.py writes it


class Results(NamedTuple):
    """One file."""

    path: Path
    facts: dict
    date: str
    cases: dict[Key, dict[str, Row]]


def load(path: str | Path) -> Results:
    """Read one file.

    Raises:
        ResultError: it is missing, or not a file of this suite.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict) or "benchmarks" not in content:
        raise ResultError(f"{path}: no file of pytest-benchmark: it has no 'benchmarks'")
    if "facts" not in content:
        raise ResultError(f"{path}: a file of pytest-benchmark, but not of this suite: no 'facts'")
    cases: dict[Key, dict[str, Row]] = {}
    try:
        for row in content["benchmarks"]:
            info, stats = row["extra_info"], row["stats"]
            ratio = info.get("ratio_to_ours")
            cases.setdefault(Key(*(info[name] for name in Key._fields)), {})[info["peer"]] = Row(
                Quartiles(stats["q1"], stats["median"], stats["q3"]),
                stats["rounds"],
                Quartiles(**ratio) if ratio else None,
                info.get("ratio_rounds", 0),
                info,
            )
    except KeyError as error:
        raise ResultError(f"{path}: a row has no {error}") from None
    return Results(path, content["facts"], content["datetime"][:10], cases)


def best_peer(peers: dict[str, Row]) -> str | None:
    """The peer with the least time over ours; other methods of ours are no peers."""
    rated = {
        name: row.ratio.median
        for name, row in peers.items()
        if row.ratio is not None and not name.startswith(OURS)
    }
    return min(rated, key=rated.get) if rated else None


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
