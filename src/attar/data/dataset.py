"""Any map-style data set as a Source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from attar.data.checks import (
    Array,
    as_floats,
    class_names,
    input_array,
    label_array,
    numbers,
)
from attar.data.source import Source, row_numbers
from attar.data.types import Batch
from attar.runtime import AttarError, DataError, UsageError

_CHUNK = 256
_COMPARED = 32


class _Item(NamedTuple):
    input: Array
    label: Array | None

    @property
    def form(self) -> tuple[str, ...]:
        """What all items of a data set share."""
        label = self.label
        return (
            f"{self.input.dtype} {list(self.input.shape)}",
            "no label" if label is None else f"{_kind(label)} {list(label.shape)}",
        )


class DatasetSource(Source):
    """A data set with ``len(dataset)`` and ``dataset[i]``, read one item at a time.

    An item is ``(input, label)``, a bare input, or a dict with ``inputs`` and perhaps ``labels``
    (other keys are not read). Inputs are tensors, arrays or numbers, as for ``TensorSource``;
    labels are integers for classes, floats or [K] floats for regression, and beside ``classes`` [C]
    numbers of 0 and 1 for multi-label.

    Only item 0 is read at the start. ``labels`` comes from ``dataset.targets``,
    ``dataset.labels`` or ``dataset.tensors[1]`` if it has the right length and agrees with the
    labels of 32 items; otherwise all items are read once, when ``labels`` is first asked for.
    Labels and values are checked as they are read.

    A data set that draws its own random numbers gives other pixels each time it is asked:
    nothing here can key them by row. Give ``augment`` to ``epoch`` instead.

    A slow data set is read ahead by ``workers`` processes; what they give is the same to the bit.
    They are copies of this one (forked, where the platform does that), so a data set must open
    its files anew in each process, or for each item.

    Parameters
    ----------
    dataset:
        A torch ``Dataset``, or any sequence of items.
    classes:
        The names of the classes, or their number; None takes the names in ``dataset.classes``
        if it has any and its labels are integers.
    name:
        None takes the name of the data set's class.
    workers:
        Processes that read rows in ``epoch`` and ``batches``; 0 reads them in this one. They
        start anew with every pass.

    Raises
    ------
    DataError
        No length, no item, an item that cannot be read, or one of another form than item 0,
        with its number.
    UsageError
        A negative number of workers.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        classes: Sequence[str] | int | None = None,
        name: str | None = None,
        workers: int = 0,
    ) -> None:
        self.name = name or type(dataset).__name__
        if not isinstance(workers, int) or workers < 0:
            raise UsageError(
                f"{self.name}: workers must be an integer of at least 0, not {workers}"
            )
        self.workers = workers
        _check_map_style(dataset, self.name)
        self._dataset = dataset
        first = self._item(0)
        self._form = first.form
        if classes is None and first.label is not None and first.label.dtype.kind != "f":
            classes = _names(dataset)
        self.classes = class_names(classes, self.name)
        self.shape = tuple(input_array(first.input[None], self.name).shape[1:])
        self._labelled = first.label is not None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def labels(self) -> Tensor | None:
        if self._labelled and self._labels is None:
            listed = self._listed()
            self._labels = self._read_labels() if listed is None else listed
        return self._labels

    def rows(self, ids: Tensor) -> Batch:
        picked = row_numbers(self, ids)
        if not picked.size:
            return self._nothing(ids)
        items = [self._checked(int(index)) for index in picked]
        inputs = np.stack([item.input for item in items])
        batch = {"inputs": as_floats(input_array(inputs, self.name, picked)), "ids": ids}
        if self._labelled:
            labels = np.stack([item.label for item in items if item.label is not None])
            found = label_array(labels, len(items), self.classes, self.name, picked)
            batch["labels"] = torch.from_numpy(found)
        return batch

    def _nothing(self, ids: Tensor) -> Batch:
        batch = self.rows(torch.zeros(1, dtype=torch.int64))
        return {**{key: value[:0] for key, value in batch.items()}, "ids": ids}

    def _checked(self, index: int) -> _Item:
        item = self._item(index)
        if item.form != self._form:
            raise DataError(
                f"{self.name}: item {index} is ({', '.join(item.form)}) and item 0 is "
                f"({', '.join(self._form)}); all items must have one form: resize or convert them"
            )
        return item

    def _item(self, index: int) -> _Item:
        what = f"{self.name}: item {index}"
        try:
            value = self._dataset[index]
        except AttarError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{what} cannot be read ({reason}); repair it or leave it out"
            ) from error
        if isinstance(value, dict):
            if "inputs" not in value:
                raise DataError(
                    f"{what} is a dict with {sorted(map(str, value))}; rename its keys to "
                    "'inputs' and 'labels'"
                )
            value = (value["inputs"], value.get("labels"))
        parts = value if isinstance(value, tuple | list) else (value,)
        if len(parts) not in (1, 2):
            raise DataError(
                f"{what} is a {type(value).__name__} of {len(parts)}; give (input, label), an "
                "input, or a dict with inputs and labels"
            )
        label = parts[1] if len(parts) == 2 else None
        return _Item(
            _array(parts[0], f"{what}: input"),
            None if label is None else _array(label, f"{what}: label"),
        )

    def _listed(self) -> Tensor | None:
        """The labels that the data set lists, if a sample of its items agrees with them.

        They may differ: a ``target_transform`` changes items and not the list.
        """
        sample = self._sample(_COMPARED)
        seen = self.rows(sample)["labels"]
        for values in _lists(self._dataset):
            array = _as_numbers(values)
            if array is None or array.ndim == 0 or len(array) != len(self):
                continue
            picked = array[sample.numpy()].reshape(seen.shape) if _fits(array, seen) else None
            if picked is not None and np.array_equal(picked.astype(seen.numpy().dtype), seen):
                return torch.from_numpy(label_array(array, len(self), self.classes, self.name))
        return None

    def _read_labels(self) -> Tensor:
        return torch.cat([batch["labels"] for batch in self.batches(_CHUNK)])


def _check_map_style(dataset: Any, name: str) -> None:
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not sized or isinstance(dataset, IterableDataset | dict):
        raise DataError(
            f"{name} cannot be read by row number; give a map-style data set with len(dataset) "
            "and dataset[i], such as list(dataset)"
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is an empty data set")


def _array(value: Any, what: str) -> Array:
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return np.asarray(value)
    return numbers(value, what)


def _kind(array: Array) -> str:
    return "float" if array.dtype.kind == "f" else "integer"


def _names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    usable = isinstance(names, list | tuple) and all(isinstance(item, str) for item in names)
    return list(names) if usable and names else None


def _lists(dataset: Any) -> Iterator[Any]:
    for attribute in ("targets", "labels"):
        yield getattr(dataset, attribute, None)
    tensors = getattr(dataset, "tensors", None)
    yield tensors[1] if isinstance(tensors, tuple | list) and len(tensors) == 2 else None


def _as_numbers(values: Any) -> Array | None:
    """A list, array or tensor of numbers as an array; None for anything else."""
    if not isinstance(values, list | tuple | np.ndarray | Tensor):
        return None
    try:
        array = np.asarray(values) if isinstance(values, list | tuple) else values
        return numbers(array, "labels")
    except ValueError:  # a DataError, or numpy's own for a ragged list
        return None


def _fits(array: Array, labels: Tensor) -> bool:
    # Multi-label rows are floats whatever the data set lists them as.
    same_kind = (array.dtype.kind == "f") == labels.is_floating_point() or array.ndim == 2
    return same_kind and array.size == len(array) * labels[0].numel()
