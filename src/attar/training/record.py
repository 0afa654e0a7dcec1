"""What is logged of the training loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attar.runtime import Ranks


class Record:
    """The loss and the terms' values since the last record; no step waits for one to be read.

    The values are copied into places that are made once. To hold the tensors themselves costs a
    CPU more: small blocks that outlive a step keep the allocator from giving the large ones again.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._loss = 0.0
        self.since = 0
        self.gradients: dict[str, float] | None = None  # the norms last seen
        self._places: list[list[Tensor]] = []
        self._scales: list[list[float]] = []

    def step(self, loss: float) -> None:
        """Note the loss of one step."""
        self._loss += loss

    def add(self, values: list[Tensor], scales: list[float]) -> None:
        """Note one batch: its terms' values, and the factors that make them its share."""
        index = len(self._scales)
        if index == len(self._places):
            self._places.append([torch.empty_like(value) for value in values])
        places = self._places[index]
        for number, value in enumerate(values):
            if places[number].shape != value.shape:
                places[number] = torch.empty_like(value)
        torch._foreach_copy_(places, values)
        self._scales.append(scales)

    def take(self, ranks: Ranks, epoch: int, step: int, rate: float) -> dict[str, Any] | None:
        """The record of the steps since the last one, at *step*; None where there is no step."""
        steps = step - self.since
        if not steps:
            return None
        columns = zip(*(zip(*pair, strict=True) for pair in self._pending()), strict=True)
        # A rank without rows since then adds nothing, and must say so: the others wait for it.
        own = [_total(column) for column in columns] or [0.0] * len(self._names)
        totals = zip(self._names, ranks.sums(own), strict=True)
        record = {
            "split": "train",
            "epoch": epoch,
            "step": step,
            "loss": self._loss / steps,
            "terms": {name: total / steps for name, total in totals},
            "lr": rate,
        }
        if self.gradients is not None:
            record["gradients"], self.gradients = self.gradients, None
        self.since, self._loss = step, 0.0
        self._scales.clear()
        return record

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is pending, for a checkpoint."""
        tensors = {
            f"{batch}.{term}": value
            for batch, (values, _) in enumerate(self._pending())
            for term, value in enumerate(values)
        }
        return tensors, {"loss": self._loss, "since": self.since, "scales": self._scales}

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._loss, self.since = facts["loss"], facts["since"]
        self._scales = [list(scales) for scales in facts["scales"]]
        self._places = [
            [tensors[f"{batch}.{term}"] for term in range(len(scales))]
            for batch, scales in enumerate(self._scales)
        ]

    def _pending(self) -> Iterable[tuple[list[Tensor], list[float]]]:
        return zip(self._places, self._scales, strict=False)  # places outlive what is in them


def _total(column: Iterable[tuple[Tensor, float]]) -> float:
    """The sum of scaled values; those of one scale are joined, so that few tensors are read."""
    groups: dict[float, list[Tensor]] = {}
    for value, scale in column:
        groups.setdefault(scale, []).append(value.reshape(-1))
    return sum(torch.cat(values).sum().item() * scale for scale, values in groups.items())
