"""Models of one architecture as one: averages of their weights, and batch statistics to fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import nn

from attar.compression.common import spread
from attar.models.state import shape_differences, shapes_of
from attar.runtime import UsageError, to_device

Weight = Annotated[float, Ge(0), Le(1)]
BATCH = 128


@torch.no_grad()
def soup(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """The average of the weights of several models of one architecture (arXiv:2203.05482).

    What is averaged are parameters and buffers of floating point, in float32 or wider; others are
    the first model's. Batch statistics are averaged with them, which is seldom what the averaged
    net needs: call `reestimate_batch_norm` afterwards.

    Args:
        models: fine-tuned from one start, as a rule; they are left as they are.
        weights: a share of each, which add up to 1; equal ones when left out.

    Errors: no model, other names or shapes, shares that do not add up to 1 (UsageError).

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = a.weight.data.fill_(1.0), b.weight.data.fill_(3.0)
    >>> soup([a, b], [0.75, 0.25]).weight.item()
    1.5
    """
    if not models:
        raise UsageError("soup: give at least one model")
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(
            f"soup: weights must be {len(models)} numbers that add up to 1, not {shares}"
        )
    first = shapes_of(models[0].state_dict())
    for number, model in enumerate(models[1:], start=1):
        if different := shape_differences(shapes_of(model.state_dict()), first):
            raise UsageError(
                f"soup: model {number} is of another architecture than the first: {different}"
            )
    made = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            parts = (
                share * state[name].to(tensor.device, wide)
                for share, state in zip(shares, states, strict=True)
            )
            tensor.copy_(sum(parts, torch.zeros((), dtype=wide, device=tensor.device)))
    return made


def interpolate(student: nn.Module, teacher: nn.Module, weight: Weight = 0.5) -> nn.Module:
    """(1 - *weight*) of the student's weights and *weight* of the teacher's, as one model.

    Between a fine-tuned model and what it came from this often keeps more of both than either
    (arXiv:2109.01903). Errors: as of `soup`.
    """
    return soup([student, teacher], [1 - weight, weight])


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, data: Any, task: Any, rows: int = 2048) -> nn.Module:
    """A copy whose batch statistics are those of *data*: plain means over its batches.

    After weights were taken from elsewhere, averaged, pruned or rounded, what goes through a batch
    norm is no longer what its statistics tell. Without batch norms it is a plain copy.

    Args:
        data: training examples; labels are not looked at.
        task: runs the model.
        rows: how many examples, from all over the data.
    """
    made = copy.deepcopy(model)
    norms = [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return made
    made.eval()  # dropout and the like rest
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    place = next(made.parameters()).device
    for ids in spread(rows, data).split(BATCH):
        if len(ids) > 1:
            task.forward(made, to_device(data.rows(ids), place))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return made.train(model.training)
