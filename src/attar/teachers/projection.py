"""A teacher of other classes: what it says of its own, said of the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.runtime import UsageError, eval_mode, suggest
from attar.tasks.classification import Classification

BATCH = 256
PRIOR = 1e-3  # examples of every class that each class of the teacher is taken to have seen


class Projected(nn.Module):
    """A classifier whose answers are carried over to other classes.

    ``p(y | x) = sum_z table[z, y] p(z | x)``, given as logits [N, C]: its logarithm. Images of
    another size or with other channels than the model was built for are fitted to it: resized
    (bilinear, antialiased), one channel repeated, several averaged to one.

    Args:
        model: gives logits [N, Z].
        table: ``p(y | z)``, [Z, C], rows that sum to 1; a row of zeros leaves its class out, and
            the rest of the model's answer is taken for the whole.
        shape: [C, H, W] of the images that the model reads; None takes them as they are.
    """

    table: Tensor

    def __init__(
        self, model: nn.Module, table: Tensor, *, shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.shape = None if shape is None else tuple(shape)
        self.register_buffer("table", table)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = _logits(self.model(fitted(inputs, self.shape))).float()
        known = self.table.sum(1) > 0
        chances = F.log_softmax(logits[:, known], 1)
        # exp(chance - top) is 1 somewhere, so the sum is never smaller than its table entry.
        top = chances.amax(1, keepdim=True)
        return ((chances - top).exp() @ self.table[known]).clamp_min(1e-30).log() + top


def project(
    model: nn.Module, data: Any, task: Classification, *, shape: Sequence[int] | None = None
) -> Projected:
    """Learn from labelled *data* which of the student's classes each class of *model* stands for.

    The empirical predictor of LEEP (arXiv:2002.12462, eq. 1 and 2): ``p(y | z)`` is the mean
    answer ``p(z | x)`` on the examples with label y, made a distribution over y. Nothing is
    trained, the model may be of any domain, and only its answers are asked for.

    Args:
        model: gives logits [N, Z], in eval mode or not; left as it was found.
        data: a source with labels: the training split, never the one to be judged on.
        task: the student's.
        shape: as in ``Projected``; what ``attar.models.build`` noted, when left out.
    """
    if data.labels is None:
        raise UsageError(
            f"{data.name}: has no labels to project the teacher's classes onto; name them: "
            "classes: {CLASS: [CLASSES OF THE TEACHER]}"
        )
    shape = shape_of(model) if shape is None else shape
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with eval_mode(model), torch.no_grad():
        joint = torch.zeros(0)
        for ids in torch.arange(len(data)).split(BATCH):
            batch = data.rows(ids)
            said = _logits(model(fitted(batch["inputs"].to(device), shape))).double()
            part = F.one_hot(batch["labels"], task.width or 0).double().T @ said.softmax(1).cpu()
            joint = part if not len(joint) else joint + part
    table = joint.T + PRIOR
    return Projected(model, (table / table.sum(1, keepdim=True)).float(), shape=shape)


def renamed(
    model: nn.Module,
    known: Sequence[str],
    task: Classification,
    classes: Mapping[str, Sequence[str]],
    *,
    shape: Sequence[int] | None = None,
) -> Projected:
    """Carry classes over by name: each class of the student is the sum of some of the teacher's.

    Args:
        known: names of the model's classes, in order.
        classes: for each class of *task* the names of those of the model; what is not named is
            left out of its answer.

    Errors: a name that is not there, a class of the task without any, a class used twice
    (UsageError).
    """
    ours = task.names()
    table = torch.zeros(len(known), len(ours))
    for name, theirs in classes.items():
        if name not in ours:
            raise UsageError(f"classes: the data have no class '{name}'; {suggest(name, ours)}")
        for other in theirs:
            if other not in known:
                raise UsageError(
                    f"classes: the teacher has no class '{other}'; {suggest(other, known)}"
                )
            if table[known.index(other)].any():
                raise UsageError(f"classes: the teacher's '{other}' stands twice; name it once")
            table[known.index(other), ours.index(name)] = 1.0
    if absent := [name for name in ours if not classes.get(name)]:
        raise UsageError(
            f"classes: '{absent[0]}' has no class of the teacher; name at least one, or learn the "
            "projection from the labels: project: true"
        )
    return Projected(model, table, shape=shape_of(model) if shape is None else shape)


def fitted(images: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Images [N, C, H, W] as a model reads them that was built for *shape*; others untouched."""
    if shape is None or len(shape) != 3 or images.ndim != 4:
        return images
    if images.shape[2:] != tuple(shape[1:]):
        images = F.interpolate(images, list(shape[1:]), mode="bilinear", antialias=True)
    if images.shape[1] == shape[0]:
        return images
    return images.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)


def shape_of(model: nn.Module) -> list[int] | None:
    """The input shape that a model was built for, where it says so."""
    built: dict[str, Any] = getattr(model, "attar_build", {})
    return built.get("options", {}).get("shape")


def _logits(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None or found.ndim != 2:
        raise UsageError(
            f"the teacher gives a {type(out).__name__}, and what is projected are logits [N, Z]"
        )
    return found
