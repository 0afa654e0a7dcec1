"""What a recipe does to the structure of a model: a plan by its weights and by training rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from attar import compression
from attar.data import Batch, Source
from attar.models.masks import masked
from attar.runtime import UsageError
from attar.tasks import Task
from attar.training import distill, train

ROWS = 256  # what is planned by examples sees so many, from all over the training rows

PLANS: dict[Callable[..., Any], Callable[..., Any]] = {
    compression.shrink: compression.plan_shrink,
    compression.prune: compression.plan_prune,
    compression.factorize: compression.plan_factorize,
    compression.sparsify: compression.plan_sparsify,
    compression.quantize: compression.plan_quantize,
}
# What costs so much that a student should learn after it; whole numbers may come last.
LOSSY = PLANS.keys() - {compression.quantize}
# What makes other tensors of those that masks are on.
FORGETFUL = (compression.shrink, compression.prune, compression.factorize)


def changes(stage: Callable[..., Any]) -> bool:
    """Whether a stage changes the structure of a model, and trains nothing."""
    return _verb(stage) in PLANS


def ending_of(stages: Sequence[Callable[..., Any]]) -> int:
    """The place of the first of the *stages* after which none trains; there may be none there."""
    trainings = [place for place, stage in enumerate(stages) if _verb(stage) in (distill, train)]
    return max(trainings, default=-1) + 1


def notes(stages: Sequence[Callable[..., Any]]) -> list[str]:
    """What a reader must know of the order of the *stages*, a sentence each."""
    first = ending_of(stages)
    lossy = [
        f"{_verb(stage).__name__} (stage {place})"
        for place, stage in enumerate(stages[first:], first)
        if _verb(stage) in LOSSY
    ]
    if not lossy:
        return []
    return [
        f"Nothing is trained after {' and '.join(lossy)}: what it cost stays lost; put a distill "
        "stage after it."
    ]


def changed(
    model: nn.Module, stage: Callable[..., Any], rows: Source, task: Task, where: str
) -> nn.Module:
    """A changed copy of *model*, which keeps its plan (`made_from`).

    Args:
        stage: a verb of `attar.compression` with its options.
        rows: training rows, labelled where there are labels.
        where: what of the recipe asks for it, in words.

    Errors: what the plan of the verb refuses (UsageError), which begins with *where* and the name
    of the verb.
    """
    function = _verb(stage)
    try:
        if function in FORGETFUL and masked(model):
            raise UsageError(
                "the zeros that sparsify keeps would not stay zero; put the sparsify stage after "
                "this one"
            )
        return _made(model, stage, rows, task)
    except UsageError as error:
        name = function.__name__
        said = str(error).removeprefix(f"{name}: ")
        raise UsageError(f"{where} ({name}): {said}") from error


def _made(model: nn.Module, stage: Callable[..., Any], rows: Source, task: Task) -> nn.Module:
    function = _verb(stage)
    options = stage.keywords if isinstance(stage, partial) else {}
    known = inspect.signature(PLANS[function]).parameters
    given: dict[str, Callable[[], Any]] = {
        "task": lambda: task,
        "data": lambda: rows,
        "seed": torch.initial_seed,  # `seeded` stands around: as other models of this seed start
        "example": lambda: _examples(rows),
    }
    told = {name: value() for name, value in given.items() if name in known}
    plan = PLANS[function](model, **{**told, **options})
    made: nn.Module = plan.apply(model)
    made.attar_plan = plan
    return made


def made_from(model: nn.Module) -> dict[str, Any]:
    """The plan by which a model was made from another, as JSON; empty where it was not."""
    plan = vars(model).get("attar_plan")
    return {} if plan is None else {"made": plan.describe() | {"told": plan.told()}}


def _examples(rows: Source) -> Batch:
    return rows.rows(compression.common.spread(ROWS, rows))


def _verb(stage: Callable[..., Any]) -> Callable[..., Any]:
    return stage.func if isinstance(stage, partial) else stage
