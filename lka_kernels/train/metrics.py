"""Accuracy, macro-F1 and AUROC of a set of logits, by torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How good a set of predictions is; all values are fractions of 1.

    Attributes:
        loss: mean cross-entropy in nats.
        top1: share of images whose largest logit is their class.
        macro_f1: mean over classes of the F1 score.
        auroc: mean over classes of the one-against-rest area under the ROC curve.
        per_class: share of each class's images that were recognised (recall).
        confusion: (classes, classes) counts, true class by row.
    """

    loss: float
    top1: float
    macro_f1: float
    auroc: float
    per_class: list[float]
    confusion: list[list[int]]

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of ``per_class``, which large classes do not dominate."""
        return sum(self.per_class) / len(self.per_class)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores (N, classes) logits against (N,) int64 labels."""
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_auroc,
        multiclass_confusion_matrix,
        multiclass_f1_score,
    )

    classes = logits.shape[1]
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    probabilities = logits.softmax(1)
    return Scores(
        loss=float(torch.nn.functional.cross_entropy(logits, labels)),
        top1=float(multiclass_accuracy(logits, labels, classes, average="micro")),
        macro_f1=float(multiclass_f1_score(logits, labels, classes, average="macro")),
        auroc=float(multiclass_auroc(probabilities, labels, classes, average="macro")),
        per_class=multiclass_accuracy(logits, labels, classes, average="none").tolist(),
        confusion=multiclass_confusion_matrix(logits, labels, classes).tolist(),
    )
