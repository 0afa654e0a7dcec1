"""The one loop: windows of batches, each one step of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from attar.runtime import DivergedError, Ranks, Wrap, eval_mode, to_device
from attar.training.objective import Counts, Objective
from attar.training.optimization import Average, make_optimizer
from attar.training.plan import Plan
from attar.training.record import Record
from attar.training.tuning import Tuning

if TYPE_CHECKING:
    from attar.training.checkpoint import Keeper

Log = Callable[[dict[str, Any]], None]
Window = list[dict[str, Tensor]]

MOST_SKIPPED = 20  # steps in a row that fp16 may overflow before it is called a divergence


def windows(batches: Iterable[dict[str, Tensor]], accumulate: int) -> Iterator[Window]:
    """Cut batches into optimiser steps; the last may be short."""
    if accumulate == 1:
        for batch in batches:
            yield [batch]
        return
    iterator = iter(batches)
    while window := list(islice(iterator, accumulate)):
        yield window


class Loop:
    """Takes optimiser steps; holds what a step changes and nothing else.

    Args:
        objective: the student, its terms and projectors.
        teacher: answers ``objective``'s addresses, or None.
        plan: the options.
        steps: optimiser steps in the whole stage, which the schedules are measured against.
        ranks: the processes that share the training.
        wrap: the objective as the ranks train it.
        device, dtype: where, and the autocast dtype.
        log: is given a record every ``plan.log_every`` steps.
        watch: is given (steps done, loss) after each step, for a progress bar.
        inherited: names of the student's parameters that know something already; None for all
            but its head.

    Attributes:
        number, taken, done: the epoch, the batches taken of it, the steps taken in all.
        keeper: is asked before each step, and told after it, whether to save or to stop.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Any,
        plan: Plan,
        steps: int,
        ranks: Ranks,
        wrap: Wrap,
        device: torch.device,
        dtype: torch.dtype | None,
        log: Log | None = None,
        watch: Callable[[int, float], None] | None = None,
        inherited: Collection[str] | None = None,
    ) -> None:
        self.objective = objective
        self.teacher = teacher
        self.plan = plan
        self.steps = steps
        self.ranks = ranks
        self.wrap = wrap
        self.device = device
        self.tuning = tuning = Tuning.of(objective.student, plan, inherited)
        held = {*tuning.anchored, *objective.matched}  # a term pulls them, and decay must not
        self.optimizer = make_optimizer(plan.optimizer, objective, tuning.places, held)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.average = Average(objective.student, plan.average) if plan.average else None
        self.scaler = torch.amp.GradScaler(device.type) if dtype is torch.float16 else None
        self.number = self.taken = self.done = 0
        self.skipped = 0
        self._agreed: list[int] = []
        self.teacher_seconds = 0.0
        self._log = log
        self._watch = watch
        self._statistics: list[Tensor] = []
        self.record = Record(objective.names)
        self.keeper: Keeper | None = None
        if hasattr(teacher, "begin"):
            teacher.begin(objective.student)
        self._follow: Callable[[nn.Module], None] | None = getattr(teacher, "follow", None)

    def epoch(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Take the steps of the epoch that are not taken yet."""
        self._statistics = [buffer.clone() for buffer in self.objective.student.buffers()]
        self.tuning.wake(self.number)
        for window in windows(batches, self.plan.accumulate):
            loss = self.step(window)
            if self._watch is not None:
                self._watch(self.done, loss)
            if self._log is not None and self.done % self.plan.log_every == 0:
                self._report()
            if self.keeper is not None:
                self.keeper.after(*self._agreed)
        if self._log is not None:
            self._report()

    def close_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.number, self.taken = self.number + 1, 0

    def step(self, window: Window) -> float:
        """One optimiser step over the batches of *window*; returns its loss."""
        progress = (self.done + 0.5) / self.steps
        factor = self.plan.schedule(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        own = Counts.of(self.objective.task, window)
        wishes = () if self.keeper is None else self.keeper.wishes()
        positions, examples, *self._agreed = self.ranks.total((*own, *wishes))
        counts = Counts(positions, examples)
        if self.plan.log_gradients:
            self.objective.watching = (self.done + 1) % self.plan.log_every == 0
        loss = 0.0
        for index, batch in enumerate(window, start=1):
            with self.wrap.micro(index == len(window)):
                loss += self._backward(to_device(batch, self.device), counts, progress)
        loss = self._guarded(window, loss, counts, progress)
        self.wrap.settle(own.examples, counts.examples)
        if self._follow is not None and self.skipped == 0:
            self._follow(self.objective.student)
        if self._log is not None:
            self.record.step(loss)
        for parameter in self.parameters:
            parameter.grad = None
        self.done += 1
        self.taken += len(window)
        return loss

    def _backward(self, batch: dict[str, Tensor], counts: Counts, progress: float) -> float:
        told = None
        if self.teacher is not None:
            start = perf_counter()
            told = self.teacher(batch)
            self.teacher_seconds += perf_counter() - start
        parts = self.wrap.module(batch, told, counts, progress)
        # A rank without rows runs one of another's: all must run the same passes.
        loss = parts.loss * 0 if "idle" in batch else parts.loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self._log is not None and "idle" not in batch:
            self.record.add(parts.values, parts.scales)
            if parts.gradients is not None:
                self.record.gradients = parts.gradients
        return loss.item()

    def _guarded(self, window: Window, loss: float, counts: Counts, progress: float) -> float:
        """Change the weights, if nothing is wrong; returns the loss of all ranks together."""
        for parameter in self.tuning.asleep:
            parameter.grad = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        loss, norm = self.wrap.measured(loss, grads)
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            if self.plan.clip is not None:
                clip_grads_with_norm_(self.parameters, self.plan.clip, torch.tensor(norm))
            self._update()
            return loss
        self.skipped += 1
        if self.scaler is not None and math.isfinite(loss) and self.skipped < MOST_SKIPPED:
            self.scaler.update()  # lowers the scale; the step is left out
            return loss
        for parameter in self.parameters:
            parameter.grad = None
        # The pass that went wrong has written to batch statistics; the epoch's start is sound.
        for buffer, known in zip(self.objective.student.buffers(), self._statistics, strict=True):
            buffer.copy_(known)
        self.wrap.close()  # each rank looks for the cause in its own rows
        with eval_mode(self.objective):  # the search moves no statistics
            raise DivergedError(self._blame(window, counts, progress))

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.tuning.anchor is not None:
            self.tuning.anchor.pull(self.optimizer)
        if self.average is not None:
            self.average.update()

    def _blame(self, window: Window, counts: Counts, progress: float) -> str:
        """Which term went wrong, on which rows: each is differentiated again by itself."""
        where = f"step {self.done + 1} of {self.steps}"
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        for batch in window:
            batch = to_device(batch, self.device)
            told = self.teacher(batch) if self.teacher is not None else None
            for index, name in enumerate(self.objective.names):
                values = self.objective.values(batch, told or {}, counts, progress)
                what = _fault(values[index].sum(), trained)
                if what:
                    ids = batch["ids"].tolist()
                    rows = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
                    return (
                        f"{where}: the {what} of the term '{name}' is not finite (batch of rows "
                        f"{rows}); the weights are those from before the step. Lower the "
                        "learning rate, set clip: 1.0, or look at those rows"
                    )
        return (
            f"{where}: the loss or a gradient is not finite; the weights are those from before "
            "the step. Lower the learning rate or set clip: 1.0"
        )

    def _report(self) -> None:
        assert self._log is not None
        rate = self.optimizer.param_groups[0]["lr"]
        record = self.record.take(self.ranks, self.number, self.done, rate)
        if record is not None:
            self._log(record)


def _fault(value: Tensor, parameters: Sequence[Tensor]) -> str | None:
    if not torch.isfinite(value):
        return "value"
    if not value.requires_grad:
        return None
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    finite = all(bool(torch.isfinite(g).all()) for g in grads if g is not None)
    return None if finite else "gradient"
