"""To Weights & Biases: a project for the run's name, a group for the run, a run for each stage."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from attar.integrations.log import Point
from attar.integrations.sink import Opening


class WandB:
    """Account, address and mode are the library's own: ``WANDB_API_KEY``, ``WANDB_MODE``, ...

    All curves are drawn over ``step``, a value like the others: the library's own count of steps
    only goes on, and would refuse a validation that is at the step of the training before it.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._runs: dict[str, Any] = {}

    @property
    def place(self) -> str:
        """Where the library itself says more."""
        return f"Weights & Biases: look for the group {self._opening.run.resolve().name}"

    def last(self, point: Point) -> int:
        """What is noted: the library sends in its own time, and cannot be asked."""
        return self._opening.sent.get(point.stream, -1)

    def send(self, points: Sequence[Point]) -> None:
        """Hand them to the library, which keeps them on the disk until they have arrived."""
        for point in points:
            values = {f"{point.split}/{name}": value for name, value in point.values.items()}
            self._of(point.stage).log({"step": point.step, **values})

    def _of(self, stage: str) -> Any:
        if stage not in self._runs:
            self._finish()  # stages follow each other, and each open run has threads of its own
            opening = self._opening
            if opening.into:
                Path(opening.into).mkdir(parents=True, exist_ok=True)
            made = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "attar"),
                group=opening.run.resolve().name,
                name=stage,
                id=opening.ids.setdefault(stage, uuid.uuid4().hex[:12]),
                resume="allow",
                reinit="create_new",
                dir=opening.into,
                config=dict(opening.recipe),
            )
            made.define_metric("step")
            made.define_metric("*", step_metric="step")
            self._runs[stage] = made
        return self._runs[stage]

    def close(self, *, finished: bool) -> None:
        """Wait until the library has sent what it holds."""
        self._finish()

    def _finish(self) -> None:
        while self._runs:
            self._runs.popitem()[1].finish()
