"""A training and a test part, and how one source becomes two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from attar.data.draw import hashed, key_of
from attar.data.source import Source, Subset
from attar.runtime import DataError, UsageError


class Splits(NamedTuple):
    """What a reader gives: the rows to learn from and the rows to be judged on."""

    train: Source
    test: Source


class ThreeSplits(Splits):
    """What a reader gives where the data bring a validation part: (train, validation, test)."""

    def __new__(cls, train: Source, validation: Source, test: Source) -> ThreeSplits:
        return tuple.__new__(cls, (train, validation, test))

    @property
    def validation(self) -> Source:
        """The rows that choose the epoch."""
        return tuple.__getitem__(self, 1)

    @property
    def test(self) -> Source:
        """The rows to be judged on."""
        return tuple.__getitem__(self, 2)


Data = Annotated[Callable[..., Splits], "room:readers"]
"""A reader of this room, ``reader(*, options) -> Splits``."""


def split(source: Source, fraction: float, *, seed: int = 0) -> tuple[Source, Source]:
    """Two disjoint, complete parts of a source: (rest, part), ``part`` with ``fraction`` of it.

    Stratified when the labels are class numbers: a class of n rows gives ``fraction * n`` rows,
    rounded down or up so that the whole part has the size asked for (largest remainders first),
    but never its last row. Any other labels are not looked at: multi-label rows, regression and
    text are split at random, so a label with few examples may come out uneven. Which rows is a
    function of (seed, labels) alone. Both parts keep the source's order and number their rows
    from 0.

    >>> from attar.data import TensorSource
    >>> source = TensorSource(torch.arange(10.0), torch.tensor([0, 1] * 5), classes=2)
    >>> rest, part = split(source, 0.4)
    >>> part.labels.bincount().tolist(), len(rest)
    ([2, 2], 6)

    Raises
    ------
    UsageError
        A fraction outside (0, 1).
    DataError
        A part without rows.
    """
    labels = source.labels
    numbered = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    classes = labels.numpy() if labels is not None and numbered else None
    rest, part = strata(classes, len(source), fraction, seed=seed, name=source.name)
    return _subset(source, rest), _subset(source, part)


def strata(
    classes: NDArray[np.int64] | None, count: int, fraction: float, *, seed: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row numbers of :func:`split`, in order, for the class numbers of ``count`` rows."""
    if not 0 < fraction < 1:
        raise UsageError(f"{name}: the fraction to split off must be in (0, 1), not {fraction}")
    groups = np.zeros(count, np.int64) if classes is None else classes
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    bits = hashed(key_of("split", seed), np.arange(count, dtype=np.int64))
    order = np.lexsort((bits, groups))
    place = np.empty(count, np.int64)
    place[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    taken = place < _quotas(sizes, fraction)[groups]
    if not taken.any():
        raise DataError(
            f"{name}: a part of {fraction} of {count} rows is empty; give more rows or a larger "
            "fraction"
        )
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def consistent(train: Source, test: Source, validation: Source | None = None) -> Splits:
    """The parts as Splits, after a check that one model can read them."""
    if validation is not None:
        _agree(train, validation, "validation")
    _agree(train, test, "test")
    return Splits(train, test) if validation is None else ThreeSplits(train, validation, test)


def _agree(train: Source, other: Source, part: str) -> None:
    for what in ("shape", "classes"):
        first, second = getattr(train, what), getattr(other, what)
        if first != second:
            raise DataError(
                f"{train.name}: {what} {_short(first)} in train but {_short(second)} in {part}; "
                "both must agree"
            )
    if train.labels is not None and other.labels is not None and train.outputs != other.outputs:
        raise DataError(
            f"{train.name}: labels of {train.outputs} columns in train but {other.outputs} in "
            f"{part}; both must agree"
        )


def _quotas(sizes: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    exact = sizes * fraction
    quota = np.floor(exact).astype(np.int64)
    missing = int(np.floor(sizes.sum() * fraction + 0.5) - quota.sum())
    remainder = np.where(quota < sizes - 1, exact - quota, -1.0)
    first = np.argsort(-remainder, kind="stable")[: max(missing, 0)]
    quota[first[remainder[first] > 0]] += 1
    return quota


def _subset(source: Source, ids: NDArray[np.int64]) -> Source:
    return Subset(source, torch.from_numpy(ids))


def _short(value: Any) -> str:
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 80 else f"{text[:76]}...]"
