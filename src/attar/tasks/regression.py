"""Numbers to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from attar.losses import mse
from attar.runtime import DataError
from attar.tasks.task import Batch, Rows, Task, check_width


@dataclass(frozen=True)
class Regression(Task):
    """Each example has ``targets`` numbers; the model gives them standardised, [N, targets].

    The model works in units of the training split (minus its mean, over its deviation), so
    that a rate and a loss weight mean the same for any target; metrics are in the target's own
    units. ``mean`` and ``std`` are filled from the training split.
    """

    targets: Annotated[int, Ge(1)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    outputs: ClassVar[tuple[str, ...]] = ("values",)
    metric: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False
    competing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            units = getattr(self, name)
            if units is not None:  # a list where it was read from a file
                object.__setattr__(self, name, tuple(map(float, units)))

    @property
    def width(self) -> int | None:
        """How many numbers are predicted for an example."""
        return self.targets

    def fitted(self, source: Any) -> Regression:
        """Take the number of targets, their mean and their deviation from the data."""
        labels = source.labels
        if labels is None:
            if self.targets is None or self.mean is None or self.std is None:
                raise DataError(
                    f"{source.name}: has no labels; give Regression targets, mean and std"
                )
            return self
        if not labels.is_floating_point():
            raise DataError(f"{source.name}: its labels are classes; use a classification task")
        if source.classes is not None:
            raise DataError(
                f"{source.name}: its labels say which of several classes hold; use "
                "multi-label-classification"
            )
        if self.targets not in (None, labels.shape[1]):
            raise DataError(
                f"the task has {self.targets} targets but {source.name} has {labels.shape[1]}"
            )
        if self.mean is not None:
            return replace(self, targets=labels.shape[1])
        spread = labels.double().std(0, correction=0)
        return replace(
            self,
            targets=labels.shape[1],
            mean=tuple(labels.double().mean(0).tolist()),
            std=tuple(torch.where(spread > 0, spread, 1.0).tolist()),
        )

    def _units(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise DataError(
                "the task does not know its targets' mean and deviation; fill them from the "
                "training split first: task = task.fitted(train)"
            )
        return like.new_tensor(self.mean), like.new_tensor(self.std)

    def output(self, out: Any, name: str) -> Tensor:
        """The standardised values [N, targets]."""
        return check_width(super().output(out, name), self.width, "targets")

    def loss(self, out: Any, batch: Batch) -> Tensor:
        """Squared error in standardised units, mean over the targets, [N]."""
        return mse(self.output(out, "values"), self.labels(batch))

    def labels(self, batch: Batch) -> Tensor:
        """The labels standardised, [N, targets]."""
        mean, std = self._units(batch["labels"])
        return (batch["labels"] - mean) / std

    def rows(self, out: Any, batch: Batch) -> Rows:
        """Predicted values in the target's units and labels, both [N, targets]."""
        values = self.output(out, "values").detach().float()
        mean, std = self._units(values)
        kept = {"values": values * std + mean}
        return kept | ({"labels": batch["labels"]} if "labels" in batch else {})

    def score(self, rows: Rows) -> dict[str, float]:
        """Root mean squared error, mean absolute error, and the share of variance explained."""
        error = (rows["values"] - rows["labels"]).double()
        spread = (rows["labels"].double() - rows["labels"].double().mean(0)).square().sum()
        return {
            "rmse": self.primary(rows),
            "mae": float(error.abs().mean()),
            "r2": float(1 - error.square().sum() / spread) if spread > 0 else float("nan"),
        }

    def primary(self, rows: Rows) -> float:
        """Root mean squared error over examples and targets, in the target's units."""
        return float((rows["values"] - rows["labels"]).double().square().mean().sqrt())

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """Root mean squared difference from the teacher, in the target's units."""
        gap = (rows["values"] - teacher_rows["values"]).double()
        return {"rmse_to_teacher": float(gap.square().mean().sqrt())}

    def floor(self, labels: Tensor) -> float:
        """The root mean squared error of always answering the mean."""
        return float((labels - labels.mean(0)).double().square().mean().sqrt())

    def describe(self) -> dict[str, Any]:
        """What a saved model needs to turn its output into the target's units."""
        units = {"targets": self.targets, "mean": self.mean, "std": self.std}
        return super().describe() | units
