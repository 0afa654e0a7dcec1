"""What a model says of each example: in order of id, each id once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attar.evaluation.intervals import bootstrap
from attar.evaluation.numbers import between, count, show
from attar.runtime import DataError, Ranks, eval_mode, resolve_device, to_device

if TYPE_CHECKING:
    from attar.data import Source
    from attar.tasks.task import Rows, Task

IDS = "ids"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one source.

    Attributes:
        scores: every metric of the task by name.
        metric: the name of the primary one.
        interval: 95 % percentile bootstrap interval of the primary metric over the examples.
        rows: what the model said of each example, in order of id.
    """

    scores: dict[str, float]
    metric: str
    interval: tuple[float, float]
    rows: Rows = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> float:
        return self.scores[name]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __str__(self) -> str:
        others = [f"{name} {show(name, self[name])}" for name in self.scores if name != self.metric]
        low, high = self.interval
        primary = show(self.metric, self[self.metric], digits=2)
        first = f"{self.metric} {primary} {between(self.metric, low, high, len(self))}"
        return f"{', '.join([first, *others])} ({count(len(self), 'example')})"

    def __repr__(self) -> str:
        return f"Evaluation: {self}"


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradient, on *device*; afterwards the model is as it was, device included."""
    home = _home(model)
    try:
        if home is not None:
            model.to(device)
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        if home is not None:
            model.to(home)


def _home(model: nn.Module) -> torch.device | None:
    """Where the model lives; None when it has no tensors or is spread on purpose."""
    places = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return places.pop() if len(places) == 1 else None


def collect(
    model: nn.Module,
    source: Source,
    task: Task,
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Rows:
    """Run *model* over *source* once and keep ``task.rows`` of each example.

    Runs in eval mode without gradients; the model's mode and device are restored, also after an
    error. The result lies on the CPU, in order of id, on every rank.

    Args:
        progress: called after each batch with (examples done, examples in all).
        ranks: processes that share the work; every one must ask.

    Raises:
        DataError: the source is empty or does not give each id 0..N-1 exactly once, or an output
            is not finite.
    """
    place = resolve_device(device)
    ranks = ranks or Ranks()
    share = {"part": (ranks.rank, ranks.world)} if ranks.world > 1 else {}
    parts: list[Rows] = []
    done = 0
    with evaluating(model, place):
        for batch in source.batches(batch_size, **share):
            moved = to_device(batch, place)
            forward = task.forward if parts else partial(task.try_forward, whose="model")
            rows = task.rows(forward(model, moved), moved)
            if "idle" in batch:  # a pass that keeps the ranks together, and no row
                continue
            rows = {**rows, IDS: batch["ids"]}
            parts.append({name: value.cpu() for name, value in rows.items()})
            done += len(batch["ids"])
            if progress is not None:
                progress(done, len(source))
    joined = {name: torch.cat([part[name] for part in parts]) for name in (parts or [{}])[0]}
    return _in_order(ranks.gather(joined), source)


def _in_order(rows: Rows, source: Source) -> Rows:
    if not rows:
        raise DataError(f"{source.name}: has no examples to evaluate")
    ids = rows.pop(IDS)
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(len(source))):
        raise DataError(
            f"{source.name}: its batches hold {len(order)} ids where each of 0 to "
            f"{len(source) - 1} must come exactly once"
        )
    rows = {name: value[order] for name, value in rows.items()}
    for name, value in rows.items():
        _check_finite(name, value, source.name)
    return rows


def _check_finite(name: str, value: Tensor, source: str) -> None:
    wrong = (~torch.isfinite(value)).nonzero() if value.is_floating_point() else value[:0]
    if len(wrong):
        raise DataError(
            f"{source}: the {name} of row {int(wrong[0, 0])} are not finite; the model has "
            "probably diverged: train it with a lower rate, or check its weights"
        )


def evaluate(
    model: nn.Module,
    source: Source,
    task: Task,
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
) -> Evaluation:
    """Score *model* on a labelled *source*, with an interval for the primary metric.

    Raises:
        DataError: the source has no labels, and everything ``collect`` raises.
    """
    if source.labels is None:
        raise DataError(
            f"{source.name}: has no labels to score against; evaluate on labelled data, or "
            "compare answers with a teacher's by task.agreement"
        )
    rows = collect(model, source, task, batch_size=batch_size, device=device)
    found = bootstrap(task, rows)
    return Evaluation(task.score(rows), task.metric, (found.low, found.high), rows)
