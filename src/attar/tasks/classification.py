"""One class for each example: images and table rows alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from attar.losses import cross_entropy
from attar.runtime import DataError
from attar.tasks.classes import ClassTask
from attar.tasks.task import Batch, Rows

BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Classification(ClassTask):
    """Each example has one of ``width`` classes; the model gives logits [N, width].

    Args:
        classes: how many, or their names; taken from the data when left out.
        label_smoothing: share of each label spread evenly over all classes (Szegedy et al.
            2016); the baseline is trained with it too.
    """

    classes: Annotated[int, Ge(2)] | Sequence[str] | None = None
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 2:
            raise DataError(f"a classification needs at least 2 classes, not {self.width}")
        if not 0 <= self.label_smoothing < 1:
            raise DataError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")

    def check_labels(self, labels: Tensor, source: Any) -> None:
        """Refuse labels that are no class numbers."""
        _check_labels(labels, source, self.width or 0)

    def loss(self, out: Any, batch: Batch) -> Tensor:
        """Cross-entropy with the labels, [N]."""
        logits = self.output(out, "logits")
        return cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)

    def rows(self, out: Any, batch: Batch) -> Rows:
        """Logits [N, C] in float32 and, where there are any, labels [N]."""
        kept = {"logits": self.output(out, "logits").detach().float()}
        return kept | ({"labels": batch["labels"]} if "labels" in batch else {})

    def score(self, rows: Rows) -> dict[str, float]:
        """Accuracy, cross-entropy (nats), expected calibration error, balanced accuracy."""
        by_class = self._recall(rows)
        return {
            "accuracy": self.primary(rows),
            "cross_entropy": float(F.cross_entropy(rows["logits"], rows["labels"])),
            "calibration_error": calibration_error(rows["logits"], rows["labels"]),
            "balanced_accuracy": float(by_class[~by_class.isnan()].mean()),
        }

    def primary(self, rows: Rows) -> float:
        """The share of examples whose most likely class is the label."""
        return float(self.correct(rows).double().mean())

    def correct(self, rows: Rows) -> Tensor:
        """Whether the most likely class is the label, bool [N]."""
        return rows["logits"].argmax(1) == rows["labels"]

    def per_class(self, rows: Rows) -> dict[str, float]:
        """The share of each class that is recognised (recall); NaN for an absent class."""
        return dict(zip(self.names(), self._recall(rows).tolist(), strict=True))

    def _recall(self, rows: Rows) -> Tensor:
        width = rows["logits"].shape[1]
        right = torch.bincount(rows["labels"][self.correct(rows)], minlength=width)
        return right.double() / torch.bincount(rows["labels"], minlength=width)

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """Share of equal answers, and the mean KL divergence from the teacher in nats."""
        student, teacher = rows["logits"], teacher_rows["logits"]
        divergence = F.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
        )
        same = student.argmax(1) == teacher.argmax(1)
        return {"agreement": float(same.double().mean()), "kl": float(divergence)}

    def floor(self, labels: Tensor) -> float:
        """The share of the most frequent class."""
        return float(torch.bincount(labels).max() / len(labels))


class ImageClassification(Classification):
    """Images [N, C, H, W] in [0, 1], one class each.

    Example:
        >>> ImageClassification(classes=10).width
        10
    """


class TabularClassification(Classification):
    """Table rows [N, columns] of numbers, one class each."""


def _check_labels(labels: Tensor, source: Any, width: int) -> None:
    if labels.is_floating_point() and source.classes is not None:
        raise DataError(
            f"{source.name}: each of its rows may have several classes; use "
            "multi-label-classification, or labels.argmax(1) for one-hot rows"
        )
    if labels.is_floating_point():
        raise DataError(f"{source.name}: its labels are numbers, not classes; use regression")
    wrong = ((labels < 0) | (labels >= width)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{source.name}: the label of row {row} is {int(labels[row])}, "
            f"but with {width} classes labels go from 0 to {width - 1}"
        )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015; 15 equal bins as in Guo et al. 2017).

    ``sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)|`` over bins of the highest probability.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = (answer == labels).double() - confidence
    return float(torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, gap).abs().sum()) / len(
        labels
    )
