"""A recipe's data, task and models, made and tried on one batch; nothing is trained here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attar.data import Source, split
from attar.evaluation import bootstrap, collect, count_macs
from attar.models import build, load, load_weights, read_extra
from attar.recipes.recipe import Recipe, TeacherPlan
from attar.recipes.rooms import SUPPLIED
from attar.runtime import PreflightError, eval_mode
from attar.tasks import Regression, Task, restore
from attar.tasks.task import Rows
from attar.teachers import Teacher
from attar.training import Term, distill, train
from attar.training import check as check_stage


@dataclass(frozen=True)
class Job:
    """A recipe whose data, task and models exist: ready to be checked and run."""

    recipe: Recipe
    train: Source
    validation: Source
    test: Source
    task: Task
    teacher: nn.Module
    common: dict[str, Any]

    @property
    def teaching(self) -> dict[str, Any] | None:
        """The options the teacher is trained with; None when it already knows."""
        plan = self.recipe.teacher
        if not isinstance(plan, TeacherPlan) or plan.train is None:
            return None
        own = plan.train.keywords if isinstance(plan.train, partial) else {}
        return {"label_weight": 1.0, "seed": self.recipe.seed, **self.common, **own}

    @property
    def labelled(self) -> bool:
        """Whether there can be a baseline: the same student on labels alone."""
        return self.train.labels is not None

    def student(self, number: int) -> nn.Module:
        """The student before training, for the seed of this *number*."""
        made = self.recipe.student
        if isinstance(made, nn.Module):
            return copied(made)
        return seeded(self.recipe.seed + number, partial(made_model, made, self))


def prepare(recipe: Recipe) -> Job:
    """Read the data, settle the task, make or load the teacher; trains nothing."""
    splits = recipe.data if isinstance(recipe.data, tuple) else recipe.data()
    train, validation, test = _three(splits, recipe)
    task = _task(recipe).fitted(train)
    for part in (validation, test):
        if part.labels is None:
            raise PreflightError(f"{part.name}: has no labels, which a verdict needs")
        task.fitted(part)
    common = {
        "device": recipe.device,
        "precision": recipe.precision,
        "parallel": recipe.parallel,
    }
    job = Job(recipe, train, validation, test, task, nn.Identity(), common)
    return replace(job, teacher=seeded(recipe.seed, partial(_teacher_model, job)))


def _task(recipe: Recipe) -> Task:
    """The recipe's task; a loaded teacher's regression keeps the units it was trained in."""
    task = recipe.task if isinstance(recipe.task, Task) else recipe.task()
    taught = _taught_task(recipe)
    if isinstance(task, Regression) and isinstance(taught, Regression) and task.mean is None:
        return taught
    return task


def _taught_task(recipe: Recipe) -> Task | None:
    """The task that a loaded teacher was saved with."""
    plan = recipe.teacher
    if not isinstance(plan, TeacherPlan) or plan.load is None or plan.model is not None:
        return None
    described = read_extra(plan.load).get("task")
    return None if described is None else restore(described)


def _three(splits: Sequence[Source], recipe: Recipe) -> tuple[Source, Source, Source]:
    """Training, validation and test; the validation is carved by seed where none is given."""
    if len(splits) == 3:
        return splits[0], splits[1], splits[2]
    train, test = splits
    if train.labels is not None:
        return *split(train, recipe.validation, seed=recipe.seed), test
    # Unlabelled training data cannot choose an epoch, so part of the labelled test data does.
    rest, part = split(test, recipe.validation, seed=recipe.seed)
    return train, part, rest


def _teacher_model(job: Job) -> nn.Module:
    plan = job.recipe.teacher
    if isinstance(plan, nn.Module):
        return plan
    if plan.model is None:
        assert plan.load is not None
        if taught := _taught_task(job.recipe):
            taught.fitted(job.train)  # the same classes in the same order
        return load(plan.load)
    model = made_model(plan.model, job)
    if plan.load is not None:
        load_weights(model, plan.load)
    return model


def made_model(make: Callable[..., nn.Module], job: Job) -> nn.Module:
    """Build a model for the job's data."""
    options = make.keywords if isinstance(make, partial) else {}
    function = make.func if isinstance(make, partial) else make
    if not inspect.signature(function).parameters:
        return function()  # student=lambda: MyNet()
    return build(function, data=job.train, outputs=job.task.width, **options)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a student that was given as a module: each seed and arm starts from one."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise PreflightError(
            f"the student, a {type(model).__name__}, cannot be copied ({error}), but the baseline "
            "starts from a copy; give a function that makes it: student=lambda: MyNet()"
        ) from error


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose random start is a function of *seed*; the caller's state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def check_job(job: Job) -> dict[str, Any]:
    """Try every stage on one batch; returns the plan as JSON."""
    if job.teaching is not None:
        check_stage(job.teacher, None, job.train, job.task, **job.teaching)
    else:
        check_floor(job)
    student = job.student(0)
    copied(student)
    return {
        "data": {
            "name": job.train.name,
            "train": len(job.train),
            "validation": len(job.validation),
            "test": len(job.test),
            "shape": list(job.train.shape),
            "width": job.task.width,
        },
        "teacher": _sizes(job, job.teacher),
        "student": _sizes(job, student),
        "seeds": job.recipe.seeds,
        "stages": [_checked(job, student, stage) for stage in job.recipe.stages],
    }


def _sizes(job: Job, model: nn.Module) -> dict[str, Any]:
    batch = job.train.rows(torch.arange(1))
    with eval_mode(model), torch.no_grad():
        job.task.try_forward(model, batch, "model")
    return {
        "model": getattr(model, "attar_build", {}).get("family", type(model).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": count_macs(model, batch["inputs"]),
    }


def _checked(job: Job, student: nn.Module, stage: Any) -> dict[str, Any]:
    if job.labelled:
        _, plain = stage_of(job, stage, with_teacher=False)
        check_stage(student, None, job.train, job.task, **plain)
    teacher, options = stage_of(job, stage, with_teacher=True)
    return check_stage(student, teacher, job.train, job.task, **options).to_json()


def stage_of(job: Job, stage: Any, *, with_teacher: bool) -> tuple[Teacher | None, dict[str, Any]]:
    """The teacher and options of a stage; without the teacher it is the baseline's stage."""
    options = dict(stage.keywords) if isinstance(stage, partial) else {}
    verb = stage.func if isinstance(stage, partial) else stage
    if verb not in (distill, train):
        raise PreflightError(f"a stage is distill or train, not {getattr(verb, '__name__', verb)}")
    if taken := options.keys() & SUPPLIED["stages"]:
        raise PreflightError(f"'{min(taken)}' is the recipe's own and cannot stand in a stage")
    if verb is distill and not options.get("terms"):
        raise PreflightError("a distill stage has no terms: nothing would be asked of the teacher")
    # A loss with weights of its own starts anew in every seed.
    options["terms"] = [_fresh(term) for term in options.get("terms", ())]
    if verb is not distill or not with_teacher:
        options = {k: v for k, v in options.items() if k not in ("terms", "label_weight")}
        return None, {"label_weight": 1.0, **job.common, **options}
    return Teacher(job.teacher, job.task), {**job.common, **options}


def _fresh(term: Term) -> Term:
    return (
        replace(term, loss=copy.deepcopy(term.loss)) if isinstance(term.loss, nn.Module) else term
    )


def check_floor(job: Job) -> None:
    """A teacher must be above the best constant answer by its interval."""
    rows = rows_of(job, job.teacher, job.validation)
    found = bootstrap(job.task, rows)
    assert job.validation.labels is not None
    floor = job.task.floor(job.validation.labels)
    above = found.low > floor if job.task.higher_is_better else found.high < floor
    if not above:
        raise PreflightError(
            f"the teacher knows too little to teach: its {job.task.metric} on validation is "
            f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}], where always giving the same "
            f"answer has {floor:.4g}; train it longer, or check that it fits these data"
        )


def rows_of(job: Job, model: nn.Module, source: Source | None = None) -> Rows:
    return collect(model, source or job.test, job.task, device=job.recipe.device)
