"""The models that teach in a recipe: built or loaded, fitted to its classes; not trained here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attar.data import Source
from attar.evaluation import collect
from attar.models import (
    build,
    is_foreign,
    load,
    load_weights,
    own_classes,
    pretrained,
    pretrained_language_model,
    pretrained_text_classifier,
    pretrained_text_encoder,
    read_extra,
)
from attar.recipes.changes import changed, changes
from attar.recipes.parts import Parts, told_by
from attar.recipes.recipe import Recipe, TeacherPlan
from attar.recipes.resolve import shown
from attar.runtime import AttarError, DataError, PreflightError
from attar.tasks import (
    LanguageModelling,
    Regression,
    SentenceEmbedding,
    Task,
    TextClassification,
    restore,
)
from attar.tasks.classes import ClassTask
from attar.tasks.classification import Classification
from attar.teachers import Ensemble, Function, Teacher, adapted, from_onnx, project, renamed

_TEXTS = (LanguageModelling, SentenceEmbedding, TextClassification)


@dataclass(frozen=True)
class Member:
    """A model that teaches, alone or as one of several.

    Attributes:
        folder: what it is called in the run.
        seed: of its start and its training.
        training: the options it is trained with; None when it already knows.
        loaded: the folder or file that it comes from.
    """

    model: nn.Module
    folder: str
    seed: int
    training: dict[str, Any] | None = None
    loaded: str | None = None


def members_of(
    recipe: Recipe, parts: Parts, task: Task, common: Mapping[str, Any]
) -> tuple[Member, ...]:
    """Build or load every model that teaches; of several each has a seed of its own.

    There is none where the teacher moves with the student.
    """
    plan = recipe.teacher
    if isinstance(plan, nn.Module):
        return (Member(plan, "teacher", recipe.seed),)
    if plan.moving is not None:
        return ()
    if plan.ensemble is None:
        return (_member(plan, "teacher", recipe.seed, parts, task, common),)
    found = []
    for index, each in enumerate(plan.ensemble):
        try:
            _check_units(each, task)
            seed = recipe.seed + index
            found.append(_member(each, f"teacher-{index}", seed, parts, task, common))
        except AttarError as error:
            raise type(error)(f"teacher.ensemble.{index}: {error}") from error
    return tuple(found)


def asked_of(
    plan: Any, members: Sequence[Member], task: Task, weights: Sequence[float] | None
) -> Teacher | Ensemble:
    """What a stage asks: the one model, or all as one.

    Args:
        weights: the learned ones; until they are known, all members weigh the same.
    """
    if not isinstance(plan, TeacherPlan) or plan.ensemble is None:
        return Teacher(members[0].model, task)
    weighting: Any = plan.weighting
    if weighting == "learned":
        if not isinstance(task, Classification):
            raise PreflightError(
                "teacher.weighting is learned, from the probabilities of classes, and the task "
                "has none; choose mean, or a number for each member"
            )
        weighting = "mean" if weights is None else weights
    models = [member.model for member in members]
    return Ensemble(models, task, weighting=weighting, temperature=plan.temperature)


def taught_task(plan: Any) -> Task | None:
    """The task that a loaded teacher was saved with; None where it is of other classes."""
    if not isinstance(plan, TeacherPlan):
        return None
    if plan.ensemble is not None:
        return next((task for each in plan.ensemble if (task := taught_task(each))), None)
    other = plan.projects or plan.is_onnx or plan.model is not None
    if plan.load is None or other or is_foreign(plan.load):
        return None
    described = read_extra(plan.load).get("task")
    return None if described is None else restore(described)


def judged_by(members: Sequence[Member], parts: Parts, task: Task, device: str) -> Parts:
    """Texts without labels, judged by what the teacher says of them.

    Raises:
        PreflightError: the teacher is none that knows already.
    """
    if len(members) != 1 or members[0].training is not None:
        raise PreflightError(
            f"{parts.test.name}: has no labels, so embeddings are judged by those of the teacher, "
            "and it must be one that knows already; give teacher: {load: FOLDER}"
        )
    model = members[0].model
    return told_by(parts, lambda part: collect(model, part, task, device=device)["embedding"])


def made_model(
    make: Callable[..., nn.Module], data: Source, task: Task, teacher: nn.Module | None = None
) -> nn.Module:
    """Build a model for the data; by a verb such as `shrink`, make it from the *teacher*."""
    options = make.keywords if isinstance(make, partial) else {}
    function = make.func if isinstance(make, partial) else make
    if changes(make):
        if teacher is None:
            raise PreflightError(
                f"{function.__name__} makes a student from the one teacher that a recipe builds, "
                "trains or loads; here there are several or none: name a family of models"
            )
        return changed(teacher, make, data, task, "student")
    if not inspect.signature(function).parameters:
        return function()  # student=lambda: MyNet()
    width = task.width
    if isinstance(task, SentenceEmbedding):  # whose models have widths of their own
        width = data.outputs or 1
    return build(function, data=data, outputs=width, **options)


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose random start is a function of *seed*; the caller's state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def lost_by(model: nn.Module) -> list[str]:
    """What the functions that a model is made of know and do not tell, a sentence each."""
    parts = [part for part in model.modules() if isinstance(part, Function)]
    return [part.lost for part in parts if part.lost is not None]


def kind(model: nn.Module) -> str:
    """What a model is called: its family, or its class."""
    inner = getattr(model, "model", None)
    if "attar_build" not in vars(model) and isinstance(inner, nn.Module):
        return kind(inner)
    return str(getattr(model, "attar_build", {}).get("family", model._get_name()))


def _member(
    plan: TeacherPlan, folder: str, seed: int, parts: Parts, task: Task, common: Mapping[str, Any]
) -> Member:
    model = seeded(seed, partial(_model, plan, parts, task))
    training = None
    if plan.train is not None:
        own = plan.train.keywords if isinstance(plan.train, partial) else {}
        training = {"label_weight": 1.0, "seed": seed, **common, **own}
    return Member(_fitted(plan, model, parts, task), folder, seed, training, plan.load)


def _model(plan: TeacherPlan, parts: Parts, task: Task) -> nn.Module:
    if isinstance(task, _TEXTS):
        _check_plain(plan, task)
    if plan.model is not None:
        model = made_model(plan.model, parts.student, task)
        if plan.load is not None:
            load_weights(model, plan.load)
        return model
    assert plan.load is not None
    if plan.is_onnx:
        if isinstance(task, ClassTask) and isinstance(plan.classes, list):
            task = replace(task, classes=len(plan.classes))
        return from_onnx(plan.load, task, gives=plan.gives or "logits")
    if taught := taught_task(plan):
        _check_taught(taught, parts.labelled)
    if not is_foreign(plan.load):
        return load(plan.load)
    if isinstance(task, LanguageModelling):
        trained = partial(pretrained_language_model, path=plan.load)
        return build(trained, data=parts.student, outputs=task.width)
    if isinstance(task, TextClassification):
        kept = partial(pretrained_text_classifier, path=plan.load, head="keep")
        return build(kept, data=parts.student, outputs=task.width)
    if isinstance(task, SentenceEmbedding):
        return build(
            partial(pretrained_text_encoder, path=plan.load), data=parts.student, outputs=1
        )
    shape = parts.student.shape
    if plan.size is not None:
        shape = (shape[0], plan.size, plan.size)
    elif not plan.projects:
        keep = partial(pretrained, path=plan.load, head="keep")
        return build(keep, data=parts.student, outputs=task.width)
    width = len(own_classes(plan.load)) if plan.projects else task.width
    return pretrained(shape, width or 0, path=plan.load, head="keep")


def _check_plain(plan: TeacherPlan, task: Task) -> None:
    """What makes a teacher of other images or classes fit does not know of tokens and padding."""
    of = "the data's classes" if isinstance(task, ClassTask) else "the data's tokens"
    for name in ("project", "classes", "size"):
        if getattr(plan, name):
            raise PreflightError(
                f"teacher.{name} is for teachers of images and tables, and the task "
                f"{shown(type(task).__name__)} reads tokens; leave it out, and give a teacher that "
                f"was trained for {of}"
            )


def _check_taught(taught: Task, labelled: Source) -> None:
    """The teacher's classes must be the student's, in the same order."""
    try:
        taught.fitted(labelled)
    except DataError as error:
        raise DataError(
            f"the teacher cannot teach these classes as it is: {error}; if it is meant to know "
            "others, add project: true to the teacher"
        ) from None


def _check_units(plan: TeacherPlan, task: Task) -> None:
    """Numbers in different units have no mean."""
    taught = taught_task(plan)
    if isinstance(taught, Regression) and taught.describe() != task.describe():
        raise PreflightError(
            f"{plan.load}: gives numbers in other units (mean and deviation of its training "
            "targets) than the first; train them on the same rows"
        )


def _fitted(plan: TeacherPlan, model: nn.Module, parts: Parts, task: Task) -> nn.Module:
    """The teacher as one of this task's classes and inputs, where it has others."""
    if not plan.projects and plan.size is None:
        return model
    assert plan.load is not None
    if plan.projects and not isinstance(task, Classification):
        raise PreflightError("a teacher's classes are projected onto classes; the task has none")
    if plan.project:
        assert isinstance(task, Classification)
        return project(model, parts.labelled, task)
    if isinstance(plan.classes, dict):
        assert isinstance(task, Classification)
        return renamed(model, _own_classes(plan.load), task, plan.classes)
    return adapted(model, task, classes=plan.classes, size=plan.size)


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
