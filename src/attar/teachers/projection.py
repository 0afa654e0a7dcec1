"""A teacher of other classes or of other inputs, made to answer for the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.runtime import UsageError, eval_mode, suggest
from attar.tasks import Task
from attar.tasks.classification import Classification

BATCH = 256
PRIOR = 1e-3  # examples of every class that each class of the teacher is taken to have seen


class Carried(nn.Module):
    """A classifier whose answers are carried over to other classes, and whose inputs are fitted.

    ``p(y | x) = sum_z table[z, y] p(z | x)``, given as logits [N, C]: its logarithm. Images of
    another size or with other channels than the model was built for are fitted to it: resized
    (bilinear, antialiased), one channel repeated, several averaged to one.

    Args:
        model: gives logits [N, Z].
        table: ``p(y | z)``, [Z, C], rows that sum to 1; a row of zeros leaves its class out, and
            the rest of the model's answer is taken for the whole. A column of zeros is a class
            that the model does not know: it gets next to no probability. None gives what the
            model gives.
        shape: [C, H, W] of the images that the model reads, C None for any; None takes them as
            they are.
        transform: called on the inputs, after they are fitted.
    """

    table: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        table: Tensor | None = None,
        *,
        shape: Sequence[int | None] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.shape = None if shape is None else tuple(shape)
        self.transform = transform
        self.register_buffer("table", table)

    @property
    def known(self) -> Tensor | None:
        """Which of the student's classes it can answer, bool [C]; None for all."""
        return None if self.table is None else self.table.sum(0) > 0

    def forward(self, inputs: Tensor) -> Any:
        inputs = fitted(inputs, self.shape)
        if self.transform is not None:
            inputs = self.transform(inputs)
        out = self.model(inputs)
        if self.table is None:
            return out
        logits = _logits(out).float()
        if logits.shape[1] != len(self.table):
            raise UsageError(
                f"the teacher has {logits.shape[1]} classes, but {len(self.table)} are named; "
                "name one for each of its outputs, in order"
            )
        told = self.table.sum(1) > 0
        chances = F.log_softmax(logits[:, told], 1)
        # exp(chance - top) is 1 somewhere, so the sum is never smaller than its table entry.
        top = chances.amax(1, keepdim=True)
        return ((chances - top).exp() @ self.table[told]).clamp_min(1e-30).log() + top


def adapted(
    model: nn.Module,
    task: Task,
    *,
    classes: Sequence[str | int | None] | None = None,
    size: int | tuple[int, int] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Carried:
    """A teacher that reads other inputs than the student, or knows only some of its classes.

    Its parts are addressed below ``model``: ``feature:model.stage3``.

    Args:
        classes: the student's class, by name or by number, that each output of the model stands
            for, in order; None for an output that is none of them, which is left out.
        size: height and width of the images that it reads, which are resized to it (bilinear,
            antialiased); what ``attar.models.build`` noted, when left out.
        transform: called on the inputs [N, ...] after that, such as a normalisation of its own.

    Errors: a class that is not there or stands twice, fewer than two classes (UsageError).

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.ImageClassification(classes=("cat", "cow", "dog"))
        >>> pets = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> adapted(pets, task, classes=("dog", "cat"), size=4)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 3])
    """
    shape: Sequence[int | None] | None = shape_of(model)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (shape[0] if shape else None, height, width)
    table = None if classes is None else _table(classes, task)
    return Carried(model, table, shape=shape, transform=transform)


def _table(classes: Sequence[str | int | None], task: Task) -> Tensor:
    if not isinstance(task, Classification) or task.width is None:
        raise UsageError(
            "classes: the task must be a classification that knows its classes; take "
            "task.fitted(train)"
        )
    ours = task.names()
    numbers = [None if name is None else _number(name, ours) for name in classes]
    for name, number in zip(classes, numbers, strict=True):
        if number is not None and numbers.count(number) > 1:
            raise UsageError(f"classes: '{name}' stands twice; name each class once")
    if len(numbers) - numbers.count(None) < 2:
        raise UsageError("classes: a teacher must know at least two of the student's classes")
    table = torch.zeros(len(numbers), len(ours))
    for row, number in enumerate(numbers):
        if number is not None:
            table[row, number] = 1.0
    return table


def _number(name: str | int, ours: Sequence[str]) -> int:
    if name in ours:
        return ours.index(name)
    if isinstance(name, int) and 0 <= name < len(ours):
        return name
    raise UsageError(
        f"classes: the task has no class '{name}'; {suggest(str(name), ours)}, or None for an "
        "output that is none of them"
    )


def project(
    model: nn.Module, data: Any, task: Classification, *, shape: Sequence[int] | None = None
) -> Carried:
    """Learn from labelled *data* which of the student's classes each class of *model* stands for.

    The empirical predictor of LEEP (arXiv:2002.12462, eq. 1 and 2): ``p(y | z)`` is the mean
    answer ``p(z | x)`` on the examples with label y, made a distribution over y. Nothing is
    trained, the model may be of any domain, and only its answers are asked for.

    Args:
        model: gives logits [N, Z], in eval mode or not; left as it was found.
        data: a source with labels: the training split, never the one to be judged on.
        task: the student's.
        shape: as in ``Carried``; what ``attar.models.build`` noted, when left out.
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
    return Carried(model, (table / table.sum(1, keepdim=True)).float(), shape=shape)


def renamed(
    model: nn.Module,
    known: Sequence[str],
    task: Classification,
    classes: Mapping[str, Sequence[str]],
    *,
    shape: Sequence[int] | None = None,
) -> Carried:
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
    return Carried(model, table, shape=shape_of(model) if shape is None else shape)


def fitted(images: Tensor, shape: Sequence[int | None] | None) -> Tensor:
    """Images [N, C, H, W] as a model reads them that was built for *shape*; others untouched."""
    if shape is None or len(shape) != 3 or images.ndim != 4:
        return images
    channels, size = shape[0], [int(side or 0) for side in shape[1:]]
    if list(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    if channels is None or images.shape[1] == channels:
        return images
    return images.mean(1, keepdim=True).expand(-1, channels, -1, -1)


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
