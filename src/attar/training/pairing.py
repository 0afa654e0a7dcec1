"""Terms on pairs of features that nobody wrote down."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attar.losses import mse
from attar.losses.types import Loss
from attar.models import projectors
from attar.runtime import AttarError, PreflightError, to_device
from attar.signals import Pair, pairs
from attar.tasks import Task
from attar.training.optimization import Schedule
from attar.training.term import BoundTerm, Counted, Term, loss_name

ROWS = 128  # of which pairs are proposed; see docs/pairing.md for what more would change
TRIED = 8  # rows on which a loss is asked what it can compare


@dataclass(frozen=True)
class Proposal:
    """The pairs that stand for the *term*-th of a stage's terms, as they are compared."""

    term: int
    pairs: list[Pair]


def paired(
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    loss: Loss = mse,
    *,
    weight: float | Schedule = 1.0,
    count: int | None = None,
) -> list[Term]:
    """A term for each pair of features that ``attar.signals.pairs`` proposes.

    ``Term(loss, weight=weight, pairing="auto")`` becomes these when its stage is prepared; here
    they can be looked at, and some of them changed or left out.

    Args:
        student, teacher, data, task: as in ``attar.distill``; 128 rows of *data*, drawn without
            augmentation and the same in every run, are looked at.
        loss: of each term. Where it cannot compare signals of other sizes, its term has the
            projector that the pair proposes.
        weight: of each term; it is not divided among them.
        count: how many pairs, as in ``attar.signals.pairs``.

    Example:
        >>> import attar
        >>> train, _ = attar.data.digits()
        >>> task = attar.tasks.ImageClassification(classes=10)
        >>> teacher = attar.models.build("resnet", data=train, width=32)
        >>> student = attar.models.build("resnet", data=train)
        >>> [term.student for term in paired(student, teacher, train, task)]
        ['feature:stage1', 'feature:stage2', 'feature:stage3']
    """
    batch = _batch(data)
    found = pairs(student, _model(teacher), task.fitted(data), batch, count=count)
    whole = Term(loss, weight=weight, pairing="auto")
    return [_term(whole, fitting) for fitting in _fitting(whole, found, batch, task)]


def expanded(
    terms: Sequence[Term],
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    device: torch.device,
) -> tuple[list[Term], list[Proposal]]:
    """The terms with those of ``pairing: auto`` replaced by the pairs they stand for."""
    if all(term.pairing is None for term in terms):
        return list(terms), []
    model, batch = _model(teacher), _batch(data)
    with _at(device, student, model):
        found = pairs(student, model, task, batch)
    written: list[Term] = []
    proposals: list[Proposal] = []
    for index, term in enumerate(terms):
        if term.pairing is None:
            written.append(term)
            continue
        proposals.append(Proposal(index, _fitting(term, found, batch, task)))
        written += [_term(term, pair) for pair in proposals[-1].pairs]
    return written, proposals


def _batch(data: Any) -> dict[str, Tensor]:
    """Shuffled, as rows in order may be of one class; the same for every seed of a run."""
    return next(iter(data.epoch(0, batch_size=ROWS, seed=0, augment=())))


def _model(teacher: Any) -> nn.Module:
    if teacher is None:
        raise PreflightError("pairing: auto pairs with a teacher's features; there is no teacher")
    if hasattr(teacher, "members"):
        raise PreflightError(
            "pairing: auto traces one teacher, and an ensemble has several; write a term for each "
            "pair, such as student: feature:stage3, teacher: feature:0.stage3"
        )
    model = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
    if not isinstance(model, nn.Module):
        raise PreflightError(
            f"pairing: auto traces the teacher's module, and a {type(teacher).__name__} has none "
            "as .model; write a term for each pair, with student: and teacher:"
        )
    return model


@contextmanager
def _at(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """The models on the device for a while."""
    homes = [next((p.device for p in model.parameters()), device) for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


def _fitting(term: Term, found: Sequence[Pair], batch: dict[str, Tensor], task: Task) -> list[Pair]:
    """The pairs with the projectors that this term needs: its own, where it has some."""
    if term.projector is not None or term.teacher_projector is not None:
        names = [p and loss_name(p) for p in (term.projector, term.teacher_projector)]
        return [replace(p, projector=names[0], teacher_projector=names[1]) for p in found]
    rows = to_device({name: value[:TRIED] for name, value in batch.items()}, torch.device("cpu"))
    rows["ids"] = torch.arange(len(rows["inputs"]))
    return [
        replace(pair, projector=None, teacher_projector=None)
        if _compares(term, pair, rows, task)
        else pair
        for pair in found
    ]


def _compares(term: Term, pair: Pair, rows: dict[str, Tensor], task: Task) -> bool:
    """Whether the loss takes signals of two sizes as they are, such as a relation of examples."""
    plain = replace(term, student=pair.student, teacher=pair.teacher, pairing=None)
    if isinstance(term.loss, nn.Module):
        plain = replace(plain, loss=copy.deepcopy(term.loss))  # it may remember what it sees
    count = len(rows["inputs"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        mine = torch.randn(count, *pair.student_shape)
        theirs = torch.randn(count, *_other_channels(pair))
        heard, told = {pair.student: mine}, {pair.teacher: theirs}
        try:
            bound = BoundTerm(plain, f"output:{task.outputs[0]}", loss_name(term.loss))
            bound.build(plain, heard, told, {"model": None, "rows": count})
            value = bound.value(heard, told, rows, Counted(None), 0.0)
        except (AttarError, ValueError, RuntimeError, IndexError, TypeError, KeyError):
            return False
    return value.ndim == 0 or list(value.shape) == [count]


def _other_channels(pair: Pair) -> tuple[int, ...]:
    """The teacher's shape, with channels that are not the student's."""
    shape, axis = list(pair.teacher_shape), 0 if len(pair.teacher_shape) == 3 else -1
    if shape[axis] == pair.student_shape[0 if len(pair.student_shape) == 3 else -1]:
        shape[axis] += 1
    return tuple(shape)


def _term(term: Term, pair: Pair) -> Term:
    """The term on one pair."""
    term = replace(term, student=pair.student, teacher=pair.teacher, pairing=None)
    if term.projector is not None or term.teacher_projector is not None:
        return term
    own, other = pair.projector, pair.teacher_projector
    return replace(
        term,
        projector=None if own is None else getattr(projectors, own),
        teacher_projector=None if other is None else getattr(projectors, other),
    )
