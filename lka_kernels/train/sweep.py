"""Several configurations times several seeds, as one table with confidence intervals.

``python -m lka_kernels.train.sweep DATA --out FOLDER --variants linear lka:conv=none
lka:kernel_size=7 --seeds 0 1 2 [options of lka-train]``. A variant is a method, with options of
the method or of the run after a colon: ``linear:lr=0.01,epochs=50``. Finished runs are kept and a
run that was cut off is continued, so the same command can be given again after a stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .errors import TrainError
from .files import shown, write_json, write_text

SCORES = ("top1", "mean_class_accuracy", "macro_f1", "auroc")


@dataclass
class Row:
    """The scores of one variant over the seeds."""

    variant: str
    parameters: int
    seconds: float
    scores: dict[str, list[float]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Runs the sweep; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lka_kernels.train.sweep",
        description="Trains every variant with every seed and writes table.md and table.json.",
        epilog="All other options go to lka-train.",
    )
    parser.add_argument("data")
    parser.add_argument("--out", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--variants", nargs="+", required=True, metavar="METHOD[:OPTION=VALUE,...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    raw = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(raw)
    try:
        rows = [run_variant(v, options.data, options.out, options.seeds, rest)
                for v in options.variants]  # fmt: skip
        command = "python -m lka_kernels.train.sweep " + shlex.join(raw)
        text = f"`{command}`\n\n{table(rows, len(options.seeds))}"
        write_text(options.out / "table.md", text)
        write_json(options.out / "table.json", {
            "command": command, "seeds": options.seeds, "rows": [vars(row) for row in rows],
        })  # fmt: skip
    except TrainError as error:
        print(shown(f"lka-train: error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    print(shown(text))
    return 0


def variant_arguments(variant: str) -> list[str]:
    """``"lka:conv=none,lr=0.01"`` as arguments of lka-train.

    A name that the method has an option for is the method's; all others are the run's.
    """
    from lka_kernels.methods import METHODS

    name, _, settings = variant.partition(":")
    if name not in METHODS:
        raise TrainError(f"variant {variant!r}: the methods are {', '.join(METHODS)}")
    own = {f.name for f in dataclasses.fields(METHODS[name].options)}
    result = [f"--method={name}"]
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise TrainError(f"variant {variant!r}: {setting!r} is not OPTION=VALUE")
        prefix = f"{name}." if key.replace("-", "_") in own else ""
        result.append(f"--{prefix}{key}={value}")
    return result


def run_variant(variant: str, data: str, out: Path, seeds: list[int], rest: list[str]) -> Row:
    """Trains a variant with every seed, or reads what an earlier sweep left."""
    from .cli import parse
    from .run import METRICS_NAME, train

    row = Row(variant, 0, 0.0, {name: [] for name in SCORES})
    for seed in seeds:
        name = "".join(c if c.isalnum() or c in "=.-" else "_" for c in variant)
        folder = out / f"{name}-seed{seed}"
        arguments = [data, *rest, *variant_arguments(variant), f"--seed={seed}"]
        config, method_options = parse([*arguments, f"--out={folder}"])
        finished = _finished(folder, config, method_options)
        if finished:
            metrics = json.loads((folder / METRICS_NAME).read_text())
        else:
            print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
            metrics = train(dataclasses.replace(config, resume=True), method_options)
        for score in SCORES:
            row.scores[score].append(metrics["final"][score])
        row.parameters = metrics["trainable_parameters"]
        row.seconds += metrics["seconds"] / len(seeds)
    return row


def confidence(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; nan width for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, student_quantile(0.975, len(values) - 1) * error


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by bisection of its distribution function."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return low


def table(rows: list[Row], seeds: int) -> str:
    """Markdown: mean and 95 % interval in percent; differences to the first row by seed."""
    first = rows[0]
    head = ["variant", "parameters", "top-1", "class mean", "macro-F1", "AUROC",
            f"top-1 against {first.variant}", "seconds a run"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        pairs = zip(row.scores["top1"], first.scores["top1"], strict=True)
        gain = "-" if row is first else _percent([a - b for a, b in pairs], sign=True)
        cells = [row.variant, f"{row.parameters:,}", *(_percent(row.scores[s]) for s in SCORES),
                 gain, f"{row.seconds:.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(
        f"\nMean of {seeds} seeds in percent, with the half width of the 95 % interval (Student's "
        "t); differences are taken seed by seed."
    )
    return "\n".join(lines) + "\n"


def _finished(folder: Path, config, method_options) -> bool:
    from .config import as_dict, difference
    from .folder import read_config
    from .run import METRICS_NAME

    saved = read_config(folder)
    if saved is None or not (folder / METRICS_NAME).exists():
        return False
    changes = difference(saved, as_dict(config, method_options))
    if changes:
        raise TrainError(f"{folder} was run with other options:\n  " + "\n  ".join(changes))
    return True


def _percent(values: list[float], sign: bool = False) -> str:
    mean, half = confidence([100 * value for value in values])
    shown = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.1f}"


def _student_cdf(value: float, freedom: int) -> float:
    # With t = sqrt(freedom) tan(angle) the density becomes a power of a cosine on a finite range.
    upper, steps = math.atan(value / math.sqrt(freedom)), 2000
    width = upper / steps
    inner = sum(math.cos(width * (i + 0.5)) ** (freedom - 1) for i in range(steps))  # midpoint rule
    norm = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    return 0.5 + norm * inner * width


if __name__ == "__main__":
    sys.exit(main())
