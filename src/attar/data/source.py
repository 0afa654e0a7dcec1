"""Where rows come from: the Source, its tensors, its data sets and its subsets."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attar.data.checks import Array, as_floats, class_names, input_array, label_array
from attar.data.draw import permutation
from attar.data.reading import check_part, read
from attar.data.types import Augmentation, Batch
from attar.runtime import UsageError

_STATISTICS_ROWS = 10_000
_FINGERPRINT_ROWS = 1_024
_CHUNK = 256

VIEW_SEED = 0  # of the views that are the same for every seed


class Source(ABC):
    """Rows with ids 0 to N-1, in batches.

    A source of one's own sets the attributes and writes ``__len__``, ``rows`` and ``labels``.

    Attributes
    ----------
    name:
        What messages and reports call it.
    classes:
        The names of the classes, in order; None for regression or when unknown.
    shape:
        The shape of one input, images channels first.
    vocabulary:
        How many token ids there are, for text; None for anything else.
    workers:
        How many processes read ahead in ``epoch`` and ``batches``; 0 reads where it is asked.
        The batches are the same.
    """

    name: str
    classes: tuple[str, ...] | None
    shape: tuple[int, ...]
    vocabulary: int | None = None
    workers: int = 0
    _fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def labels(self) -> Tensor | None:
        """All labels, int64 [N] or float32 [N, K]; None when there are none.

        Floats beside ``classes`` are multi-label: 1 in the column of each class that holds.
        """

    @abstractmethod
    def rows(self, ids: Tensor) -> Batch:
        """The rows ``ids`` (int64 [n] on the CPU) in that order, nothing random."""

    @property
    def outputs(self) -> int | None:
        """How many numbers a model must give: the classes, or the columns of the labels."""
        if self.classes is not None:
            return len(self.classes)
        labels = self.labels
        return labels.shape[1] if labels is not None and labels.is_floating_point() else None

    def epoch(
        self,
        number: int,
        *,
        batch_size: int,
        seed: int,
        augment: Sequence[Augmentation] = (),
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        views: int | None = None,
        block: int | None = None,
    ) -> Iterator[Batch]:
        """One pass over all rows, shuffled and augmented.

        The order is a function of (seed, number) and the pixels of a row of (seed, number, id):
        neither depends on the batch size, on ``start``, on ``part`` or on ``workers``.

        Parameters
        ----------
        number:
            The epoch, from 0.
        batch_size:
            Rows a batch, of all processes together; the last batch may be short.
        augment:
            Augmentations in order, each ``augmentation(batch, draw) -> batch``.
        start:
            How many batches to skip; their rows are not read.
        part:
            ``(rank, world)``: this process is number ``rank`` of ``world`` and reads only its
            share of each batch, rows ``rank * n // world`` to ``(rank + 1) * n // world`` of n.
            Where that is no row, it gets the whole batch, with a scalar 1 named ``idle``; such a
            batch must not count, and only keeps step with the others.
        views:
            How many augmented versions of each row there are; new ones in every epoch when left
            out. The pixels are then of (number mod views, id) alone, whatever the seed, and each
            batch has ``view``, an int64 scalar: a teacher can be asked once for each version.
        block:
            Rows in a block of a shuffle by blocks, for rows that do not fit in memory: see
            ``attar.data.draw.permutation``. All rows at once when left out.
        """
        _at_least(0, number=number, start=start)
        _at_least(1, batch_size=batch_size)
        _at_least(1, **{k: v for k, v in {"views": views, "block": block}.items() if v is not None})
        check_part(part)
        if start > -(-len(self) // batch_size):
            raise UsageError(
                f"{self.name}: start={start} is past the last of the "
                f"{-(-len(self) // batch_size)} batches of {batch_size}; resume with the batch "
                "size of the interrupted epoch"
            )
        order = permutation(len(self), seed=seed, number=number, block=block)
        pixels = (seed, number) if views is None else (VIEW_SEED, number % views)
        batches = read(
            self, order, batch_size, part, start=start, augment=tuple(augment), pixels=pixels
        )
        return batches if views is None else map(partial(_of_view, pixels[1]), batches)

    def batches(self, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """All rows in order of id, nothing random; the last batch may be short.

        ``part`` is as for ``epoch``.
        """
        _at_least(1, batch_size=batch_size)
        check_part(part)
        order = np.arange(len(self), dtype=np.int64)
        return read(self, order, batch_size, part)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the inputs along the first dimension of ``shape``.

        That is a value for each channel of an image and for each column of a table, from at most
        10,000 rows at a fixed stride, in float64. Where nothing varies the deviation is given
        as 1, so that dividing by it is safe.
        """
        shift: Tensor | None = None
        total = square = torch.zeros(self.shape[0], dtype=torch.float64)
        count = 0
        for batch in self._sampled(_STATISTICS_ROWS):
            values = batch["inputs"].double().transpose(0, 1).flatten(1)
            # Differences from one value: a constant is exactly 0, and large means cost no digits.
            shift = values[:, :1] if shift is None else shift
            values = values - shift
            total = total + values.sum(1)
            square = square + values.square().sum(1)
            count += values.shape[1]
        assert shift is not None, "no source is empty"
        variance = square / count - (total / count).square()
        deviation = torch.where(variance > 0, variance.sqrt(), 1.0)
        return (shift[:, 0] + total / count).tolist(), deviation.tolist()

    def fingerprint(self) -> str:
        """SHA-256 of the length, the class names, the forms and at most 1,024 rows.

        The rows stand at a fixed stride, so a change between them is not seen. Two sources with
        the same content have the same fingerprint, whatever they are called and kept in. A
        source is asked for its rows once and then remembers, so it must not change.
        """
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        facts: dict[str, object] = {"length": len(self), "classes": self.classes}
        digest = hashlib.sha256()
        for batch in self._sampled(_FINGERPRINT_ROWS):
            for key in sorted(batch.keys() & {"inputs", "labels"}):
                facts[key] = f"{batch[key].dtype} {list(batch[key].shape[1:])}"
                digest.update(batch[key].contiguous().numpy().tobytes())
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()

    def _sampled(self, most: int) -> Iterator[Batch]:
        """At most so many rows at a fixed stride, read ahead like an epoch."""
        return read(self, self._sample(most).numpy(), _CHUNK, (0, 1))

    def _sample(self, most: int) -> Tensor:
        return torch.arange(0, len(self), -(-len(self) // most))


class TensorSource(Source):
    """Rows of tensors that fit in memory, batched by indexing.

    Parameters
    ----------
    inputs:
        Torch tensor or numpy array [N, ...]. Images are channels first; [N, H, W] gets a channel
        and [N] a column. Images of uint8 stay so in memory and become float32 / 255 in ``rows``;
        all other numbers become float32 and are taken as they are. Not copied where that is
        possible, so do not write to them afterwards.
    labels:
        Integers [N] for classes, floats [N] or [N, K] for regression, None for none. With
        ``classes``, [N, C] of any dtype are multi-label: 1 for each class that holds, else 0.
    classes:
        The names of the classes, or their number.

    Raises
    ------
    DataError
        An empty data set, lengths that differ, a label that is no class number, floats given for
        classes, a multi-label row with another number than 0 and 1, a NaN or an infinity; with
        the row.
    """

    def __init__(
        self,
        inputs: Tensor | Array,
        labels: Tensor | Array | None = None,
        *,
        classes: Sequence[str] | int | None = None,
        name: str = "tensors",
    ) -> None:
        self.name = name
        self.classes = class_names(classes, name)
        self._inputs = input_array(inputs, name)
        self.shape = tuple(self._inputs.shape[1:])
        self._labels: Array | None = None
        if labels is not None:
            found = label_array(labels, len(self._inputs), self.classes, name)
            self._labels = np.require(found, requirements="W")  # torch wants what it may write

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def labels(self) -> Tensor | None:
        return None if self._labels is None else torch.from_numpy(self._labels)

    def rows(self, ids: Tensor) -> Batch:
        picked = row_numbers(self, ids)
        batch = {"inputs": as_floats(self._inputs.take(picked, 0)), "ids": ids}
        if self._labels is not None:
            batch["labels"] = torch.from_numpy(self._labels.take(picked, 0))
        return batch


class Subset(Source):
    """Some rows of another source, numbered from 0: row i is row ``ids[i]`` of it."""

    def __init__(self, source: Source, ids: Tensor, *, name: str | None = None) -> None:
        self.name = name or source.name
        self.classes = source.classes
        self.shape = source.shape
        self.vocabulary = source.vocabulary
        self.workers = source.workers
        self._source = source
        row_numbers(source, ids)
        if not len(ids):
            raise UsageError(f"{self.name}: a subset needs at least one row")
        self._ids = ids.clone()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def labels(self) -> Tensor | None:
        labels = self._source.labels
        return None if labels is None else labels[self._ids]

    @property
    def outputs(self) -> int | None:
        """Those of the other source."""
        return self._source.outputs

    def rows(self, ids: Tensor) -> Batch:
        picked = self._ids.numpy().take(row_numbers(self, ids))
        return {**self._source.rows(torch.from_numpy(picked)), "ids": ids}


def row_numbers(source: Source, ids: Tensor) -> Array:
    """``ids`` as a numpy array, after a check that they are rows of ``source``."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise UsageError(
            f"{source.name}: ids must be int64 [n], not {ids.dtype} {list(ids.shape)}; "
            "use mask.nonzero()[:, 0] for a mask"
        )
    picked: Array = ids.numpy()
    # Seen as unsigned, a negative id is past the end too: one pass instead of two.
    if picked.size and picked.view(np.uint64).max() >= len(source):
        wrong = picked[picked.view(np.uint64) >= len(source)][0]
        raise UsageError(
            f"{source.name}: there is no row {wrong}; ids go from 0 to {len(source) - 1}"
        )
    return picked


def _of_view(view: int, batch: Batch) -> Batch:
    return {**batch, "view": torch.tensor(view)}


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}")
