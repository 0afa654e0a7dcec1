"""One thing to match."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from attar.losses.types import Loss
from attar.models.types import Projector
from attar.runtime import UsageError

SUPPLIED = ("teacher", "labels", "mask", "ids", "offsets", "progress")


@dataclass(frozen=True)
class Term:
    """Match a signal of the student to one of the teacher.

    Args:
        loss: a function of ``attar.losses``, or one like it; options by ``functools.partial``.
        student: address of the student's signal; the task's main output when left out.
        teacher: address of the teacher's signal; the student's address when left out.
        weight: factor of the term, or a function of progress (0 to 1) that gives it.
        projector: builds a small trained adapter on the student's side from example signals.
    """

    loss: Loss
    student: str | None = None
    teacher: str | None = None
    weight: Annotated[float, Ge(0)] | Callable[[float], float] = 1.0
    projector: Projector | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise UsageError(
                f"a term's loss must be a function, not {self.loss!r}; pass attar.losses.NAME"
            )
        if not callable(self.weight) and not self.weight >= 0:
            raise UsageError(f"a term's weight is {self.weight}; it must be 0 or more")


def loss_name(loss: Callable[..., Any]) -> str:
    """The name a loss goes by in logs and messages."""
    while isinstance(loss, partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)


def supplied(loss: Callable[..., Any]) -> frozenset[str]:
    """Which of the things a stage can supply this loss names: its signature is the contract."""
    bound = loss.forward if isinstance(loss, nn.Module) else loss
    names = inspect.signature(bound).parameters
    given = loss.keywords if isinstance(loss, partial) else {}
    return frozenset(name for name in SUPPLIED if name in names and name not in given)


def teacher_address(term: Term, main: str) -> str | None:
    """What the term compares with; None for a term on labels alone."""
    if "teacher" not in supplied(term.loss):
        return None
    return term.teacher or term.student or main


def asked_of_teacher(terms: Sequence[Term], main: str) -> list[str]:
    """The addresses that a teacher has to answer for these terms."""
    asked = [teacher_address(term, main) for term in terms]
    return list(dict.fromkeys(a for a in asked if a and not a.startswith("self:")))


class BoundTerm(nn.Module):
    """A term with its addresses settled and its projector built; part of an objective."""

    def __init__(self, term: Term, main: str, name: str) -> None:
        super().__init__()
        self.name = name
        self.loss = term.loss
        self.needs = supplied(term.loss)
        self.whole = "mask" in self.needs  # sees whole signals, one value an example
        self.student = term.student or main
        self.teacher = teacher_address(term, main)
        # "self:" on the teacher's side is the student's own signal of the same pass.
        self.own = (self.teacher or "").startswith("self:")
        self.target = (self.teacher or "").removeprefix("self:")
        self.weight = term.weight
        self.projector: nn.Module | None = None

    def value(
        self,
        heard: dict[str, Tensor],
        told: dict[str, Tensor],
        batch: dict[str, Tensor],
        mask: Tensor | None,
        progress: float,
    ) -> Tensor:
        """The loss's own value: one a counted position, one an example, or a scalar."""
        student = heard[self.student]
        if self.projector is not None:
            student = self.projector(student)
        needs = self.needs
        given: dict[str, Any] = {}
        if self.teacher is not None:
            given["teacher"] = heard[self.target].detach() if self.own else told[self.target]
            if mask is None and len(needs) == 1:  # the common case, and the loop's hot path
                return self.loss(student, **given)
        if "labels" in needs:
            given["labels"] = batch["labels"]
        if self.whole:
            given["mask"] = mask
        elif mask is not None:
            student = student[mask]
            given = {key: value[mask] for key, value in given.items()}
        for key in ("ids", "offsets"):
            if key in needs:
                given[key] = batch[key]
        if "progress" in needs:
            given["progress"] = progress
        return self.loss(student, **given)
