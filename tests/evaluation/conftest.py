"""Small tasks and sources whose every number can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attar.tasks import TabularClassification
from attar.tasks.task import Batch, Rows, Task


class Median(Task):
    """A metric that is no mean and that is better when low: the median absolute error."""

    outputs = ("values",)
    metric = "median_error"
    higher_is_better = False
    width = 1

    def fitted(self, source: Any) -> Median:
        return self

    def loss(self, out: Any, batch: Batch) -> Tensor:
        return (out - batch["labels"]).abs()

    def rows(self, out: Any, batch: Batch) -> Rows:
        return {"values": out.detach(), "labels": batch["labels"]}

    def score(self, rows: Rows) -> dict[str, float]:
        return {"median_error": self.primary(rows)}

    def primary(self, rows: Rows) -> float:
        return float((rows["values"] - rows["labels"]).abs().median())

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        return {"distance": float((rows["values"] - teacher_rows["values"]).abs().mean())}

    def floor(self, labels: Tensor) -> float:
        return float((labels - labels.median()).abs().median())


class Listed:
    """A source that gives its rows in any order it is told to."""

    name = "listed"
    classes = ("no", "yes")

    def __init__(
        self, inputs: Tensor, labels: Tensor | None, order: list[int] | None = None
    ) -> None:
        self.inputs, self.labels = inputs, labels
        self.order = list(range(len(inputs))) if order is None else order

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, ids: Tensor) -> Batch:
        batch = {"inputs": self.inputs[ids], "ids": ids}
        return batch if self.labels is None else batch | {"labels": self.labels[ids]}

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.order), batch_size):
            yield self.rows(torch.tensor(self.order[start : start + batch_size]))


class Modes(nn.Module):
    """A net with a part that stays in eval, and a note of the mode it was run in."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.frozen, self.seen = nn.Dropout(0.5), nn.BatchNorm1d(2), []
        self.train()
        self.frozen.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append((self.training, self.free.training, torch.is_grad_enabled()))
        if bool((inputs == 13).any()):
            raise RuntimeError("thirteen")
        return self.free(inputs)


def said(right: str, labels: Tensor | None = None) -> Rows:
    """Rows of two classes: "1" where the answer is right and "0" where it is wrong."""
    labels = torch.zeros(len(right), dtype=torch.long) if labels is None else labels
    answer = torch.where(torch.tensor([sign == "1" for sign in right]), labels, 1 - labels)
    return {"logits": nn.functional.one_hot(answer, 2).float(), "labels": labels}


@pytest.fixture
def house() -> Any:
    """The helpers of this folder."""

    class House:
        median = Median()
        task = TabularClassification(classes=("no", "yes"))
        listed, modes, said = Listed, Modes, staticmethod(said)

    return House
