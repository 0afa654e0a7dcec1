"""Losses on logits that are not made: all that compare the same ones share one pass over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attar.losses import Projected, wide


class Passes:
    """Losses that wait until all are known; those on the same logits then run together."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[int, wide.Item]]] = {}
        self._students: dict[int, Projected] = {}

    def add(
        self,
        number: int,
        student: Projected,
        loss: Callable[..., Tensor],
        weight: float,
        given: dict[str, Any],
    ) -> None:
        """Let the loss with this number wait: *weight* is its factor of each row's value."""
        supplied = {name: value for name, value in given.items() if name != "teacher"}
        item = wide.Item(loss, weight, given.get("teacher"), supplied)
        self._students[id(student)] = student
        self._waiting.setdefault(id(student), []).append((number, item))

    def run(self) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The weighted sum over losses and rows, and each loss's own value by number, detached."""
        total: Tensor | None = None
        values: dict[int, Tensor] = {}
        for key, waiting in self._waiting.items():
            numbers, items = zip(*waiting, strict=True)
            weighted, found = wide.combined(self._students[key], items)
            total = weighted.sum() if total is None else total + weighted.sum()
            values |= dict(zip(numbers, found, strict=True))
        return total, values
