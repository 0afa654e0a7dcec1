"""A recipe tried out before anything is trained: every stage on one batch."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from attar.evaluation import bootstrap, count_macs
from attar.models.quantized import parameters_of
from attar.recipes import exports
from attar.recipes.changes import made_from, notes
from attar.recipes.job import Job, copied, judged, rows_of, rows_of_stage, stage_of
from attar.recipes.proposal import proposed
from attar.recipes.recipe import verb
from attar.recipes.teachers import kind
from attar.recipes.turns import Turn
from attar.runtime import PreflightError, eval_mode
from attar.training import check as check_stage
from attar.training import distill


def check_teacher(job: Job) -> None:
    """Try the stage of each teacher on one batch, or ask those that are loaded what they know."""
    for member in job.members:
        if member.training is not None:
            check_stage(member.model, None, job.parts.teacher, job.task, **member.training)
    if job.distils and job.moving is None and not job.teaches_first:
        check_floor(job)


def check_job(job: Job) -> dict[str, Any]:
    """Try every stage of the student on one batch; returns the plan as JSON."""
    student = job.student(0)
    copied(student)
    _check_question(job)
    _check_label_weights(job)
    sizes, stages, last = _sizes(job, student), [], student
    changed = _Changes(job)
    alone = job.learners(0, student, with_teacher=False)
    for turn, learner, before in job.learners(0, student, with_teacher=True, seen=changed):
        changes = changed.told()
        plain = next(alone)[1]
        stages.append(_checked(job, plain, turn, learner, before) | changes)
        last = judged(learner)
    last = job.changed(last, job.recipe.ending, 0, changed)
    plan = {
        "data": {
            "name": job.called_data,
            "train": len(job.train),
            "validation": len(job.validation),
            "test": len(job.test),
            "shape": list(job.train.shape),
            "width": job.task.width,
        },
        "teacher": _teacher_sizes(job),
        "student": sizes | made_from(student),
        "saw": {name: asdict(seen) for name, seen in job.saw.items()},
        "seeds": job.recipe.seeds,
        "stages": stages,
    }
    if told := notes(job.recipe.stages):
        plan["notes"] = told
    if job.recipe.changes:
        plan |= {"result": _sizes(job, last)} | changed.told()
    if job.reuses_head:
        model = f"{sizes['model']}, a projector and the teacher's classifier"
        plan |= {"student": _sizes(job, last) | {"model": model}, "baseline": sizes}
    if job.recipe.exporting is not None:
        plan["export"] = exports.check_stage(job, last)
    return plan


class _Changes:
    """What stages that change the student would make of it, as JSON."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._seen: list[dict[str, Any]] = []

    def __call__(self, stage: Any, model: nn.Module) -> None:
        found = made_from(model)["made"] | _sizes(self.job, model)
        self._seen.append({"do": verb(stage).__name__} | found)

    def told(self) -> dict[str, Any]:
        """Those since the last time that were told."""
        found, self._seen = self._seen, []
        return {"changes": found} if found else {}


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
    if job.moving is not None and job.recipe.goal is not None:
        raise PreflightError(
            "the goal is a share of the teacher's metric, and a teacher that moves with the "
            "student has none of its own; leave goal out"
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
    if job.peers:
        raise PreflightError(
            f"with labels: {few} a distill stage has no labels, and students that teach each other "
            "without any can agree on anything; leave labels out (examples gives them few rows), "
            "or choose another teacher"
        )
    if job.moving is not None and verb(job.recipe.trainings[0]) is distill:
        raise PreflightError(
            f"with labels: {few} a distill stage has no labels, and a teacher that moves with the "
            "student knows no more than it; begin with a stage do: train"
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


def _teacher_sizes(job: Job) -> dict[str, Any]:
    if job.moving is not None:
        return {"model": job.moving}
    whole = _sizes(job, job.teacher)
    if len(job.members) == 1:
        return whole
    members = [_sizes(job, member.model) for member in job.members]
    return whole | {"model": f"ensemble of {len(members)}", "members": members}


def _sizes(job: Job, model: nn.Module) -> dict[str, Any]:
    batch = job.train.rows(torch.arange(1))
    with eval_mode(model), torch.no_grad():
        job.task.try_forward(model, batch, "model")
    if not any(True for _ in model.parameters()):  # a function, whose size nobody knows
        return {"model": kind(model)}
    return {
        "model": kind(model),
        "parameters": parameters_of(model),
        "macs": count_macs(model, batch["inputs"]),
    }


def _checked(
    job: Job, student: nn.Module, turn: Turn, learner: nn.Module, before: nn.Module | None
) -> dict[str, Any]:
    if job.labelled:
        _, plain = stage_of(job, turn, student, None, with_teacher=False)
        rows = rows_of_stage(job, turn.stage, with_teacher=False)
        check_stage(student, None, rows, job.task, **plain)
    teacher, options = stage_of(job, turn, learner, before, with_teacher=True)
    rows = rows_of_stage(job, turn.stage, with_teacher=True)
    found = check_stage(learner, teacher, rows, job.task, **options)
    plan = found.to_json() | {"proposals": proposed(found, options.get("terms", ()))}
    return plan if turn.assistant is None else plan | {"assistant": _sizes(job, learner)}


def check_floor(job: Job) -> None:
    """A teacher must be above the best constant answer by its interval."""
    rows = rows_of(job, job.teacher, job.validation)
    found = bootstrap(job.task, rows)
    assert job.validation.labels is not None
    floor = job.task.floor(job.validation.labels)
    up = job.task.higher_is_better
    if found.low > floor if up else found.high < floor:
        return
    scored = f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
    constant = f"where always giving the same answer has {floor:.4g}"
    if found.value > floor if up else found.value < floor:  # as far as so few rows can tell
        count = len(job.validation)
        raise PreflightError(
            f"{count:,} validation row{'s are' if count != 1 else ' is'} too few to tell whether "
            f"the teacher knows anything: its {job.task.metric} on them is {scored}, {constant}; "
            f"give more of them, {_more_rows(job.recipe.validation)}"
        )
    raise PreflightError(
        f"the teacher knows too little to teach: its {job.task.metric} on validation is {scored}, "
        f"{constant}; train it longer, or check that it fits these data"
    )


def _more_rows(share: float) -> str:
    """Where more validation rows come from: of the training rows, where there is room for it."""
    own = "with a larger validation part of the data"
    return f"by validation: 0.3 (it is {share:g}) or {own}" if share < 0.3 else own
