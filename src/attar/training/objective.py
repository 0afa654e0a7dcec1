"""The student and everything it is told, as one module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.losses import Projected
from attar.runtime import Closing, PreflightError, autocast, eval_mode, gradient_norm
from attar.signals import Hearing
from attar.tasks import Task
from attar.training.passes import Passes
from attar.training.term import BoundTerm, Counted, Term, each, loss_name

LABELS = "labels"


class Counts(NamedTuple):
    """Over what a window's values are divided: its counted positions and its examples."""

    positions: int
    examples: int

    @classmethod
    def of(cls, task: Task, batches: Sequence[dict[str, Tensor]]) -> Counts:
        """Count the batches of one optimiser step."""
        positions = examples = 0
        for batch in batches:
            if "idle" in batch:
                continue
            mask = task.mask(batch)
            size = len(batch["inputs"])
            examples += size
            positions += size if mask is None else int(mask.sum())
        return cls(positions, examples)


class Parts(NamedTuple):
    """What an objective gives: the loss to differentiate, and each term's own value, detached.

    ``gradients`` are the norms of the gradients that the weighted terms give the student, where
    ``objective.watching`` asks for them.
    """

    loss: Tensor
    values: list[Tensor]
    scales: list[float]
    names: list[str]
    gradients: dict[str, float] | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """Each term by name, without its weight."""
        shares = zip(self.names, self.values, self.scales, strict=True)
        return {name: value.sum() * scale for name, value, scale in shares}


class _Part(NamedTuple):
    """A term of one batch: its value, None while it waits; its share of the step; its weight."""

    value: Tensor | None
    scale: float
    weight: float


class Objective(Closing, nn.Module):
    """``objective(batch, told) -> Parts``: what is wrapped, compiled and checkpointed.

    With the teacher, all that a loop of one's own needs::

        with attar.Objective(student, task, [term]) as objective:
            for batch in loader:
                objective(batch, teacher(batch)).loss.backward()

    Values a position are divided by the positions of the whole optimiser step (``counts``; this
    batch alone when left out), values an example by its examples; a scalar is weighted by its
    share of the examples. So terms of rows do not depend on how the step is cut into batches.

    Args:
        student: the module to train.
        task: what a batch means.
        terms: what to match.
        label_weight: weight of the task's own loss on the labels.
        example: ``(batch, told)`` from which projectors, and losses with a state, are built.
        model: the teacher's module, for a projector that holds a frozen part of it.
        rows: how many rows there are to learn from, for a loss that remembers them.
        precision: autocast dtype of the student's pass; losses are in float32 whatever it is.

    Attributes:
        bound: the terms as they are compared.
        names: of the terms, and of the labels where they count, in order.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        terms: Sequence[Term] = (),
        *,
        label_weight: float = 0.1,
        example: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
        model: nn.Module | None = None,
        rows: int | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(label_weight, int | float) and 0 <= label_weight < float("inf")):
            raise PreflightError(f"label_weight is {label_weight}; it must be 0 or more")
        if label_weight == 0 and not terms:
            raise PreflightError("there is nothing to learn: no term, and label_weight is 0")
        self.student = student
        self.task = task
        self.label_weight = label_weight
        self.precision = precision
        main = f"output:{task.outputs[0]}"
        bound = [BoundTerm(t, main, n) for t, n in zip(terms, _names(terms, main), strict=True)]
        # Registered for its projectors; iterated as a plain list, which costs a step less.
        self.adapters = nn.ModuleList(bound)
        self.bound: Sequence[BoundTerm] = tuple(bound)
        self.names = [b.name for b in bound] + [LABELS] * (label_weight > 0)
        if label_weight and task.criterion is not None:
            bound.append(BoundTerm(Term(task.criterion, weight=label_weight), main, LABELS))
        self._bound = bound
        self._labels_apart = label_weight > 0 and task.criterion is None
        self._vectors = [(math.nan, torch.empty(0)) for _ in self.names]
        self.watching = False
        self._hearing = Hearing(student, task, self._wanted(), "student").open()
        try:
            self._build(terms, example, {"model": model, "rows": rows})
            self._labelled = any("labels" in term.needs for term in bound)
        except BaseException:
            self.close()
            raise

    @property
    def matched(self) -> set[Tensor]:
        """The parameters that terms pull to the teacher's, and that weight decay must not pull."""
        found = self._hearing.parameters.values()
        return {p for s in found for p in (s if isinstance(s, tuple) else (s,))}

    def forward(
        self,
        batch: dict[str, Tensor],
        told: dict[str, Any] | None = None,
        counts: Counts | None = None,
        progress: float = 0.0,
    ) -> Parts:
        """The parts of this batch's loss; ``told`` is the teacher's answer."""
        counts = counts or Counts.of(self.task, [batch])
        made, passes = self._made(batch, told or {}, counts, progress, together=not self.watching)
        loss, found = (None, {}) if passes is None else passes.run()
        values: list[Tensor] = []
        for index, (value, scale, weight) in enumerate(made):
            if value is None:
                values.append(found[index])
                continue
            values.append(value)
            share = self._shared(index, value, weight * scale)
            loss = share if loss is None else loss + share
        assert loss is not None
        gradients = self._gradients(values, made) if self.watching else None
        # Detached, so that the graph is freed as it is differentiated.
        detached, scales = [value.detach() for value in values], [part.scale for part in made]
        return Parts(loss, detached, scales, self.names, gradients)

    def values(
        self, batch: dict[str, Tensor], told: dict[str, Any], counts: Counts, progress: float
    ) -> list[Tensor]:
        """Each term's own value, with a graph of its own."""
        made, _ = self._made(batch, told, counts, progress, together=False)
        return [part.value for part in made if part.value is not None]

    def _made(
        self,
        batch: dict[str, Tensor],
        told: dict[str, Any],
        counts: Counts,
        progress: float,
        *,
        together: bool,
    ) -> tuple[list[_Part], Passes | None]:
        out, heard = self._hear(batch, told)
        kind = batch["inputs"].device.type
        made: list[_Part] = []
        passes = Passes() if together else None
        # Losses choose their own precision; an autocast around the caller's loop must not.
        off = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if off else nullcontext():
            counted = Counted(self.task.mask(batch), self.task.tokens(batch))
            named = self.named(batch)
            a_position = 1 / max(counts.positions, 1)
            for term in self._bound:
                weight = term.weight(progress) if callable(term.weight) else term.weight
                student, given = term.operands(heard, told, named, counted, progress)
                if passes is not None and isinstance(student, Projected):
                    passes.add(len(made), student, term.loss, weight * a_position, given)
                    made.append(_Part(None, a_position, weight))
                    continue
                value = term.compare(student, given, counted)
                if value.ndim == 0:  # a relation: its share of the step's examples
                    scale = len(batch["inputs"]) / max(counts.examples, 1)
                else:
                    scale = 1 / max(counts.examples, 1) if term.whole else a_position
                made.append(_Part(value, scale, weight))
            if self._labels_apart:
                made.append(_Part(self.task.loss(out, batch), a_position, self.label_weight))
        return made, passes

    def _shared(self, index: int, value: Tensor, share: float) -> Tensor:
        """A term's part of the loss: the sum of its value, times *share*."""
        if value.ndim == 0 or torch.compiler.is_compiling():
            return value.sum() * share
        # A product with a vector that is kept costs a CPU half of a sum, a factor and their
        # backward pass.
        flat = value if value.ndim == 1 else value.reshape(-1)
        known, vector = self._vectors[index]
        like = vector.shape == flat.shape and vector.dtype is flat.dtype
        if known != share or not like or vector.device != flat.device:
            vector = torch.full_like(flat, share, requires_grad=False)
            self._vectors[index] = share, vector
        return flat.dot(vector)

    def _gradients(self, values: list[Tensor], made: list[_Part]) -> dict[str, float]:
        trained = [p for p in self.student.parameters() if p.requires_grad]
        shares = (part.weight * part.scale for part in made)
        norms = (gradient_of(v, s, trained) for v, s in zip(values, shares, strict=True))
        return dict(zip(self.names, norms, strict=True))

    def close(self) -> None:
        """Take the hooks off the student."""
        self._hearing.close()

    def named(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as terms see it: labels in the units of the output."""
        return {**batch, "labels": self.task.labels(batch)} if self._labelled else batch

    def signals(
        self, batch: dict[str, Tensor], told: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The student's signals of this batch by address, before any projector."""
        return self._hear(batch, told)[1]

    def _wanted(self) -> list[str]:
        asked = [a for b in self._bound for a in each(b.student)]
        return asked + [a for b in self._bound if b.own for a in each(b.target) if a]

    def _hear(
        self, batch: dict[str, Tensor], told: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        if self.precision is None:
            return self._hearing(batch, told)
        with autocast(batch["inputs"].device, self.precision):
            return self._hearing(batch, told)

    @torch.no_grad()
    def _build(self, terms: Sequence[Term], example: Any, extra: dict[str, Any]) -> None:
        wanted = [
            (bound, term)
            for bound, term in zip(self.bound, terms, strict=True)
            if bound.unbuilt or term.projector or term.teacher_projector
        ]
        if not wanted:
            return
        if example is None:
            raise PreflightError(
                "projectors and losses with a state are sized from example signals: give "
                "Objective(..., example=(batch, told)), or use attar.distill, which does"
            )
        batch, told = example
        # In eval mode, so that sizing a projector does not move the student's batch statistics.
        with eval_mode(self.student):
            heard = self.signals(batch, told)
        for bound, term in wanted:
            bound.build(term, heard, told, extra)
            bound.to(batch["inputs"].device)


def gradient_of(value: Tensor, share: float, trained: Sequence[nn.Parameter]) -> float:
    """Norm of the gradient of a term's value times its share; the graph is kept."""
    if not value.requires_grad or not share:
        return 0.0
    grads = torch.autograd.grad(value.sum(), trained, retain_graph=True, allow_unused=True)
    return share * gradient_norm([grad for grad in grads if grad is not None])


def _names(terms: Sequence[Term], main: str) -> list[str]:
    names: list[str] = []
    for term in terms:
        name = loss_name(term.loss)
        if term.student not in (None, main):
            name = f"{name}({', '.join(each(term.student))})"
        count = sum(n.split(" #")[0] == name for n in names)
        names.append(f"{name} #{count + 1}" if count else name)
    return names
