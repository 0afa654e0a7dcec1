"""A stage of training, checked and made ready."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime import (
    PreflightError,
    Ranks,
    UsageError,
    Wrap,
    compiled,
    connect,
    eval_mode,
    generators_seeded,
    modes_of,
    recomputed,
    resolve_device,
    resolve_precision,
    restore_modes,
    to_device,
)
from attar.tasks import Task
from attar.teachers import Teacher
from attar.training.objective import Objective
from attar.training.optimization import make_optimizer
from attar.training.pairing import expanded
from attar.training.plan import Plan
from attar.training.preflight import (
    StagePlan,
    check_labels,
    check_pair,
    check_smallest_batch,
    dry_pass,
    plan_stage,
    pulls,
)
from attar.training.term import Term, asked_of_teacher, each, loss_name, names_of
from attar.training.tuning import freezing

RANK_STRIDE = 0x9E3779B97F4A7C15  # keeps the seeds of ranks apart from those of runs


@dataclass(frozen=True)
class Stage:
    """A checked stage, ready to run: made by ``prepared``."""

    objective: Objective
    terms: Sequence[Term]
    teacher: Any
    plan: Plan
    shapes: StagePlan
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype | None
    frozen: list[nn.Module]
    example: tuple[dict[str, Tensor], dict[str, Tensor]]

    def train(self) -> None:
        """Training mode, but for parts that were in eval on purpose, and what is frozen."""
        self.objective.train()
        for part in self.frozen:
            part.training = False

    def batches(self, data: Any, epoch: int, *, start: int = 0) -> Iterable[dict[str, Tensor]]:
        """This rank's share of each batch of an epoch, from batch number *start* on."""
        return _batches(data, self.plan, self.ranks, epoch, start)

    @contextmanager
    def wrapped(self) -> Iterator[Wrap]:
        """The objective as the ranks train it: shared, compiled or recomputed as planned."""
        self.train()
        student = self.objective.student
        with ExitStack() as stack:
            if self.plan.recompute:
                stack.enter_context(recomputed(student))
            if self.plan.compile:
                stack.enter_context(compiled(self.objective.task.body(student)))
            wrap = self.ranks.wrap(self.objective, *self.example, precision=self.dtype)
            yield stack.enter_context(wrap)


@contextmanager
def prepared(
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    terms: Sequence[Term],
    label_weight: float,
    plan: Plan,
) -> Iterator[Stage]:
    """Check a stage by a dry pass and hold it open; puts student and teacher back at the end."""
    with (
        connect(plan.parallel, plan.device) as ranks,
        _prepared(student, teacher, data, task, terms, label_weight, plan, ranks) as stage,
    ):
        yield stage


@contextmanager
def _prepared(
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    terms: Sequence[Term],
    label_weight: float,
    plan: Plan,
    ranks: Ranks,
) -> Iterator[Stage]:
    device = ranks.device if ranks.world > 1 else resolve_device(plan.device)
    dtype = resolve_precision(plan.precision, device)
    if plan.compile:
        _check_compile(device)
    terms, proposals = expanded(terms, student, teacher, data, task, device)
    if proposals:  # what near ties make of rounding could differ from rank to rank
        addresses = [[pair.student, pair.teacher] for one in proposals for pair in one.pairs]
        ranks.same("the pairs of pairing: auto", addresses)
    _check_signals(terms, plan, dtype, ranks)
    asked = asked_of_teacher(terms, f"output:{task.outputs[0]}")
    if asked and teacher is None:
        raise PreflightError(f"the terms ask a teacher for {asked[0]}, but there is no teacher")
    if not asked:
        teacher = None  # nothing to ask it: the terms are on labels and on the student alone
    teacher = _as_teacher(teacher, task)
    check_pair(student, teacher)
    modes, home = modes_of(student), next((p.device for p in student.parameters()), device)
    on_purpose = [part for part, mode in modes if modes[0][1] and not mode]
    with (
        generators_seeded(_seed(plan, ranks), device),
        _opened(teacher, asked, device, data, plan),
        freezing(student, plan) as still,
    ):
        try:
            student.to(device)
            batch = to_device(next(iter(_batches(data, plan, ranks, 0, 0))), device)
            _try_models(student, teacher, task, batch)
            with Objective(
                student,
                task,
                terms,
                label_weight=label_weight,
                example=(batch, told := _told(teacher, asked, batch)),
                model=getattr(teacher, "model", None),
                rows=len(data),
                precision=dtype,
            ).to(device) as objective:
                check_labels(task, batch, objective)
                make_optimizer(plan.optimizer, objective)  # refuses options that do not fit
                frozen = [*on_purpose, *still]
                check_smallest_batch(student, frozen, task, batch, len(data), plan, ranks.world)
                shapes = dry_pass(objective, batch, told)
                gradients = pulls(objective, batch, told)
                stage = plan_stage(objective, teacher, data, plan, shapes, gradients, proposals)
                example = batch, told
                yield Stage(
                    objective, terms, teacher, plan, stage, ranks, device, dtype, frozen, example
                )
        finally:
            restore_modes(modes)
            student.to(home)


def _check_compile(device: torch.device) -> None:
    if device.type == "cpu":
        raise PreflightError(
            "compile is for accelerators: on a CPU it was measured to gain nothing, and torch's "
            "compiler can end the process there; leave compile out"
        )


def _check_signals(
    terms: Sequence[Term], plan: Plan, dtype: torch.dtype | None, ranks: Ranks
) -> None:
    """Refuse the ways of running in which a gradient or a parameter is no whole signal."""
    asked = [a.removeprefix("self:") for t in terms for a in (*each(t.student), *each(t.teacher))]
    gradient = next((a for a in asked if a.startswith("grad:")), None)
    whole = gradient or next((a for a in asked if a.startswith("param:")), None)
    remembers = next((t.loss for t in terms if "rows" in names_of(t.loss)), None)
    if remembers is not None and ranks.world > 1:
        raise PreflightError(
            f"{loss_name(remembers)} remembers every row, and {ranks.world} ranks would each "
            "remember their own; train it in one process, or take contrast, which needs no memory"
        )
    if plan.log_gradients and (ranks.world > 1 or plan.compile):
        raise PreflightError(
            "log_gradients is for one process that is not compiled: each rank has but a part of a "
            "term's gradient; leave it out"
        )
    if gradient and plan.compile:
        raise PreflightError(
            f"{gradient}: compiled code is not differentiated twice; leave compile out"
        )
    if gradient and dtype is torch.float16:
        raise PreflightError(f"{gradient}: gradients underflow in fp16; use bf16 or float32")
    if whole and ranks.world > 1 and plan.parallel == "fsdp":
        raise PreflightError(f"{whole}: fsdp holds a part of each parameter on a rank; use ddp")


def _as_teacher(teacher: Any, task: Task) -> Any:
    """A bare module becomes a teacher; what cannot answer like one is refused."""
    if isinstance(teacher, nn.Module):
        return Teacher(teacher, task)
    if teacher is not None and not all(hasattr(teacher, name) for name in ("open", "close")):
        raise UsageError(
            f"the teacher is a {type(teacher).__name__}; give an attar.Teacher, a module, or an "
            "object with open(addresses, device), close() and (batch) -> {address: tensor}"
        )
    return teacher


def _told(teacher: Any, asked: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if teacher is None:
        return {}
    told = teacher(batch)
    if missing := [address for address in asked if address not in told]:
        raise PreflightError(f"the teacher was asked for {missing[0]} and did not answer it")
    if hasattr(teacher, "check"):
        teacher.check()
    return told


@contextmanager
def _opened(
    teacher: Any, asked: list[str], device: torch.device, data: Any, plan: Plan
) -> Iterator[None]:
    if teacher is None:
        yield
        return
    try:
        teacher.open(asked, device)
        if hasattr(teacher, "check_source"):
            teacher.check_source(data, views=plan.views, augment=plan.augment)
        yield
    finally:
        teacher.close()


@torch.no_grad()
def _try_models(student: nn.Module, teacher: Any, task: Task, batch: dict[str, Tensor]) -> None:
    """Run both models once, so that a wrong input is explained as such."""
    with eval_mode(student):
        task.try_forward(student, batch, "student")
    if isinstance(model := getattr(teacher, "model", None), nn.Module):
        task.try_forward(model, batch, "teacher")


def _batches(
    data: Any, plan: Plan, ranks: Ranks, epoch: int, start: int
) -> Iterable[dict[str, Tensor]]:
    """A plain call where nothing else is wanted: a source of one's own need know no other."""
    more: dict[str, Any] = {"start": start} if start else {}
    if ranks.world > 1:
        more["part"] = (ranks.rank, ranks.world)
    if plan.views is not None:
        more["views"] = plan.views
    if plan.shuffle_block is not None:
        more["block"] = plan.shuffle_block
    return data.epoch(
        epoch, batch_size=plan.batch_size, seed=plan.seed, augment=plan.augment, **more
    )


def _seed(plan: Plan, ranks: Ranks) -> int:
    """Each rank draws its own dropout; rank 0 draws what one process would."""
    return (plan.seed + ranks.rank * RANK_STRIDE) % 2**64
