"""The verbs that train: `train` on labels, `distill` from a teacher. One loop behind both."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from attar.evaluation import collect
from attar.models import save
from attar.runtime import (
    Bar,
    DataError,
    DivergedError,
    Interrupted,
    PreflightError,
    Stop,
    UsageError,
    Wrap,
    connect,
    opened,
)
from attar.tasks import Task
from attar.teachers import Teacher
from attar.training.checkpoint import Home, Keeper, check_keepable, made_with
from attar.training.choice import Choice, copy_of_state
from attar.training.loop import Log, Loop
from attar.training.optimization import averaged
from attar.training.plan import Plan, make_plan
from attar.training.preflight import (
    StagePlan,
)
from attar.training.stage import Stage, prepared
from attar.training.start import given, started
from attar.training.state import Session
from attar.training.term import Term

State = dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """What came of a stage: the trained module and what was seen on the way.

    ``student`` holds the best epoch's weights where a validation split chose one, else the
    last's; ``last`` holds the last epoch's. ``seconds`` are of training and validation,
    ``teacher_seconds`` the part of them in which the teacher answered.
    """

    student: nn.Module
    last: State
    best_epoch: int | None
    kept_epoch: int
    history: list[dict[str, Any]]
    plan: StagePlan
    seconds: float
    teacher_seconds: float


def check(
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    terms: Sequence[Term] = (),
    *,
    label_weight: float = 0.1,
    init: str | nn.Module | None = None,
    **options: Any,
) -> StagePlan:
    """The preflight alone: all of a stage but its training. Raises what ``fit`` would raise."""
    plan, task = make_plan(options), task.fitted(data)
    if init is not None:
        given(student, init, task)
    with (
        prepared(student, teacher, data, task, terms, label_weight, plan) as stage,
        stage.wrapped(),
    ):
        return stage.shapes


def fit(
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    terms: Sequence[Term] = (),
    *,
    label_weight: float = 0.1,
    validation: Any = None,
    log: Log | None = None,
    home: Home | None = None,
    label: str = "training",
    progress: bool | None = None,
    init: str | nn.Module | None = None,
    **options: Any,
) -> Fit:
    """Train *student* in place and say what was seen; `train` and `distill` return its student.

    Args are those of `distill`; ``log`` is given each record, ``home`` holds log and checkpoints,
    ``label`` names the progress bar.

    Raises:
        Interrupted: a signal came, and the stage was saved; only where there is a ``home``.
    """
    plan, task = make_plan(options), task.fitted(data)
    if validation is not None:
        if validation.labels is None:
            raise PreflightError(f"{validation.name}: has no labels to validate against")
        task.fitted(validation)
    log = home.log if home is not None else log
    with prepared(student, teacher, data, task, terms, label_weight, plan) as stage:
        start = started(student, init, task, plan)  # only a checked stage changes the student
        show = progress if stage.ranks.main else False
        with Bar(label, stage.shapes.steps, show=show) as bar, stage.wrapped() as wrap:
            choice = Choice(task, plan.keep if validation is not None else "last", stage.ranks)
            loop = _loop(stage, wrap, log, bar, None if start is None else start.inherited)
            session = Session(loop, choice, data, stage.device)
            if home is None:
                _epochs(stage, session, validation, log, bar)
            else:
                facts = made_with(stage, data, validation, stage.terms, label_weight)
                facts["start"] = None if start is None else start.digest
                _kept_epochs(stage, session, validation, bar, home, facts)
            if loop.average is not None:
                loop.average.swap()
        last = copy_of_state(student)
        if choice.kept is not None:
            student.load_state_dict(choice.kept)
    return Fit(
        student=student,
        last=last,
        best_epoch=choice.epoch,
        kept_epoch=plan.epochs - 1 if choice.kept is None else choice.epoch or 0,
        history=choice.history,
        plan=stage.shapes,
        seconds=session.seconds,
        teacher_seconds=loop.teacher_seconds,
    )


def _loop(
    stage: Stage, wrap: Wrap, log: Log | None, bar: Bar, inherited: Collection[str] | None
) -> Loop:
    return Loop(
        stage.objective,
        stage.teacher,
        stage.plan,
        stage.shapes.steps,
        stage.ranks,
        wrap,
        stage.device,
        stage.dtype,
        log=log,
        watch=bar.watch,
        inherited=inherited,
    )


def _kept_epochs(
    stage: Stage, session: Session, validation: Any, bar: Bar, home: Home, facts: dict[str, Any]
) -> None:
    """The epochs, saved where it is due, where a signal comes, and at the end."""
    check_keepable(stage.objective)
    with Stop() as stop:
        keeper = Keeper(home, session, stage.plan, facts, stop)
        keeper.begin(stage.shapes.checkpoint_bytes)
        session.loop.keeper = keeper
        try:
            _epochs(stage, session, validation, home.log, bar, stop)
        except Interrupted:
            if not stop.hurried:
                keeper.save()
            raise
        keeper.end()


def _epochs(
    stage: Stage,
    session: Session,
    validation: Any,
    log: Log | None,
    bar: Bar,
    stop: Stop | None = None,
) -> None:
    """Every epoch that is not done yet."""
    loop, plan, data = session.loop, stage.plan, session.data
    while loop.number < plan.epochs:
        stage.train()
        loop.epoch(stage.batches(data, loop.number, start=loop.taken))
        if validation is not None:
            _validate(stage, session, validation, log, bar, stop)
        loop.close_epoch()


def _validate(
    stage: Stage, session: Session, validation: Any, log: Log | None, bar: Bar, stop: Stop | None
) -> None:
    """Validate, with the averaged weights where there are any, and keep what is best."""
    loop, choice, student = session.loop, session.choice, stage.objective.student
    if stage.teacher is not None and hasattr(stage.teacher, "check"):
        stage.teacher.check()
    # Of several ranks none may leave a validation alone; they stop after the next step.
    watch = None if stop is None or stage.ranks.world > 1 else lambda *_: stop.check()
    with averaged(loop.average):
        try:
            with loop.wrap.apart():
                rows = collect(
                    student,
                    validation,
                    choice.task,
                    device=stage.device,
                    progress=watch,
                    ranks=stage.ranks,
                )
        except DataError as error:
            raise DivergedError(f"epoch {loop.number + 1}: {error}") from error
        scores = choice.task.score(rows)
        record = {"split": "validation", "epoch": loop.number, "step": loop.done, **scores}
        choice.offer(loop.number, record, student)
    bar.note(choice.task.metric, scores[choice.task.metric])
    if log is not None:
        log(record)


def distill(
    student: nn.Module,
    teacher: Teacher | nn.Module | Any,
    data: Any,
    task: Task,
    terms: Sequence[Term],
    *,
    label_weight: Annotated[float, Ge(0)] = 0.1,
    init: str | nn.Module | None = None,
    validation: Any = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Train *student*, in place, to give what *teacher* gives; returns the student.

    Args:
        student: any module that ``task.forward`` can run.
        teacher: an ``attar.Teacher``, a module, or anything that answers like a teacher.
        data: an ``attar.data.Source``; without labels, ``label_weight`` must be 0.
        task: what a batch means.
        terms: what to match.
        label_weight: weight of the task's own loss on the labels.
        init: a model, or the folder of one, whose weights the student starts from
            (``attar.models.transfer``); its head starts anew, unless a folder says that it was
            trained for the same classes.
        validation: a source by which the best epoch is chosen; without one the last is kept.
        run: folder for the log, the checkpoints, the plan and the trained model; must not hold a
            run unless ``resume``.
        resume: go on from the newest sound checkpoint of ``run``, where there is one.
        progress: draw a bar; by default where standard error is a terminal.
        **options: the fields of ``attar.training.Plan``.

    Raises:
        AttarError: whatever is wrong, in one sentence, before the first batch.
        DivergedError: a loss or gradient is not finite; the weights are from before that step.
        Interrupted: Ctrl-C or SIGTERM came, and ``run`` holds all that it takes to go on.
    """
    told = {"label_weight": label_weight, "validation": validation, "progress": progress}
    told |= {"label": "distill", "init": init}
    return _verb(run, resume, student, teacher, data, task, terms, **told, **options)


def train(
    student: nn.Module,
    data: Any,
    task: Task,
    *,
    init: str | nn.Module | None = None,
    validation: Any = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Train a module, in place, on labels alone; returns it. The options are `distill`'s."""
    told = {"label_weight": 1.0, "validation": validation, "progress": progress, "label": "train"}
    told |= {"init": init}
    return _verb(run, resume, student, None, data, task, (), **told, **options)


def _verb(
    run: str | Path | None,
    resume: bool,
    student: nn.Module,
    teacher: Any,
    data: Any,
    task: Task,
    terms: Sequence[Term],
    **options: Any,
) -> nn.Module:
    """Fit, and leave the log, the plan and the model in the run folder where there is one."""
    if not isinstance(student, nn.Module):
        raise UsageError(f"the student must be a torch.nn.Module, not a {type(student).__name__}")
    if run is None:
        if resume:
            raise UsageError("resume goes on with a run folder; name it with run=")
        return fit(student, teacher, data, task, terms, **options).student
    plan = make_plan({name: options[name] for name in options.keys() & Plan.__dataclass_fields__})
    with connect(plan.parallel, plan.device) as ranks, opened(ranks, run, resume=resume) as folder:
        home = Home(folder, resume=resume, tell=partial(print, file=sys.stderr))
        done = fit(student, teacher, data, task, terms, home=home, **options)
        folder.write("plan.json", done.plan.to_json())
        if ranks.main:
            extra = {"task": task.fitted(data).describe()}
            save(done.student, folder.folder / "model", extra=extra)
        ranks.barrier()
    return done.student


def _with_plan(verb: Callable[..., Any]) -> inspect.Signature:
    """The verb's signature with the plan's fields spelled out, for help, editors and recipes."""
    own = inspect.signature(verb, eval_str=True)
    plan = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint
        )
        for field, hint in zip(fields(Plan), _hints(Plan).values(), strict=True)
    ]
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*kept, *plan])


def _hints(owner: type) -> Mapping[str, Any]:
    from typing import get_type_hints

    return get_type_hints(owner, include_extras=True)


distill.__signature__ = _with_plan(distill)  # type: ignore[attr-defined]
train.__signature__ = _with_plan(train)  # type: ignore[attr-defined]
