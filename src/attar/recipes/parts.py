"""Which rows each arm of a recipe learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data import Batch, Source, Subset, split
from attar.data.splits import strata
from attar.runtime import PreflightError

if TYPE_CHECKING:
    from attar.recipes.recipe import Recipe

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """The rows of a job, by who is given them.

    Attributes:
        student: to the student that is taught, in a stage that asks the teacher.
        alone: to the baseline in the same stage; as many rows an epoch, so as many steps.
        labelled: to both in a stage on labels alone.
        teacher: to a teacher that is trained here.
        validation: chooses epochs.
        test: only reports.
    """

    student: Source
    alone: Source
    labelled: Source
    teacher: Source
    validation: Source
    test: Source


class Unlabelled(Source):
    """The rows of another source without their labels."""

    def __init__(self, source: Source) -> None:
        self.name, self.classes, self.shape = source.name, source.classes, source.shape
        self.workers, self.vocabulary = source.workers, source.vocabulary
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def labels(self) -> Tensor | None:
        return None

    def rows(self, ids: Tensor) -> Batch:
        batch = self._source.rows(ids)
        return {name: value for name, value in batch.items() if name != "labels"}


class Told(Source):
    """The rows of another source with a teacher's embeddings as labels, or of that width alone.

    It has the other's fingerprint: what a teacher says is no part of the data.
    """

    def __init__(self, source: Source, embeddings: Tensor, *, told: bool = True) -> None:
        self.name, self.classes, self.shape = source.name, source.classes, source.shape
        self.workers, self.vocabulary = source.workers, source.vocabulary
        self._source, self._width = source, embeddings.shape[1]
        self._labels = embeddings if told else None

    def __len__(self) -> int:
        return len(self._source)

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    @property
    def outputs(self) -> int:
        """How many numbers an embedding of the teacher has."""
        return self._width

    def rows(self, ids: Tensor) -> Batch:
        batch = self._source.rows(ids)
        return batch if self._labels is None else {**batch, "labels": self._labels[ids]}

    def _digest(self) -> str:
        return self._source.fingerprint()


class Repeated(Subset):
    """A few rows as an epoch of many, over and over, so that both take the same steps.

    Epoch follows epoch in one round after the other: after any number of epochs no row has been
    given more than once oftener than another.
    """

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source, torch.arange(count) % len(source))
        self._few = source

    def epoch(self, number: int, **options: Any) -> Iterator[Batch]:
        """One pass over the next ``len(self)`` rows of the rounds; as ``Source.epoch``."""
        places = torch.arange(number * len(self), (number + 1) * len(self))
        return Subset(self._few, places % len(self._few)).epoch(number, **options)


def parted(splits: Sequence[Source], recipe: Recipe) -> Parts:
    """The rows of each arm.

    Raises:
        PreflightError: ``examples`` or ``labels`` that the data cannot give.
        DataError: a validation part without rows.
    """
    if recipe.labels is not None:
        return _few_labels(splits[0], splits[-1], recipe.labels, recipe)
    whole, validation, test = _three(splits, recipe)
    train = _fewer(whole, recipe)
    return Parts(train, train, train, whole, validation, test)


def told_by(parts: Parts, embed: Callable[[Source], Tensor]) -> Parts:
    """Texts without labels, judged by the embeddings [N, D] that a teacher gives them."""
    validation, test = (Told(part, embed(part)) for part in (parts.validation, parts.test))
    assert test.labels is not None
    student = Told(parts.student, test.labels, told=False)
    return replace(parts, student=student, validation=validation, test=test)


def _three(splits: Sequence[Source], recipe: Recipe) -> tuple[Source, Source, Source]:
    """Training, validation and test; the validation is carved by seed where none is given."""
    if len(splits) == 3:
        return splits[0], splits[1], splits[2]
    train, test = splits
    if train.labels is not None or test.labels is None:
        return *split(train, recipe.validation, seed=recipe.seed), test
    # Unlabelled training data cannot choose an epoch, so part of the labelled test data does.
    rest, part = split(test, recipe.validation, seed=recipe.seed)
    return train, part, rest


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


def _few_labels(train: Source, test: Source, wanted: int, recipe: Recipe) -> Parts:
    """All rows for the student, the labels of a few for everyone else.

    The validation rows are some of the few: who has so many labels has no others.
    """
    classes = _classes(train, wanted)
    told: dict[str, Any] = {"seed": recipe.seed, "name": train.name}
    _, few = strata(classes, len(train), wanted / len(train), **told)
    some = None if classes is None else classes[few]
    learned, held = strata(some, len(few), recipe.validation, **told)
    if classes is not None:
        _check_classes(train, classes, few[learned], wanted)
    labelled = _subset(train, few[learned])
    rest = Unlabelled(_subset(train, np.delete(np.arange(len(train)), few[held])))
    return Parts(
        student=rest,
        alone=Repeated(labelled, len(rest)),
        labelled=labelled,
        teacher=labelled,
        validation=_subset(train, few[held]),
        test=test,
    )


def _classes(train: Source, wanted: int) -> Ids | None:
    """The class of each row, None where labels are no classes; refuses impossible numbers."""
    labels, there = train.labels, len(train)
    if labels is None:
        raise PreflightError(
            f"labels is {wanted:,}, but {train.name} has none at all; leave labels out, and load a "
            "teacher that is trained already"
        )
    if wanted >= there:
        raise PreflightError(
            f"labels is {wanted:,}, but it must be less than the {there:,} training rows of "
            f"{train.name}; leave labels out to use all of theirs"
        )
    if labels.is_floating_point():
        return None
    if labels.ndim != 1:
        raise PreflightError(
            f"labels is {wanted:,}, but in {train.name} the text is its own label; leave labels "
            "out, or give less of it: examples"
        )
    classes: Ids = labels.numpy()
    if wanted < (least := len(np.unique(classes))):
        raise PreflightError(
            f"labels is {wanted:,}, but {train.name} has {least:,} classes, and each needs "
            f"labelled rows; give {10 * least:,} or more"
        )
    return classes


def _check_classes(train: Source, classes: Ids, learned: Ids, wanted: int) -> None:
    """Every class of the rows must be among the few."""
    lost = np.setdiff1d(classes, classes[learned])
    if len(lost):
        number = int(lost[0])
        name = train.classes[number] if train.classes is not None else number
        raise PreflightError(
            f"labels is {wanted:,}, which leaves no labelled row of the class '{name}' of "
            f"{train.name} to learn from; give more labels"
        )


def _subset(source: Source, ids: Ids) -> Source:
    return Subset(source, torch.from_numpy(ids))
