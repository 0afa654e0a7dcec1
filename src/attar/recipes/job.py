"""A recipe's data, task and models, made and tried on one batch; nothing is trained here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attar.data import Source
from attar.evaluation import Seen, bootstrap, collect, count_macs
from attar.models import build, is_foreign, load, load_weights, own_classes, pretrained, read_extra
from attar.recipes import exports
from attar.recipes.parts import Parts, parted
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
    parts: Parts
    task: Task
    teacher: nn.Module
    common: dict[str, Any]

    @property
    def train(self) -> Source:
        """The rows of which the student asks the teacher."""
        return self.parts.student

    @property
    def validation(self) -> Source:
        """The rows that choose epochs."""
        return self.parts.validation

    @property
    def test(self) -> Source:
        """The rows that only report."""
        return self.parts.test

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
    def chooses(self) -> bool:
        """Whether validation chose the epoch of the student that is judged."""
        stage = self.recipe.trainings[-1]
        options = stage.keywords if isinstance(stage, partial) else {}
        return options.get("keep", "best") == "best"

    @property
    def called(self) -> str:
        """What the student is called when it is done."""
        return "distilled" if self.distils else "transferred"

    @property
    def elder(self) -> str:
        """What the recipe's teacher is called: where none is asked, it is a source of weights."""
        return "teacher" if self.distils else "source"

    @property
    def called_data(self) -> str:
        """The name of the data without that of a part: "photos train" and "photos test"."""
        names = [source.name.split() for source in (self.train, self.test)]
        return " ".join(w for w in names[0] if w in names[1]) or self.train.name

    @property
    def labelled(self) -> bool:
        """Whether there can be a baseline: the same student on labels alone."""
        return self.parts.alone.labels is not None

    @property
    def saw(self) -> dict[str, Seen]:
        """How many rows each arm learns from, and how many of them have labels."""
        alone, shown = _seen(self.parts.labelled), _seen(self.train)
        # What a stage on labels alone adds.
        more = alone.labelled if any(verb(s) is not distill for s in self.recipe.trainings) else 0
        found = {self.elder: _seen(self.parts.teacher)} if self.teaching is not None else {}
        found["distilled"] = Seen(shown.rows, max(shown.labelled, more))
        return found | ({"baseline": alone} if self.labelled else {})

    def student(self, number: int) -> nn.Module:
        """The student before training, for the seed of this *number*."""
        made = self.recipe.student
        if isinstance(made, nn.Module):
            return copied(made)
        return seeded(self.recipe.seed + number, partial(made_model, made, self))


def prepare(recipe: Recipe) -> Job:
    """Read the data, settle the task, make or load the teacher; trains nothing."""
    splits = recipe.data if isinstance(recipe.data, tuple) else recipe.data()
    parts = parted(splits, recipe)
    task = _task(recipe).fitted(parts.labelled)
    for part in (parts.validation, parts.test):
        if part.labels is None:
            raise PreflightError(f"{part.name}: has no labels, which a verdict needs")
        task.fitted(part)
    common = {
        "device": recipe.device,
        "precision": recipe.precision,
        "parallel": recipe.parallel,
    }
    job = Job(recipe, parts, task, nn.Identity(), common)
    teacher = seeded(recipe.seed, partial(_teacher_model, job))
    return replace(job, teacher=_projected(job, teacher))


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
        taught.fitted(job.parts.labelled)
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
        return project(model, job.parts.labelled, job.task)
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
        check_stage(job.teacher, None, job.parts.teacher, job.task, **job.teaching)
    elif job.distils:
        check_floor(job)
    student = job.student(0)
    copied(student)
    _check_question(job)
    _check_label_weights(job)
    plan = {
        "data": {
            "name": job.called_data,
            "train": len(job.train),
            "validation": len(job.validation),
            "test": len(job.test),
            "shape": list(job.train.shape),
            "width": job.task.width,
        },
        "teacher": _sizes(job, job.teacher),
        "student": _sizes(job, student),
        "saw": {name: asdict(seen) for name, seen in job.saw.items()},
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


def _check_label_weights(job: Job) -> None:
    """Where few rows have labels, the stages that ask the teacher go without."""
    few = job.recipe.labels
    if few is None:
        return
    if not job.distils:
        raise PreflightError(
            f"labels is {few:,}, but no stage is distill, so rows without labels are of no use; "
            f"write examples: {few} instead, or add do: distill"
        )
    for index, stage in enumerate(job.recipe.trainings):
        options = stage.keywords if isinstance(stage, partial) else {}
        weight = options.get(
            "label_weight", inspect.signature(distill).parameters["label_weight"].default
        )
        if verb(stage) is distill and weight:
            raise PreflightError(
                f"stage {index} has label_weight {weight}, but with labels: {few} its rows have "
                "none; set label_weight: 0, and where the student is to see the labels too, add "
                "a stage do: train after it"
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
        rows = rows_of_stage(job, stage, with_teacher=False)
        check_stage(student, None, rows, job.task, **plain)
    teacher, options = stage_of(job, stage, with_teacher=True)
    rows = rows_of_stage(job, stage, with_teacher=True)
    return check_stage(student, teacher, rows, job.task, **options).to_json()


def rows_of_stage(job: Job, stage: Any, *, with_teacher: bool) -> Source:
    """What a stage learns from, taught or alone."""
    if verb(stage) is not distill:
        return job.parts.labelled
    return job.parts.student if with_teacher else job.parts.alone


def _seen(source: Source) -> Seen:
    return Seen(len(source), 0 if source.labels is None else len(source))


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
