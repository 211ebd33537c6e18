"""Did anything become slower between two result files?

    python -m benchmarks.compare A.json B.json [--threshold 0.1]

A case has regressed from A to B if both of these hold, each by more than the threshold and with
quartile ranges that do not overlap:

1. The paired ratio fell: the time of the reference peer over ours, from rounds that both shared.
   A machine that is slower as a whole, or busier, slows both and leaves the ratio alone. The
   reference is the fastest peer in A of at least 3 rounds that is in B too.
2. Our own time rose, after division by the drift: the median of B's over A's time over all peers
   that are not ours. A peer that has become faster, with a new PyTorch, is no regression of ours.

An improvement is the same the other way round, everything else is unchanged. Without a reference
the second rule decides alone, and without any peer the drift counts as 1, which is said. Exit
status: 0, or 1 if a case regressed, or 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks.measure import Quartiles
from benchmarks.results import OURS, Key, ResultError, Results, Row, load

ENOUGH_ROUNDS = 3
MUST_AGREE = ("device", "device_name", "threads", "instruction_set", "dtype")


def main(arguments: list[str] | None = None) -> int:
    """Print what changed; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument("--threshold", type=float, default=0.1, help="change that counts")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
        check_comparable(before, after)
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    factor = drift(before, after)
    if factor is None:
        print("no peer is in both files: a slower machine cannot be told from slower kernels")
    else:
        print(f"the peers' times changed by a factor of {factor:.2f} (median)")
    for name in ("commit", "versions"):
        if before.facts[name] != after.facts[name]:
            print(f"{name}: {before.facts[name]} -> {after.facts[name]}")
    verdicts: dict[str, list[str]] = {"regressed": [], "improved": [], "unchanged": []}
    for key, peers in before.cases.items():
        others = after.cases.get(key, {})
        if OURS in peers and OURS in others:
            verdict, why = judge(peers, others, factor or 1.0, options.threshold)
            verdicts[verdict].append(f"{key}: {why}")
    verdicts["missing"] = [str(k) for k in ours(before) if k not in ours(after)]
    verdicts["new"] = [str(k) for k in ours(after) if k not in ours(before)]
    for verdict, lines in verdicts.items():
        print(f"{verdict}: {len(lines)}")
        if verdict != "unchanged":
            print("".join(f"  {line}\n" for line in lines), end="")
    return 1 if verdicts["regressed"] else 0


def ours(results: Results) -> list[Key]:
    """The cases in which ours was measured."""
    return [key for key, peers in results.cases.items() if OURS in peers]


def check_comparable(before: Results, after: Results) -> None:
    """Raise ResultError unless both were measured on the same device in the same way."""
    for name in MUST_AGREE:
        a, b = before.facts.get(name), after.facts.get(name)
        if a != b:
            raise ResultError(
                f"not comparable: {name} is {a!r} in {before.path} and {b!r} in {after.path}"
            )


def drift(before: Results, after: Results) -> float | None:
    """How much slower the peers are in ``after``: median over all that are in both."""
    changes = [
        after.cases[key][name].seconds.median / row.seconds.median
        for key, peers in before.cases.items()
        for name, row in peers.items()
        if not name.startswith(OURS) and name in after.cases.get(key, {})
    ]
    return statistics.median(changes) if changes else None


def judge(
    before: dict[str, Row], after: dict[str, Row], factor: float, threshold: float
) -> tuple[str, str]:
    """("regressed", "improved" or "unchanged", the figures) of one case."""
    then, now = before[OURS].seconds, after[OURS].seconds
    now = Quartiles(*(value / factor for value in now))
    time = moved(then, now, threshold)
    why = f"{1e3 * then.median:.3f} -> {1e3 * now.median:.3f} ms without drift"
    name = reference(before, after)
    if name is None:
        slower, faster = time > 0, time < 0
    else:
        old, new = before[name].ratio, after[name].ratio
        ratio = moved(old, new, threshold)
        why += f", {name} takes {old.median:.2f} -> {new.median:.2f} times as long"
        slower, faster = time > 0 and ratio < 0, time < 0 and ratio > 0
    return "regressed" if slower else "improved" if faster else "unchanged", why


def reference(before: dict[str, Row], after: dict[str, Row]) -> str | None:
    """The fastest peer in ``before`` with enough paired rounds in both, or None."""
    usable = [
        name
        for name, row in before.items()
        if not name.startswith(OURS)
        and name in after
        and min(row.ratio_rounds, after[name].ratio_rounds) >= ENOUGH_ROUNDS
    ]
    return min(usable, key=lambda name: before[name].seconds.median, default=None)


def moved(old: Quartiles, new: Quartiles, threshold: float) -> int:
    """1 if ``new`` is clearly larger, -1 if clearly smaller, 0 if it may be noise."""
    if new.median > old.median * (1 + threshold) and new.q1 > old.q3:
        return 1
    if new.median < old.median / (1 + threshold) and new.q3 < old.q1:
        return -1
    return 0


if __name__ == "__main__":
    sys.exit(main())
