"""A recipe's teacher, asked once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar.data import Augmentation
from attar.recipes.job import Job, prepare, rows_of_stage, stage_of
from attar.recipes.recipe import Loaded, TeacherPlan, verb
from attar.recipes.turns import Turn
from attar.runtime import PreflightError, Ranks
from attar.teachers import Cached, Filling, Keep, compare_again, fill
from attar.training import distill
from attar.training.plan import Plan, make_plan
from attar.training.stage import prepared

ROOT = Path("runs") / "cache"


def keep_of(job: Job) -> Keep | None:
    """The form in which the recipe's teacher is kept; None where it is asked every time."""
    plan = job.recipe.teacher
    if not isinstance(plan, TeacherPlan) or plan.cache is False:
        return None
    return Keep() if plan.cache is True else plan.cache


def remembering(
    job: Job, turn: Turn, teacher: Any, options: dict[str, Any], run: Path, ranks: Ranks
) -> Any:
    """The teacher of a stage; with a cache beside the run folder, where the recipe says so."""
    keep = keep_of(job)
    if keep is None or teacher is None or not asks(turn):
        return teacher
    writer = f"rank{ranks.rank}"
    return _filling(job, teacher, options, keep, root=run.parent / ROOT.name, writer=writer)


def _filling(job: Job, teacher: Any, options: dict[str, Any], keep: Keep, **place: Any) -> Filling:
    return Filling(
        teacher,
        job.parts.student,
        views=options.get("views"),
        augment=options.get("augment", ()),
        keep=keep,
        **place,
    )


def asks(turn: Turn) -> bool:
    """Whether a stage asks the recipe's own teacher."""
    return verb(turn.stage) is distill and not (turn.previous or turn.unchanged)


def check_cache(job: Job) -> None:
    """Refuse, before anything is trained, a teacher or pixels that cannot be cached."""
    keep = keep_of(job)
    if keep is None:
        return
    for turn in job.recipe.turns:
        if asks(turn):
            options = turn.stage.keywords if isinstance(turn.stage, partial) else {}
            _filling(job, job.asked, options, keep)
    main = f"output:{job.task.outputs[0]}"
    batch = job.parts.student.rows(torch.arange(min(2, len(job.parts.student))))
    with closing(job.asked.open([main], torch.device("cpu"))) as teacher:
        keep.column(main, teacher(batch)[main], len(batch["ids"]))


def cache_recipe(
    loaded: Loaded, *, into: str | Path | None = None, batch_size: int = 256
) -> list[Path]:
    """Ask a recipe's teacher about every row that its stages will ask about; returns the folders.

    Raises:
        PreflightError: the recipe trains its teacher, or nothing would be asked.
    """
    job = prepare(loaded.recipe)
    _check_known(job)
    keep = keep_of(job) or Keep()
    folders = []
    for student, options, rows in _asking(job):
        teacher = _filling(job, job.asked, options, keep, root=ROOT, folder=into)
        told, plan = _split(options)
        with prepared(
            student, teacher, rows, job.task, told["terms"], told["label_weight"], plan
        ) as stage:
            fill(teacher, tuple(plan.augment), batch_size, stage.ranks, stage.device)
            folders.append(teacher.folder)
    return list(dict.fromkeys(folders))


@dataclass(frozen=True)
class Again:
    """What came of asking a teacher again."""

    rows: int
    difference: float
    allowed: float


def ask_again(folder: str | Path, loaded: Loaded, *, rows: int = 64) -> Again:
    """Ask a recipe's teacher again about a sample of what is kept.

    Raises:
        PreflightError: the folder was made with another teacher or of other data.
        DataError: an answer is not what was kept.
    """
    job = prepare(loaded.recipe)
    _check_known(job)
    cached = Cached(folder)
    with closing(cached):
        cached.check_teacher(job.asked)
        augment = _augment_of(job, cached)
        worst, allowed = compare_again(cached, job.asked, job.parts.student, augment, rows=rows)
    return Again(rows, worst, allowed)


def _augment_of(job: Job, cached: Cached) -> Sequence[Augmentation]:
    """The augmentations of the stage that the cache is for; the error names what differs."""
    hows = [(options.get("augment", ()), options.get("views")) for _, options, _ in _asking(job)]
    wrong = None
    for augment, views in hows:
        try:
            cached.check_source(job.parts.student, views=views, augment=augment)
        except PreflightError as error:
            wrong = wrong or error
        else:
            return augment
    assert wrong is not None, "a stage asks the teacher"
    raise wrong


def _check_known(job: Job) -> None:
    if job.teaches_first:
        raise PreflightError(
            "the recipe trains its teacher, which then is not there to be asked: attar run with "
            "teacher.cache=true keeps its answers as it goes; or say where it is by "
            "teacher.load=runs/NAME/teacher, without model and train"
        )
    if not any(asks(turn) for turn in job.recipe.turns) or not job.members:
        raise PreflightError("no stage of the recipe asks its teacher for anything")


def _asking(job: Job) -> Iterator[tuple[nn.Module, dict[str, Any], Any]]:
    for one in (replace(job, recipe=recipe) for recipe in job.recipe.singles()):
        for turn, learner, before in one.learners(0, one.student(0), with_teacher=True):
            if asks(turn):
                _, options = stage_of(one, turn, learner, before, with_teacher=True)
                yield learner, options, rows_of_stage(one, turn.stage, with_teacher=True)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], Plan]:
    """A stage's own options and its plan."""
    plan = {name: options[name] for name in options.keys() & Plan.__dataclass_fields__}
    default = inspect.signature(distill).parameters["label_weight"].default
    own = {"label_weight": default, **{k: v for k, v in options.items() if k not in plan}}
    return own, make_plan(plan)
