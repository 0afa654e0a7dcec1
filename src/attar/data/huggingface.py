"""Data sets of Hugging Face's ``datasets``, by columns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Lt

from attar.data import decoding
from attar.data.checks import Array
from attar.data.dataset import DatasetSource
from attar.data.decoding import Header, Pictures
from attar.data.source import Source, TensorSource
from attar.data.splits import Splits, consistent, split
from attar.runtime import AttarError, DataError, UsageError, suggest

_PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_FILES = {
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"
}  # fmt: skip
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_NUMBER = re.compile(r"u?int\d+|float\d+|bool|double")
_LOOKED_AT = 10_000


class _Labels(NamedTuple):
    values: Array | None
    classes: Sequence[str] | int | None


class _Images(Pictures):
    """An image column whose files are kept encoded in the Arrow table, or named by it."""

    def __init__(
        self, rows: Any, column: str, name: str, targets: Array | None, size: int | None
    ) -> None:
        super().__init__(targets, 3, size)
        self._rows, self._column, self._name = rows, column, name

    def __len__(self) -> int:
        return len(self._rows)

    def content(self, index: int) -> str | bytes:
        value = self._rows[index][self._column] or {}
        found = value.get("bytes") or value.get("path")
        if not found:
            raise ValueError("no image")
        if isinstance(found, str) and "://" in found:
            raise ValueError("a link to another machine, which is not followed")
        if isinstance(found, str) and not os.path.isfile(found):
            raise ValueError("the file that it names is not there")
        return found

    def where(self, index: int) -> str:
        return f"{self._name}: row {index} of column '{self._column}'"

    def header(self, index: int) -> Header:
        """Mode and sides; a DataError that names the row."""
        try:
            return decoding.header(self.content(index))
        except Exception as error:
            raise DataError(
                f"{self.where(index)}: {decoding.reason(error)}; repair or remove it"
            ) from None

    def pixels(self, index: int) -> Array:
        if self._channels == 1 and not self.header(index).grey:
            raise DataError(
                f"{self.where(index)} is a colour image among grey ones; convert the column to "
                "one mode"
            )
        return super().pixels(index)

    def grey(self) -> None:
        """From now on, one channel."""
        self._channels = 1


class _Numbers:
    """Columns of numbers side by side, one row at a time, from an Arrow table on disk."""

    def __init__(self, rows: Any, columns: Sequence[str], dtype: Any, targets: Array | None):
        self.targets = targets
        self._rows, self._columns, self._dtype = rows, columns, dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Array, ...]:
        row = self._rows[index]
        found = [np.asarray(row[column], self._dtype) for column in self._columns]
        value = found[0] if len(found) == 1 else np.stack(found)
        return (value,) if self.targets is None else (value, self.targets[index])


def dataset(
    *,
    path: str,
    inputs: str | list[str],
    labels: str | None = None,
    config: str | None = None,
    size: Annotated[int, Ge(1)] | None = None,
    seed: int = 0,
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2,
    workers: Annotated[int, Ge(0)] = 0,
) -> Splits:
    """Columns of a data set of Hugging Face's ``datasets``: images or numbers, and labels.

    Splits are found by name: train, validation (or valid, val, dev) and test. Where there is no
    test split, ``test_fraction`` of the training rows become it, stratified by class, chosen by
    ``seed``. What takes up to 512 MB is read once; more stays in the Arrow files, which are mapped
    into memory. No code of a data set is ever run.

    Parameters
    ----------
    path:
        A folder written by ``save_to_disk``; a .parquet, .arrow, .csv, .json or .jsonl file, or a
        folder of such; or ``owner/name`` on the hub, which is fetched and kept by ``datasets``.
    inputs:
        A column of images (uint8 [3, H, W], or [1, H, W] when all are grey), a column of numbers
        or of arrays of one shape, or a list of columns with a number each. Arrays of uint8
        [C, H, W] or [H, W] are images too.
    labels:
        A column of class labels, whose names are kept; of whole numbers (classes from 0); of
        strings (classes sorted by name); or of floats (regression). None: no labels.
    config:
        Which configuration of a data set on the hub.
    size:
        As in :func:`images`, for a column of images.
    workers:
        Threads or processes that decode images, as in :func:`images`.

    Raises
    ------
    DataError
        A path that is not there or cannot be fetched, no split called train, an unknown column
        (the columns are listed), a column of another type than needed, a missing or unreadable
        value, with its row.
    UsageError
        Not installed: ``pip install "attar[datasets]"``.
    """
    parts = _parts(path, config)
    columns = [inputs] if isinstance(inputs, str) else list(inputs)
    if not columns:
        raise UsageError("dataset: inputs names no column; name one or more")
    for rows in parts.values():
        for column in [*columns, *([labels] if labels else [])]:
            _known(path, rows, column)
    name = Path(path).name
    found = _labelled(name, parts, labels)
    if _is_image(parts["train"], columns[0]):
        sources = _pictures(name, parts, columns, found, size, workers)
    else:
        if size is not None:
            raise UsageError(
                f"dataset: size is for images, and '{columns[0]}' is a column of "
                f"{_kind(parts['train'], columns[0])}; leave it out"
            )
        sources = _numeric(name, parts, columns, found, workers)
    train = sources["train"]
    if "test" not in sources:
        train, sources["test"] = split(train, test_fraction, seed=seed)
    return consistent(train, sources["test"], sources.get("validation"))


def columns(path: str) -> dict[str, str]:
    """What each column of the training rows holds: classes, image, number, array, text or other."""
    rows = _parts(path, None)["train"]
    return {column: _use(rows, column) for column in rows.column_names}


def _use(rows: Any, column: str) -> str:
    feature, dtype = _feature(rows, column)
    if getattr(feature, "names", None):
        return "classes"
    if _is_image(rows, column):
        return "image"
    if not _NUMBER.fullmatch(dtype):
        return "text" if "string" in dtype else "other"
    return "number" if type(feature).__name__ == "Value" else "array"


def _parts(path: str, config: str | None) -> dict[str, Any]:
    """The rows of each split, in the order train, validation, test."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            'dataset needs the package datasets; install it: pip install "attar[datasets]"'
        ) from None
    try:
        with _silent(datasets, os.path.exists(path)):
            found = _loaded(datasets, path, config)
    except AttarError:
        raise
    except Exception as error:
        raise DataError(
            f"dataset: {path} cannot be loaded ({_short(error)}); check the path, or the network "
            "for a data set on the hub"
        ) from None
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    parts: dict[str, Any] = {}
    for part, names in _PARTS.items():
        there = [name for name in names if name in splits]
        if there:
            parts[part] = splits[there[0]]
    if "train" not in parts:
        raise DataError(f"dataset: {path} has no split train, but {', '.join(splits)}; rename one")
    empty = next((part for part, rows in parts.items() if not len(rows)), None)
    if empty:
        raise DataError(f"dataset: {path}: the split {empty} has no rows; leave it out")
    return parts


@contextmanager
def _silent(datasets: Any, local: bool) -> Iterator[None]:
    """Without bars of progress; only a download takes long enough for one."""
    shown = local and not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _loaded(datasets: Any, path: str, config: str | None) -> Any:
    place = Path(path)
    if place.is_dir():
        states = ("dataset_dict.json", "state.json")
        if any((place / state).is_file() for state in states):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(os.path.abspath(path), name=config)
    if place.is_file():
        kind = _FILES.get(place.suffix.lower())
        if kind is None:
            raise DataError(
                f"dataset: {path} is no file that is read; known are {', '.join(_FILES)}"
            )
        return datasets.load_dataset(kind, data_files=os.path.abspath(path))
    # A bare word could name one of the library's own loaders, which would read this folder.
    if not _HUB.fullmatch(path):
        raise DataError(
            f"dataset: there is no file or folder {path}, and a data set on the hub is written "
            "owner/name; check the path"
        )
    return datasets.load_dataset(path, name=config)


def _known(path: str, rows: Any, column: str) -> None:
    if column not in rows.column_names:
        raise DataError(
            f"dataset: {path} has no column '{column}'; its columns are "
            f"{decoding.listed(rows.column_names)} ({suggest(column, rows.column_names)})"
        )


def _feature(rows: Any, column: str) -> tuple[Any, str]:
    """The feature of a column, and the type of its numbers or strings; "" if it is nested."""
    feature = inner = rows.features[column]
    while not isinstance(getattr(inner, "dtype", None), str) or hasattr(inner, "feature"):
        if not hasattr(inner, "feature"):
            return feature, ""
        inner = inner.feature
    return feature, inner.dtype


def _is_image(rows: Any, column: str) -> bool:
    """A column of images, or of what other writers keep them in: bytes, or bytes with a path."""
    feature = rows.features[column]
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") == "binary"


def _kind(rows: Any, column: str) -> str:
    feature, dtype = _feature(rows, column)
    return dtype or type(feature).__name__


def _pictures(
    name: str,
    parts: dict[str, Any],
    columns: Sequence[str],
    labels: dict[str, _Labels],
    size: int | None,
    workers: int,
) -> dict[str, Source]:
    from datasets import Image

    decoding.need_pillow("dataset", "datasets")
    if len(columns) > 1:
        raise UsageError(
            f"dataset: '{columns[0]}' is a column of images, which is read alone; name one column"
        )
    made = {}
    for part, rows in parts.items():
        raw = rows.select_columns(columns).with_format(None)
        raw = raw.cast_column(columns[0], Image(decode=False))
        made[part] = _Images(raw, columns[0], f"{name} {part}", labels[part].values, size)
    with decoding.quiet():
        headers = [found for some in made.values() for found in _headers(some, workers)]
        if all(found.grey for found in headers):
            for some in made.values():
                some.grey()
        shape = made["train"].pixels(0).shape
        small = decoding.fits(sum(map(len, made.values())), shape)
        make: Callable[..., Source] = decoding.in_memory if small else decoding.on_demand
        return {
            part: make(some, classes=labels[part].classes, name=f"{name} {part}", workers=workers)
            for part, some in made.items()
        }


def _headers(some: _Images, workers: int) -> list[Header]:
    """Of all images, or of 10,000 at a fixed stride."""
    picked = range(0, len(some), -(-len(some) // _LOOKED_AT))
    return list(decoding.spread(lambda index: some.header(picked[index]), len(picked), workers))


def _numeric(
    name: str,
    parts: dict[str, Any],
    columns: Sequence[str],
    labels: dict[str, _Labels],
    workers: int,
) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for column in columns[1:] and columns:
        if type(parts["train"].features[column]).__name__ != "Value":
            raise DataError(
                f"{name}: column '{column}' holds {_kind(parts['train'], column)}s in a row, and "
                "several columns need one number each; name it alone"
            )
    dtypes = {_number_type(name, rows, column) for rows in parts.values() for column in columns}
    # Bytes are pixels where they have the form of images; all else is kept as float32.
    dtype = np.uint8 if dtypes == {"uint8"} else np.float32
    for part, rows in parts.items():
        called = f"{name} {part}"
        raw = rows.select_columns(list(columns)).with_format("numpy")
        values, classes = labels[part]
        lazy = _Numbers(raw, columns, dtype, values)
        width = np.asarray(lazy[0][0]).size * np.dtype(dtype).itemsize
        if not decoding.fits(len(rows), [width]):
            sources[part] = DatasetSource(lazy, classes=classes, name=called, workers=workers)
            continue
        table = rows.select_columns(list(columns)).with_format("arrow")[:]
        whole = [_column(called, table, raw, column, dtype) for column in columns]
        array = whole[0] if len(whole) == 1 else np.stack(whole, 1)
        sources[part] = TensorSource(array, values, classes=classes, name=called)
    return sources


def _number_type(name: str, rows: Any, column: str) -> str:
    dtype = _feature(rows, column)[1]
    if not _NUMBER.fullmatch(dtype):
        raise DataError(
            f"{name}: column '{column}' holds {_kind(rows, column)}, and inputs are images or "
            "numbers; name another column, or encode it"
        )
    return dtype


def _column(called: str, table: Any, rows: Any, column: str, dtype: Any) -> Array:
    _no_gap(called, column, table.column(column))
    return _stacked(called, column, rows[column][:], dtype)


def _stacked(called: str, column: str, values: Sequence[Any], dtype: Any) -> Array:
    """One array of the cells of a column, which must have one shape."""
    try:
        return np.asarray(values, dtype)
    except ValueError:
        shapes = [np.shape(value) for value in values]
        row = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0)
        raise DataError(
            f"{called}: row {row} of column '{column}' has the shape {list(shapes[row])} and row "
            f"0 {list(shapes[0])}; all rows need one shape"
        ) from None


def _no_gap(called: str, column: str, cells: Any) -> None:
    if cells.null_count:
        row = cells.is_null().to_pylist().index(True)
        raise DataError(
            f"{called}: row {row} of column '{column}' has no value; fill it or remove the row"
        )


def _labelled(name: str, parts: dict[str, Any], column: str | None) -> dict[str, _Labels]:
    """The labels of each part as numbers, and the classes that they share."""
    if column is None:
        return dict.fromkeys(parts, _Labels(None, None))
    feature, dtype = _feature(parts["train"], column)
    cells = {}
    names = getattr(feature, "names", None)
    for part, rows in parts.items():
        other = _feature(rows, column)
        if (getattr(other[0], "names", None), other[1]) != (names, dtype):
            raise DataError(
                f"{name}: the labels in column '{column}' of train and of {part} are of two "
                "kinds, or have other names; make them one"
            )
        table = rows.select_columns([column]).with_format("arrow")[:]
        cells[part] = table.column(column)
        _no_gap(f"{name} {part}", column, cells[part])
    if "string" in dtype:
        return _named(name, column, {part: cell.to_pylist() for part, cell in cells.items()})
    if not _NUMBER.fullmatch(dtype):
        raise DataError(
            f"{name}: column '{column}' holds {_kind(parts['train'], column)}, and labels are "
            "classes or numbers; name another column"
        )
    regression = "float" in dtype or dtype == "double"
    kind = np.float32 if regression else np.int64
    values = {
        part: _stacked(f"{name} {part}", column, cell.to_pylist(), kind)
        for part, cell in cells.items()
    }
    if regression:
        return {part: _Labels(value, None) for part, value in values.items()}
    classes = names or max(max(int(value.max()) for value in values.values()) + 1, 1)
    return {part: _Labels(value, classes) for part, value in values.items()}


def _named(name: str, column: str, cells: dict[str, list[str]]) -> dict[str, _Labels]:
    classes = sorted(set(cells["train"]))
    place = {label: index for index, label in enumerate(classes)}
    for part, labels in cells.items():
        for row, label in enumerate(labels):
            if label not in place:
                raise DataError(
                    f"{name} {part}: class '{label[:40]}' of row {row} of column '{column}' is "
                    f"not among the training rows; {suggest(label, classes)}"
                )
    return {
        part: _Labels(np.array([place[label] for label in labels], np.int64), classes)
        for part, labels in cells.items()
    }


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."
