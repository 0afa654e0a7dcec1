"""Everything that can be known before the first batch of training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.models.quantized import parameters_of
from attar.runtime import (
    AttarError,
    PreflightError,
    eval_mode,
    first_line,
    modes_of,
    restore_modes,
)
from attar.tasks import Task
from attar.training.objective import Counts, Objective
from attar.training.pairing import Proposal
from attar.training.plan import Plan
from attar.training.term import BoundTerm, Counted, each, takes_tuples

# Adam's two moments beside the weights: what a checkpoint of a stage will hold at most.
STATE_COPIES = 3


HALF_WAY = 0.5

EQUAL = 1e-7  # a value that is rounding

# A term that pulls this much harder than another drowns it.
LOPSIDED = 100

# Softmax or order among the outputs of one example is what these are for.
AMONG_OUTPUTS = {"partial_softmax_kl", "margin_mse", "relaxed_ranking", "ranking_distillation"}

Shape = list[int] | list[list[int]]  # of one signal, or of several


@dataclass(frozen=True)
class TermShapes:
    """What one term compares, as the dry pass saw it."""

    name: str
    student: str
    student_shape: Shape
    teacher: str | None
    teacher_shape: Shape | None
    projector: str | None
    teacher_projector: str | None
    value: float


@dataclass(frozen=True)
class StagePlan:
    """What a stage is going to do; ``attar check`` prints it.

    ``gradients`` are the norms of the gradients that the weighted terms and the labels give the
    student on the first batch, in eval mode, with schedules at half way. ``proposals`` are the
    pairs that stand for the terms of ``pairing: auto``.
    """

    examples: int
    batch_size: int
    steps: int
    student_parameters: int
    trained_parameters: int
    teacher_parameters: int | None
    projector_parameters: int
    checkpoint_bytes: int
    terms: list[TermShapes]
    gradients: dict[str, float]
    proposals: list[Proposal]

    @property
    def lopsided(self) -> str | None:
        """What to say where one term pulls 100 times as hard as another."""
        # What is equal already, as a student and its own average are, pulls at nothing yet.
        equal = {term.name for term in self.terms if abs(term.value) < EQUAL}
        pulls = {n: norm for n, norm in self.gradients.items() if norm > 0 and n not in equal}
        if not pulls:
            return None
        strong, weak = max(pulls, key=pulls.__getitem__), min(pulls, key=pulls.__getitem__)
        ratio = pulls[strong] / pulls[weak]
        if ratio < LOPSIDED:
            return None
        return (
            f"'{strong}' pulls {ratio:,.0f} times as hard as '{weak}' (norms of their weighted "
            "gradients on the first batch): the weaker will hardly be learnt; change their weights"
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self) | {"lopsided": self.lopsided}


def steps_of(examples: int, plan: Plan) -> int:
    """Optimiser steps of the whole stage; the last window of an epoch may be short."""
    batches = math.ceil(examples / plan.batch_size)
    return plan.epochs * math.ceil(batches / plan.accumulate)


def check_pair(student: nn.Module, teacher: Any) -> None:
    """Refuse a student and a teacher that share trainable storage: one would move the other."""
    model = getattr(teacher, "model", None)
    if not isinstance(model, nn.Module):
        return
    theirs = {p.data_ptr() for p in model.parameters() if p.numel()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() in theirs:
            raise PreflightError(
                f"the student's '{name}' is the teacher's own tensor, so training one would "
                "change the other; give the student a copy: copy.deepcopy(teacher_model)"
            )


def check_labels(task: Task, batch: dict[str, Tensor], objective: Objective) -> None:
    """Refuse labels that are wanted but absent."""
    if "labels" in batch:
        return
    wanting = [term.name for term in objective.bound if "labels" in term.needs]
    if objective.label_weight > 0:
        raise PreflightError(
            f"the data have no labels but label_weight is {objective.label_weight}; set "
            "label_weight: 0 to learn from the teacher alone"
        )
    if wanting:
        raise PreflightError(f"the data have no labels but the loss '{wanting[0]}' needs them")


def dry_pass(
    objective: Objective, batch: dict[str, Tensor], told: dict[str, Any]
) -> list[TermShapes]:
    """One batch in eval mode: every term must have a value, a gradient and shapes that agree."""
    with eval_mode(objective):
        heard = objective.signals(batch, told)
        _dry_labels(objective, batch)
        return [_dry_term(objective, term, heard, told, batch) for term in objective.bound]


def pulls(objective: Objective, batch: dict[str, Tensor], told: dict[str, Any]) -> dict[str, float]:
    """Norm of the gradient that each weighted term, and the labels, give the student."""
    with eval_mode(objective):
        objective.watching = True
        try:
            return objective(batch, told, progress=HALF_WAY).gradients or {}
        finally:
            objective.watching = False


def _dry_labels(objective: Objective, batch: dict[str, Tensor]) -> None:
    task = objective.task
    out = task.forward(objective.student, batch)
    main = task.output(out, task.outputs[0])
    if objective.label_weight == 0:
        return
    value = task.loss(out, batch)
    if value.ndim != 1:
        raise PreflightError(
            f"the task's loss returned shape {list(value.shape)}; it must give one value a position"
        )
    if not value.requires_grad:
        raise PreflightError(
            f"the labels carry no gradient to the student: its output {list(main.shape)} does not "
            "depend on any parameter that is trained"
        )


def check_smallest_batch(
    student: nn.Module,
    still: Iterable[nn.Module],
    task: Task,
    batch: dict[str, Tensor],
    examples: int,
    plan: Plan,
    ranks: int,
) -> None:
    """Batch statistics need two values: refuse a batch of one before an epoch is spent.

    Args:
        still: parts of the student that stay in eval mode, and so need no statistics of a batch.
    """
    least = min(plan.batch_size, examples % plan.batch_size or plan.batch_size)
    if least // ranks > 1:
        return
    modes = modes_of(student)
    student.train()
    for part in still:
        part.training = False
    trial = copy.deepcopy(student)  # its statistics may move
    restore_modes(modes)
    try:
        with torch.no_grad():
            task.forward(trial, {k: v[:1] if v.ndim else v for k, v in batch.items()})
    except ValueError as error:
        raise PreflightError(
            f"with batch_size {plan.batch_size} and {ranks} rank{'s' * (ranks > 1)}, a batch of "
            f"the {examples} examples is a single one, which the student cannot be trained on "
            f"({first_line(error)}); choose another"
        ) from error


def _dry_term(
    objective: Objective,
    term: BoundTerm,
    heard: dict[str, Any],
    told: dict[str, Any],
    batch: dict[str, Tensor],
) -> TermShapes:
    student = _signals(heard, each(term.student))
    target = _signals(heard if term.own else told, each(term.target)) if term.teacher else []
    _check_signals(term, student)
    try:
        counted = Counted(objective.task.mask(batch), objective.task.tokens(batch))
        named = objective.named(batch)
        value = term.value(heard, told, named, counted, 0.0)
        for progress in (0.5, 1.0) if term.scheduled else ():
            term.value(heard, told, named, counted, progress)
    except AttarError:
        raise
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise PreflightError(
            f"the term '{term.name}' cannot compare the student's {_listed(term.student)} "
            f"{_shape(student)} with the teacher's {_listed(term.teacher)} {_shape(target)}: "
            f"{first_line(error).rstrip('.')}{_hint(term)}"
        ) from error
    _check_value(objective, term, value, batch)
    _check_meaning(objective, term, heard, told, batch, value)
    return TermShapes(
        name=term.name,
        student=_listed(term.student),
        student_shape=_shape(student),
        teacher=None if term.teacher is None else _listed(term.teacher),
        teacher_shape=_shape(target) if target else None,
        projector=_describe(term.projector),
        teacher_projector=_describe(term.teacher_projector),
        value=float(value.detach().mean()),
    )


def _signals(signals: dict[str, Any], addresses: Sequence[str]) -> list[Tensor]:
    found: list[Tensor] = []
    for address in addresses:
        signal = signals[address]
        found += signal if isinstance(signal, tuple) else [signal]
    return found


def _check_signals(term: BoundTerm, student: list[Tensor]) -> None:
    # The value alone would not show it: a projector behind a detached signal is trained too.
    for signal, address in zip(student, each(term.student), strict=False):
        if term.whole:
            term.refuse_wide(signal)
        if not signal.requires_grad:
            raise PreflightError(
                f"the term '{term.name}' carries no gradient to the student: its signal {address} "
                "is detached (as reentrant checkpointing leaves it), or every parameter before it "
                "is frozen"
            )
    if len(student) > 1 and term.projector is None and not takes_tuples(term.loss):
        raise PreflightError(
            f"the loss '{term.name}' compares one signal, and is given {len(student)}; make it "
            "a term for each"
        )


def _hint(term: BoundTerm) -> str:
    if all(a.startswith("param:") for a in each(term.student)) and not term.teacher_projector:
        return "; add teacher_projector: select, which takes as many rows and columns of it"
    inner = all(a.startswith(("feature:", "input:")) for a in each(term.student))
    return "; add projector: linear" if inner and not term.projector else ""


def _check_value(
    objective: Objective, term: BoundTerm, value: Tensor, batch: dict[str, Tensor]
) -> None:
    counts = Counts.of(objective.task, [batch])
    expected = counts.examples if term.whole else counts.positions
    if value.ndim and list(value.shape) != [expected]:
        raise PreflightError(
            f"the loss '{term.name}' returned shape {list(value.shape)}; it must return one "
            f"value a row [{expected}], or a scalar"
        )
    if not value.requires_grad:
        raise PreflightError(
            f"the term '{term.name}' carries no gradient to the student: its loss detaches it"
        )


def _check_meaning(
    objective: Objective,
    term: BoundTerm,
    heard: dict[str, Any],
    told: dict[str, Any],
    batch: dict[str, Tensor],
    value: Tensor,
) -> None:
    """Refuse a softmax where each output is an answer of its own, as in a multi-label task.

    A softmax does not see a constant that is added to all outputs of an example; here that
    constant changes every answer.
    """
    task, main = objective.task, f"output:{objective.task.outputs[0]}"
    if task.competing or term.student != main or term.projector is not None:
        return
    if term.kind in AMONG_OUTPUTS:
        return
    logits = heard[main]
    shift = torch.linspace(1, 2, len(logits), device=logits.device, dtype=logits.dtype)
    moved = heard | {main: logits + shift.view(-1, *[1] * (logits.ndim - 1))}
    counted = Counted(task.mask(batch), task.tokens(batch))
    again = term.value(moved, told, objective.named(batch), counted, 0.0)
    if torch.allclose(again, value, rtol=1e-3, atol=1e-6):
        raise PreflightError(
            f"the loss '{term.name}' compares the outputs of an example with one another (a "
            f"softmax), and in {type(task).__name__} each is an answer of its own; use binary_kl "
            "for labels that can hold together, mse for numbers"
        )


def plan_stage(
    objective: Objective,
    teacher: Any,
    data: Any,
    plan: Plan,
    terms: list[TermShapes],
    gradients: dict[str, float],
    proposals: list[Proposal],
) -> StagePlan:
    """Put the numbers of a stage together."""
    student = objective.student
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    projectors = sum(p.numel() for p in objective.adapters.parameters())
    model = getattr(teacher, "model", None)
    return StagePlan(
        examples=len(data),
        batch_size=plan.batch_size,
        steps=steps_of(len(data), plan),
        student_parameters=parameters_of(student),
        trained_parameters=trained,
        teacher_parameters=parameters_of(model) if isinstance(model, nn.Module) else None,
        projector_parameters=projectors,
        checkpoint_bytes=STATE_COPIES
        * sum(t.numel() * t.element_size() for t in objective.state_dict().values()),
        terms=terms,
        gradients=gradients,
        proposals=proposals,
    )


def _describe(projector: nn.Module | None) -> str | None:
    if projector is None:
        return None
    parameters = sum(p.numel() for p in projector.parameters())
    return f"{str(projector).splitlines()[0]}, {parameters:,} parameters"


def _shape(signals: list[Tensor]) -> Any:
    shapes = [list(signal.shape) for signal in signals]
    return shapes[0] if len(shapes) == 1 else shapes or ""


def _listed(addresses: str | tuple[str, ...] | None) -> str:
    return ", ".join(each(addresses))
