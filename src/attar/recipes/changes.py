"""What a recipe does to the structure of a model: a plan by its weights and by training rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from attar import compression
from attar.data import Batch, Source
from attar.runtime import UsageError
from attar.tasks import Task

ROWS = 256  # what is planned by examples sees so many, from all over the training rows

PLANS: dict[Callable[..., Any], Callable[..., Any]] = {
    compression.shrink: compression.plan_shrink,
    compression.prune: compression.plan_prune,
    compression.factorize: compression.plan_factorize,
    compression.sparsify: compression.plan_sparsify,
    compression.quantize: compression.plan_quantize,
}


def changes(stage: Callable[..., Any]) -> bool:
    """Whether a stage changes the structure of a model, and trains nothing."""
    return _verb(stage) in PLANS


def changed(model: nn.Module, stage: Callable[..., Any], rows: Source, task: Task) -> nn.Module:
    """A changed copy of *model*, which keeps its plan (`made_from`).

    Args:
        stage: a verb of `attar.compression` with its options.
        rows: training rows, labelled where there are labels.

    Errors: what the plan of the verb refuses (UsageError), with the verb's name.
    """
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
    try:
        plan = PLANS[function](model, **{**told, **options})
    except UsageError as error:
        name = function.__name__
        said = str(error)
        raise UsageError(said if said.startswith(name) else f"{name}: {said}") from error
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
