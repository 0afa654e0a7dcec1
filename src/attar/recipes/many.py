"""Several students of one teacher: it is trained once and asked once, and each is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attar.evaluation import Verdict, Verdicts
from attar.evaluation.verdicts import named
from attar.recipes.arms import Arm, Desk, teach
from attar.recipes.caching import check_cache
from attar.recipes.changes import notes
from attar.recipes.job import Job, judged, prepare
from attar.recipes.preflight import check_job, check_teacher
from attar.recipes.recipe import Loaded, options_of
from attar.recipes.run import allowed, begun, elder, finish, measured
from attar.recipes.told import described, environment, warn
from attar.reporting import page
from attar.runtime import AttarError, PreflightError, UsageError


def run_many(loaded: Loaded, place: Path, resume: bool, hand: Callable[..., Desk]) -> Verdicts:
    """Do for each student what ``run`` does for one, in a folder of its own within *place*.

    Args:
        hand: a ``Desk`` but for the job, the run, its root and ``resume``.
    """
    jobs, plans = checked_many(loaded)
    desk = hand(jobs[0], None, place, resume=resume)
    with begun(desk.ranks, place, loaded, plans, resume=resume) as home:
        desk.say(f"data       {described(jobs[0])}")
        desk, taught = teach(replace(desk, run=home))
        names = tuple(plan["name"] for plan in plans["students"])
        found, kept = [], []
        models, folders = elder(desk)
        aim = _validated(desk) if loaded.recipe.goal is not None else None
        for index, (single, job) in enumerate(zip(loaded.singles(), jobs, strict=True)):
            desk.say(f"student {index}  {names[index]}")
            plan = plans["students"][index]
            inner = replace(desk, job=replace(job, weights=desk.job.weights))
            own = place / f"student-{index}"
            verdict, arm = _one(inner, taught, single, plan, own)
            found.append(verdict)
            kept.append(None if aim is None else _share(job, arm, aim))
            models[own.name], folders[own.name] = judged(arm.finals[-1].student), own / "student"
        # All in turns, once more: what was timed at different hours is not to be compared.
        cost = measured(desk, models, folders)
        verdicts = Verdicts(
            names,
            tuple(found),
            tuple(kept),
            tuple(cost[f"student-{index}"] for index in range(len(found))),
            cost.get(jobs[0].elder),
        )
        told: dict[str, Any] = {"environment": environment(loaded, desk.job, desk.ranks)}
        told["notes"] = [*verdicts.notes, *notes(loaded.recipe.stages)]
        home.write("verdict.json", verdicts.to_json() | told)
        if desk.ranks.main:
            page(place)
    return verdicts


def _one(
    desk: Desk, taught: Arm, single: Loaded, plan: Mapping[str, Any], place: Path
) -> tuple[Verdict, Arm]:
    """The verdict of one student, and what came of its training."""
    resume = allowed(desk.ranks, place, single, desk.resume, desk.allow)
    with begun(desk.ranks, place, single, dict(plan), resume=resume) as home:
        warn(dict(plan), desk.say)
        verdict, arms = finish(replace(desk, run=home, resume=resume), taught, single)
    return verdict, arms["distilled"]


def _validated(desk: Desk) -> float:
    job = desk.job
    return float(job.task.primary(desk.rows(job.teacher, job.validation)))


def _share(job: Job, arm: Arm, teacher: float) -> float | None:
    """What the student keeps of the teacher's metric on validation; None where it has no ratio."""
    values = [fit.history[fit.kept_epoch][job.task.metric] for fit in arm.finals]
    student = sum(values) / len(values)
    above, below = (student, teacher) if job.task.higher_is_better else (teacher, student)
    return above / below if below > 0 else None


def check_many(loaded: Loaded) -> dict[str, Any]:
    """The plan of each student."""
    return checked_many(loaded)[1]


def checked_many(loaded: Loaded) -> tuple[list[Job], dict[str, Any]]:
    """A job for each student, all tried out; they share the data and the teacher.

    Raises:
        AttarError: whatever is wrong with one of them, which it names.
    """
    try:
        job = prepare(loaded.recipe.singles()[0])
        check_cache(job)
        check_teacher(job)
    except UsageError as error:
        raise PreflightError(str(error)) from error
    jobs = [replace(job, recipe=recipe) for recipe in loaded.recipe.singles()]
    plans = [_plan(index, each) for index, each in enumerate(jobs)]
    names = _names(jobs, plans)
    return jobs, {"students": [{"name": n} | plan for n, plan in zip(names, plans, strict=True)]}


def _plan(index: int, job: Job) -> dict[str, Any]:
    try:
        return check_job(job)
    except UsageError as error:
        raise PreflightError(f"student.{index}: {error}") from error
    except AttarError as error:
        raise type(error)(f"student.{index}: {error}") from error


def _names(jobs: Sequence[Job], plans: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    bases = [plan.get("baseline", plan["student"])["model"] for plan in plans]
    return named(bases, [options_of(job.recipe.students[0]) for job in jobs])
