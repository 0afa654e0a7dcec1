"""Progress bars on the terminal, one a stage, with loss, metric and time left."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any, Self

from attar.runtime.closing import Closing

REDRAW_SECONDS = 0.1


class Bar(Closing):
    """One bar: ``watch`` after each step, ``note`` when a metric is known.

    Nothing is drawn where standard error is not a terminal, so logs stay clean.
    """

    def __init__(self, label: str, total: int, *, show: bool | None = None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._label = label
        self._total = total
        self._bar: Any = None
        self._row: Any = None
        self._next = 0.0
        self._metric = ""

    def __enter__(self) -> Self:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self._row = self._bar.add_task(self._label, total=self._total, numbers="")
            self._bar.start()
        return self

    def watch(self, done: int, loss: float | None = None) -> None:
        """Show how far a stage is; called after each step, draws ten times a second."""
        if self._bar is None:
            return
        now = monotonic()
        if now < self._next and done < self._total:
            return
        self._next = now + REDRAW_SECONDS
        numbers = "" if loss is None else f"loss {loss:.4g}{self._metric}"
        self._bar.update(self._row, completed=done, numbers=numbers)

    def note(self, metric: str, value: float) -> None:
        """Show the newest value of a metric beside the loss."""
        self._metric = f"  {metric} {value:.4g}"

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
