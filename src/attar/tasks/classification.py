"""One class for each example: images and table rows alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from attar.losses import cross_entropy
from attar.runtime import DataError
from attar.tasks.task import Batch, Rows, Task, check_width

BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Classification(Task):
    """Each example has one of ``width`` classes; the model gives logits [N, width].

    Args:
        classes: how many, or their names; taken from the data when left out.
        label_smoothing: share of each label spread evenly over all classes (Szegedy et al.
            2016); the baseline is trained with it too.
    """

    classes: Annotated[int, Ge(2)] | Sequence[str] | None = None
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.classes is not None and not isinstance(self.classes, int):
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.width is not None and self.width < 2:
            raise DataError(f"a classification needs at least 2 classes, not {self.width}")
        if not 0 <= self.label_smoothing < 1:
            raise DataError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")

    @cached_property
    def width(self) -> int | None:
        """How many classes there are; None before any data told."""
        if self.classes is None or isinstance(self.classes, int):
            return self.classes
        return len(self.classes)

    def fitted(self, source: Any) -> Self:
        """Take the class names from the data, or check that their number is right."""
        known = source.classes
        if known is None and self.width is None:
            raise DataError(f"{source.name}: says nothing of its classes; give the task classes: N")
        if known is not None and self.width not in (None, len(known)):
            raise DataError(
                f"the task has {self.width} classes but {source.name} has {len(known)}; "
                "make them agree, or leave the task's classes out"
            )
        own = None if isinstance(self.classes, int) else self.classes
        if known is not None and own is not None and tuple(known) != own:
            raise DataError(
                f"the task's classes are {', '.join(own[:6])} but {source.name} has "
                f"{', '.join(known[:6])}, so equal numbers mean different things"
            )
        settled = replace(self, classes=self.classes if known is None else known)
        _check_labels(source, settled.width or 0)
        return settled

    def names(self) -> list[str]:
        """The class names, numbers where none were given."""
        if self.classes is None or isinstance(self.classes, int):
            return [str(index) for index in range(self.width or 0)]
        return list(self.classes)

    def output(self, out: Any, name: str) -> Tensor:
        """The logits [N, width]."""
        if isinstance(out, Tensor) and name == "logits" and out.shape[1:] == (self.width,):
            return out
        return check_width(super().output(out, name), self.width, "classes")

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

    def describe(self) -> dict[str, Any]:
        """The class names in order of their numbers, or how many there are."""
        named = self.classes is None or isinstance(self.classes, int)
        return super().describe() | {"classes": self.classes if named else self.names()}

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


def _check_labels(source: Any, width: int) -> None:
    labels = source.labels
    if labels is None:
        return
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
