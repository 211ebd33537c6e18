"""The README's chart: how many times as long the fastest peer takes, case by case."""

from __future__ import annotations

from pathlib import Path

from benchmarks import shapes, tables
from benchmarks.results import Results, best_peer

COLOURS = {"forward": "#1b7837", "dX": "#e08214", "dW": "#2166ac", "forward+backward": "#762a83"}
MARKERS = {"forward": "o", "dX": "^", "dW": "s", "forward+backward": "D"}


def draw(runs: list[Results], path: Path) -> None:
    """One panel per run; a dot is the worse layout of a shape in one direction."""
    # Not at the top: reading results must not need matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    panels = [points(run) for run in runs]
    heights = [1.1 + 0.27 * len(panel) for panel in panels]
    # Text stays text, and the file is the same for the same results.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lka_kernels"}):
        figure = Figure(figsize=(8.5, 0.4 + sum(heights)))
        axes = figure.subplots(len(runs), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, run, panel in zip(axes, runs, panels, strict=True):
            _panel(axis, run, panel)
        handles = [
            axes[0].scatter([], [], color=COLOURS[name], marker=MARKERS[name])
            for name in tables.DIRECTIONS
        ]
        figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
        figure.legend(handles, tables.DIRECTIONS, loc="lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def points(run: Results) -> dict[str, dict[str, float]]:
    """Label -> direction -> ratio, for the default shapes if there are any; operators in order."""
    device = run.facts["device"]
    default = {
        shape.name
        for everything in (shapes.DEPTHWISE, shapes.ADAPTER)
        for shape in shapes.selected(everything, "default", device)
    }
    default &= {key.shape for key in run.cases}
    found: dict[str, dict[str, float]] = {}
    # The adapter first; shapes in the order in which they were measured.
    for key, peers in sorted(run.cases.items(), key=lambda item: item[0].operator, reverse=True):
        best = best_peer(peers)
        measured = best is not None and key.operator != tables.TRAINING
        if not measured or (default and key.shape not in default):
            continue
        kind = "adapter" if key.operator == "large_kernel_adapter" else "depthwise"
        dots = found.setdefault(f"{kind} {key.size}", {})
        ratio = peers[best].ratio.median
        dots[key.direction] = min(ratio, dots.get(key.direction, ratio))
    return found


def _panel(axis, run: Results, panel: dict[str, dict[str, float]]) -> None:
    for height, dots in enumerate(panel.values()):
        axis.plot([min(dots.values()), max(dots.values())], [height] * 2, color="0.8", zorder=1)
        for direction, ratio in dots.items():
            axis.scatter(
                ratio, height, s=26, color=COLOURS[direction], marker=MARKERS[direction], zorder=2
            )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if 0.4 * low <= t <= 2.5 * high]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.set_xlim(min(low, ticks[0]), max(high, ticks[-1]))
    axis.minorticks_off()
    axis.set_yticks(range(len(panel)), list(panel), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.92")
    axis.set_xlabel("time of the fastest peer over ours (right of the line: ours is faster)")
    axis.set_title(f"{tables.title(run)}, torch {run.facts['versions']['torch']}", fontsize=10)
