"""One row an epoch: a CSV file and TensorBoard."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .errors import TrainError
from .files import disk_problem, shown, write_text
from .metrics import Scores

CSV_NAME = "history.csv"
# Columns that measure the machine: the only ones that differ between a run and its repetition.
TIMING = ("seconds", "images_per_second")


def row(
    epoch: int,
    lr: float,
    train_loss: float,
    train_top1: float,
    scores: Scores,
    classes: tuple[str, ...],
    seconds: float,
    images_per_second: float,
) -> dict[str, float]:
    """The row of an epoch; ``seconds`` covers training and evaluation."""
    return {
        "epoch": epoch,
        "lr": lr,
        "train_loss": train_loss,
        "train_top1": train_top1,
        "test_loss": scores.loss,
        "test_top1": scores.top1,
        "test_mean_class_accuracy": scores.mean_class_accuracy,
        "test_macro_f1": scores.macro_f1,
        "test_auroc": scores.auroc,
        **{f"test_acc_{c}": v for c, v in zip(classes, scores.per_class, strict=True)},
        "seconds": seconds,
        "images_per_second": images_per_second,
    }


def write_csv(folder: Path, rows: list[dict[str, float]]) -> None:
    """Writes the whole history; floats in full, so that equal files mean equal runs.

    The file is rewritten, not appended to: after a kill it can neither miss an epoch nor hold
    one twice.
    """
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for values in rows:
        writer.writerow({k: round(v, 3) if k in TIMING else v for k, v in values.items()})
    write_text(folder / CSV_NAME, text.getvalue())


class TensorBoard:
    """Event files in ``folder/tensorboard``; does nothing where ``enabled`` is False."""

    def __init__(self, folder: Path, enabled: bool, first_epoch: int):
        self._writer = None
        self._folder = folder / "tensorboard"
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError(
                "TensorBoard is missing: pip install 'lka_kernels[train]', "
                "or give --tensorboard false"
            ) from error
        if shown(str(folder)) != str(folder):
            raise TrainError(
                f"TensorBoard takes no folder whose name is not UTF-8: {self._folder}; give "
                "another --out, or --tensorboard false"
            )
        # purge_step hides what a killed run logged after its last checkpoint.
        self._call(
            lambda: setattr(
                self, "_writer", SummaryWriter(str(self._folder), purge_step=first_epoch)
            )
        )

    def log(self, values: dict[str, float]) -> None:
        """Adds one scalar a column, at the row's epoch."""
        if self._writer is None:
            return
        for name, value in values.items():
            if name != "epoch":
                tag = name.replace("_", "/", 1) if name.startswith(("train_", "test_")) else name
                tag = shown(tag)
                self._call(
                    lambda t=tag, v=value: self._writer.add_scalar(t, v, int(values["epoch"]))
                )
        self._call(self._writer.flush)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._call(self._writer.close)

    def _call(self, action) -> None:
        try:
            action()
        except OSError as error:
            self._writer = None
            problem = disk_problem(error, self._folder)
            raise (problem or error) from error
