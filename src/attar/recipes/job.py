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
from attar.models import build, is_foreign, load, load_weights, own_classes, pretrained, read_extra
from attar.recipes import exports
from attar.recipes.recipe import Recipe, TeacherPlan, verb
from attar.recipes.rooms import SUPPLIED
from attar.runtime import DataError, PreflightError, eval_mode
from attar.tasks import Regression, Task, restore
from attar.tasks.classification import Classification
from attar.tasks.task import Rows
from attar.teachers import Teacher, project, renamed
from attar.training import Term, distill, train
from attar.training import check as check_stage

# What is said of a student that knows something; one that starts at random has no use for it.
INHERITED = {"init", "freeze", "unfreeze_every", "layer_decay", "frozen_batch_norm", "l2_sp"}


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
    whole: Source
    """What a teacher is trained on: all training rows, also where the student is given fewer."""

    @property
    def teaching(self) -> dict[str, Any] | None:
        """The options the teacher is trained with; None when it already knows."""
        plan = self.recipe.teacher
        if not isinstance(plan, TeacherPlan) or plan.train is None:
            return None
        own = plan.train.keywords if isinstance(plan.train, partial) else {}
        return {"label_weight": 1.0, "seed": self.recipe.seed, **self.common, **own}

    @property
    def distils(self) -> bool:
        """Whether a stage asks the teacher; else the student only inherits weights."""
        return any(verb(stage) is distill for stage in self.recipe.stages)

    @property
    def called(self) -> str:
        """What the student is called when it is done."""
        return "distilled" if self.distils else "transferred"

    @property
    def elder(self) -> str:
        """What the recipe's teacher is called: where none is asked, it is a source of weights."""
        return "teacher" if self.distils else "source"

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
    whole, validation, test = _three(splits, recipe)
    train = _fewer(whole, recipe)
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
    job = Job(recipe, train, validation, test, task, nn.Identity(), common, whole)
    teacher = seeded(recipe.seed, partial(_teacher_model, job))
    return replace(job, teacher=_projected(job, teacher))


def _fewer(train: Source, recipe: Recipe) -> Source:
    """The rows of the training split that the student is given."""
    wanted, there = recipe.examples, len(train)
    if wanted is None or wanted == there:
        return train
    if wanted > there:
        raise PreflightError(
            f"examples is {wanted:,}, but {train.name} has {there:,} training rows"
        )
    return split(train, wanted / there, seed=recipe.seed)[1]


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
    if plan.projects:
        return None  # its task is another one
    if is_foreign(plan.load):
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
            _check_taught(taught, job)
        if is_foreign(plan.load):
            if plan.projects:
                names = own_classes(plan.load)
                return pretrained(job.train.shape, len(names), path=plan.load, head="keep")
            keep = partial(pretrained, path=plan.load, head="keep")
            return build(keep, data=job.train, outputs=job.task.width)
        return load(plan.load)
    model = made_model(plan.model, job)
    if plan.load is not None:
        load_weights(model, plan.load)
    return model


def _check_taught(taught: Task, job: Job) -> None:
    """The teacher's classes must be the student's, in the same order."""
    try:
        taught.fitted(job.train)
    except DataError as error:
        raise DataError(
            f"the teacher cannot teach these classes as it is: {error}; if it is meant to know "
            "others, add project: true to the teacher"
        ) from None


def _projected(job: Job, model: nn.Module) -> nn.Module:
    """The teacher as one of this task's classes, where it knows others."""
    plan = job.recipe.teacher
    if not isinstance(plan, TeacherPlan) or not plan.projects:
        return model
    assert plan.load is not None
    if not isinstance(job.task, Classification):
        raise PreflightError("a teacher's classes are projected onto classes; the task has none")
    if plan.classes is None:
        return project(model, job.train, job.task)
    return renamed(model, _own_classes(plan.load), job.task, plan.classes)


def _own_classes(folder: str) -> Sequence[str]:
    """What a loaded teacher's classes are called."""
    if is_foreign(folder):
        return own_classes(folder)
    described = read_extra(folder).get("task")
    taught = None if described is None else restore(described)
    if not isinstance(taught, Classification):
        raise PreflightError(
            f"{folder}: does not say what its classes are called; use project: true"
        )
    return taught.names()


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
        check_stage(job.teacher, None, job.whole, job.task, **job.teaching)
    elif job.distils:
        check_floor(job)
    student = job.student(0)
    copied(student)
    _check_question(job)
    plan = {
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
        "stages": [_checked(job, student, stage) for stage in job.recipe.trainings],
    }
    if job.recipe.exporting is not None:
        plan["export"] = exports.check_stage(job, student)
    return plan


def _check_question(job: Job) -> None:
    """A recipe must ask something: of the teacher, or of what is inherited."""
    inherits = any(
        isinstance(stage, partial) and stage.keywords.get("init") is not None
        for stage in job.recipe.stages
    )
    if not job.distils and not inherits:
        raise PreflightError(
            "no stage is distill and none has init, so student and baseline would be the same; "
            "add do: distill with terms, or init: the folder of a model to start from"
        )
    if not job.distils and job.recipe.goal is not None:
        raise PreflightError(
            "the goal is a share of the teacher's metric, and no stage asks the teacher; leave "
            "goal out, or add do: distill"
        )


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
    """The teacher and options of a stage; without the teacher it is the baseline's stage.

    Where no stage asks the teacher for anything, what the student inherits is what is judged: the
    baseline then starts at random, and all of it learns from the first step.
    """
    options = dict(stage.keywords) if isinstance(stage, partial) else {}
    function = verb(stage)
    if function not in (distill, train):
        called = getattr(function, "__name__", function)
        raise PreflightError(f"a stage is distill, train or export, not {called}")
    if taken := options.keys() & SUPPLIED["stages"]:
        raise PreflightError(f"'{min(taken)}' is the recipe's own and cannot stand in a stage")
    if function is distill and not options.get("terms"):
        raise PreflightError("a distill stage has no terms: nothing would be asked of the teacher")
    # A loss with weights of its own starts anew in every seed.
    options["terms"] = [_fresh(term) for term in options.get("terms", ())]
    if function is not distill or not with_teacher:
        left_out = {"terms", "label_weight"}
        if not with_teacher and not job.distils:
            left_out |= INHERITED
        options = {k: v for k, v in options.items() if k not in left_out}
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
