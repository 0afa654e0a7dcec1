"""Which epoch of a stage is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attar.runtime import Ranks
from attar.tasks import Task


class Choice:
    """The best epoch so far, by validation.

    Of equals the latest is kept: a small validation split has many, and a schedule that ends low
    makes the later the better trained.
    """

    def __init__(self, task: Task, keep: str, ranks: Ranks) -> None:
        self.task = task
        self._ranks = ranks
        self.epoch: int | None = None
        self.kept: dict[str, Tensor] | None = None
        self.history: list[dict[str, Any]] = []
        self._keep = keep

    def offer(self, number: int, record: dict[str, Any], student: nn.Module) -> None:
        """Consider the student as it is at the end of epoch *number*."""
        best = None if self.epoch is None else self._value(self._record_of(self.epoch))
        self.history.append(record)
        if best is None or self._value(record) >= best:
            self.epoch = number
            if self._keep == "best":
                self.kept = copy_of_state(student, self._ranks)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a checkpoint."""
        facts = {"epoch": self.epoch, "kept": self.kept is not None, "history": self.history}
        return self.kept or {}, facts

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.epoch, self.history = facts["epoch"], list(facts["history"])
        self.kept = dict(tensors) if facts["kept"] else None

    def _record_of(self, epoch: int) -> dict[str, Any]:
        return next(record for record in self.history if record["epoch"] == epoch)

    def _value(self, record: dict[str, Any]) -> float:
        return record[self.task.metric] * (1 if self.task.higher_is_better else -1)


def copy_of_state(module: nn.Module, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """The module's whole state, which later steps do not change; asked by all ranks or none."""
    full = (ranks or Ranks()).full
    return {name: full(tensor.detach()).clone() for name, tensor in module.state_dict().items()}
