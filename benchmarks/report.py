"""Writes docs/performance.md, the chart and the README's summary from result files.

    python -m benchmarks.report [FILES] [--docs docs] [--readme README.md]

FILES default to benchmarks/results/*.json. Of several files of one device, dtype and number of
threads the newest is taken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import chart, tables
from benchmarks.results import FOLDER, ResultError, Results, load

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"

HOW = """\
Written by `python -m benchmarks.report` from the files in `benchmarks/results/`; do not edit.

**How it was measured.** The peers of a case take turns in every round, with random inputs in
several buffers. A ratio is the peer's time over ours within one round; tables show the median over
the rounds, in brackets its quartiles, worst case first: below 1 ours is slower. All peers get and
give tensors in the case's layout; those that compute in another pay for the conversions. "Of the
floor" is the time to move the case's bytes once, or to do its multiply-adds (without those that
meet padding), whichever is longer, over our time; bandwidth and rate were measured in the same run.
It can exceed 100 % where tensors stay in a cache, or where a transform needs fewer operations. In
dX and dW alone, torch.fft has its spectra of the weight or the input from forward. Peak memory is
what forward+backward allocates through PyTorch beyond its inputs; scratch that kernels keep to
themselves is not in it. †: fewer than 3 rounds, as a call took longer than the whole case was to
take.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the files; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILES")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    try:
        files = options.files or sorted(FOLDER.glob("*.json"))
        if not files:
            raise ResultError(f"there are no results in {FOLDER}: run make bench")
        runs = newest([load(file) for file in files])
        readme = options.readme.read_text()
        if BEGIN not in readme or END not in readme:
            raise ResultError(f"{options.readme} has no lines {BEGIN} and {END}")
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    options.docs.mkdir(parents=True, exist_ok=True)
    chart.draw(runs, options.docs / "performance.svg")
    (options.docs / "performance.md").write_text(page(runs))
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    options.readme.write_text(f"{before}{BEGIN}\n{short(runs)}{END}{after}")
    return 0


def newest(runs: list[Results]) -> list[Results]:
    """The newest of each device, dtype and number of threads; CPUs first.

    Raises:
        ResultError: a file has no case with ours and a peer.
    """
    found = {}
    for run in sorted(runs, key=lambda run: run.date):
        if not any(
            tables.rated(run, operator, direction)
            for operator in tables.operators(run)
            for direction in tables.DIRECTIONS
        ):
            raise ResultError(f"{run.path}: no case in it has both ours and a peer")
        facts = run.facts
        found[facts["device"], facts["device_name"], facts["dtype"], facts["threads"]] = run
    return [found[key] for key in sorted(found)]


def page(runs: list[Results]) -> str:
    """docs/performance.md."""
    lines = ["# Performance", "", HOW, "![The fastest peer's time over ours](performance.svg)", ""]
    for run in runs:
        lines += [f"## {tables.title(run)}", "", *described(run), ""]
        lines += ["The fastest peer's time over ours:", "", *tables.summary(run, by_kernel=True)]
        for operator in tables.operators(run):
            for direction in tables.DIRECTIONS:
                if tables.rated(run, operator, direction):
                    lines += [f"### `{operator}`, {direction}", ""]
                    lines += tables.cases(run, operator, direction)
        steps = tables.training(run)
        if steps:
            lines += ["### One training step", "", *steps]
    return "\n".join(lines)


def short(runs: list[Results]) -> str:
    """The README's part."""
    lines = ["![The fastest peer's time over ours](docs/performance.svg)", ""]
    for run in runs:
        lines += [f"{tables.title(run)}, the fastest peer's time over ours:", ""]
        lines += tables.summary(run, by_kernel=False)
    lines += ["[docs/performance.md](docs/performance.md) has every case, and how it was measured."]
    return "\n".join(lines) + "\n"


def described(run: Results) -> list[str]:
    """Versions, commit, peaks, and what speaks against the numbers."""
    facts, limits = run.facts, run.facts["peaks"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v != "not installed")
    malloc = " ".join(f"{k}={v}" for k, v in facts["malloc"].items()) or "as glibc has it"
    lines = [
        f"- {run.date}, commit {facts['commit']}, instruction set {facts['instruction_set']}",
        f"- {versions}",
        f"- copies {limits['bytes_per_second'] / 1e9:.1f} GB/s, multiply-adds "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s ({limits['how']})",
        f"- suite {facts['suite']}, {facts['seconds_per_case']:g} s a case; malloc: {malloc}",
    ]
    if facts["load_before"] > 0.25 * facts["cpus"]:
        lines.append(
            f"- **not to be quoted**: {facts['cpus']} CPUs were busy before the first "
            f"measurement (load average {facts['load_before']})"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
