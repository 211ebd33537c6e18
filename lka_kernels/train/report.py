"""What a finished run leaves to read: curves, confusion matrix, metrics, predictions, versions."""

from __future__ import annotations

import csv
import io
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from .files import shown, write_atomically, write_json, write_text

_PACKAGES = (
    "torchvision", "timm", "torchmetrics", "numpy", "pillow", "safetensors", "triton",
)  # fmt: skip


def write_versions(folder: Path, device: torch.device) -> None:
    """Writes ``versions.json``: software, device and threads, so that numbers can be placed."""
    import lka_kernels

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    write_json(
        folder / "versions.json",
        {
            "lka_kernels": lka_kernels.__version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,  # with the build, such as +cu130
            **{name: version(name) for name in _PACKAGES},
            "cuda": torch.version.cuda,
            "platform": platform.platform(),
            "device": name,
            "threads": torch.get_num_threads(),
            "backends": lka_kernels.available_backends(),
        },
    )


def write_predictions(
    folder: Path, paths: Sequence[Path], labels: Tensor, logits: Tensor, classes: Sequence[str]
) -> None:
    """Writes ``predictions.csv``: one line for each evaluated image, with all probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "predicted", *(f"p_{name}" for name in classes)])
    probabilities = logits.double().softmax(1)
    for path, label, row in zip(paths, labels.tolist(), probabilities, strict=True):
        predicted = classes[int(row.argmax())]
        writer.writerow([path, classes[label], predicted, *(f"{p:.6f}" for p in row.tolist())])
    write_text(folder / "predictions.csv", text.getvalue())


def draw_curves(folder: Path, rows: list[dict[str, float]]) -> None:
    """Writes ``curves.png``: loss, scores and learning rate by epoch."""
    figure = _figure(12, 3.6)
    epochs = [row["epoch"] for row in rows]
    panels = (
        ("loss", {"train": "train_loss", "test": "test_loss"}),
        ("score", {
            "train top-1": "train_top1", "test top-1": "test_top1",
            "test macro-F1": "test_macro_f1", "test AUROC": "test_auroc",
        }),
        ("learning rate", {"": "lr"}),
    )  # fmt: skip
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, column in lines.items():
            marker = "o" if len(rows) == 1 else None
            axes.plot(epochs, [row[column] for row in rows], label=label, marker=marker)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    _save(figure, folder / "curves.png")


def draw_confusion(folder: Path, counts: list[list[int]], classes: Sequence[str]) -> None:
    """Writes ``confusion_matrix.png``: counts, coloured by the share of the true class."""
    side = max(3.5, 0.8 * len(classes) + 2)
    figure = _figure(side + 0.6, side)
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
    names = [shown(name) for name in classes]
    # Names are no formulas: "$<5$" would be parsed as one, and refused.
    axes.set_xticklabels(names, rotation=45, ha="right", parse_math=False)
    axes.set_yticklabels(names, parse_math=False)
    if len(classes) <= 20:
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour)
    _save(figure, folder / "confusion_matrix.png")


def _figure(width: float, height: float):
    # Figure without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
