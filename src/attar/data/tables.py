"""Tables in CSV files."""

from __future__ import annotations

import csv as reader
import gzip
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Gt, Lt
from numpy.typing import NDArray

from attar.data.checks import Array
from attar.data.source import TensorSource
from attar.data.splits import Splits, consistent, strata
from attar.runtime import DataError, UsageError, suggest

_MOST_CLASSES = 1_000
_FIELD_BYTES = 131_072
_LARGEST = float(np.finfo(np.float32).max)
_YES_OR_NO = {"0": 0, "1": 1, "false": 0, "true": 1}
_NO_NUMBER = {"na", "n/a", "nan", "null", "none", "?", "-", "inf", "+inf", "-inf"}

_Encoder = Callable[["Table"], Array]


class Table(NamedTuple):
    """The cells of one file, with the line that each row begins on."""

    path: str
    names: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def at(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"

    def part(self, ids: Iterable[int]) -> Table:
        chosen = list(ids)
        rows, lines = [self.rows[i] for i in chosen], [self.lines[i] for i in chosen]
        return Table(self.path, self.names, rows, lines)


def csv(
    *,
    train: str,
    test: str | None = None,
    target: str | list[str] | None = None,
    regression: bool = False,
    seed: int = 0,
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2,
) -> Splits:
    """A table of numbers and categories, one row an example, read into memory.

    The files are UTF-8 with commas and a header row, plain or gzipped (``.gz``); blank lines are
    no rows. Spaces around a
    name or cell are dropped, and so are control characters within it. How a column is encoded is
    decided on the training rows alone:

    - all its cells are finite numbers or empty: one column of numbers, where an empty cell is
      the mean of the training rows;
    - otherwise: one column of 0 or 1 for each category of the training rows, sorted; a category
      that only the test rows have is 0 in all of them, and an empty cell is a category.

    Parameters
    ----------
    train, test:
        Paths. Without ``test``, ``test_fraction`` of the rows of ``train`` become the test part,
        stratified by class where there is one target, chosen by ``seed``.
    target:
        The column to predict. Several are the labels of a multi-label task, which hold (1 or
        true) or not (0 or false). None, or columns that only the test file has: training rows
        without labels.
    regression:
        The target is a number (float32 [N, 1]), several are [N, K]. Otherwise each value of a
        single target is a class; classes are sorted by name, or by number when all of them are
        integers.

    Raises
    ------
    DataError
        With file and line: a row of another length than the header, a cell that is no number in
        a column of numbers or in a regression target, an empty target cell, a class that the
        training rows do not have. With the file: an empty file, an unknown target, columns that
        differ between the files, a column with more than 1,000 categories or classes.
    """
    if regression and target is None:
        raise UsageError("csv: regression needs a target; name the column to predict")
    targets = _named(target)
    learn, judge = read_tables(train, test, targets, regression, seed, test_fraction)
    features = _features(learn, judge, targets)
    classes = _classes(learn, judge, targets) if targets and not regression else None
    encoders = [_encoder(learn, name) for name in features]
    parts = [
        TensorSource(
            np.concatenate([encode(table) for encode in encoders], axis=1),
            _labels(table, targets, classes),
            classes=classes,
            name=f"{Path(table.path).name} {part}",
        )
        for table, part in ((learn, "train"), (judge, "test"))
    ]
    return consistent(parts[0], parts[1])


def _named(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns to predict; one in a list is the same as one alone."""
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    if target is not None and not targets:
        raise UsageError("csv: target is an empty list; name the columns to predict")
    for place, name in enumerate(targets):
        if name in targets[:place]:
            raise UsageError(f"csv: target names '{name}' twice; each column is one label")
    return targets


def read_tables(
    train: str,
    test: str | None,
    targets: tuple[str, ...],
    regression: bool,
    seed: int,
    fraction: float,
) -> tuple[Table, Table]:
    """The training and the test table; the second is split off where there is no file of it."""
    learn = read_table(train)
    if test is not None:
        judge = read_table(test)
        _check_known(judge, targets)
        if any(name in learn.names for name in targets):
            _check_known(learn, targets)
        return learn, judge
    _check_known(learn, targets)
    groups: NDArray[np.int64] | None = None
    if len(targets) == 1 and not regression:
        groups = np.unique(learn.column(targets[0]), return_inverse=True)[1]
    rest, part = strata(groups, len(learn.rows), fraction, seed=seed, name=train)
    return learn.part(rest), learn.part(part)


def _check_known(table: Table, targets: tuple[str, ...]) -> None:
    for name in targets:
        if name not in table.names:
            raise DataError(
                f"{table.path}: no column '{name}' for target; {suggest(name, table.names)}"
            )


def _features(learn: Table, judge: Table, targets: tuple[str, ...]) -> list[str]:
    features = [name for name in learn.names if name not in targets]
    if not features:
        named = f"the target '{targets[0]}'" if len(targets) == 1 else "the targets"
        raise DataError(f"{learn.path}: no column besides {named}; add inputs")
    for table, others in ((learn, judge), (judge, learn)):
        extra = [name for name in table.names if name not in (*others.names, *targets)]
        if extra:
            raise DataError(
                f"{table.path}: column '{extra[0]}' is not in {others.path}; both files need the "
                f"same columns ({suggest(extra[0], others.names)})"
            )
    return features


def read_table(path: str) -> Table:
    """The cells of a CSV file, plain or gzipped."""
    # The limit is the csv module's own and global, so it is put back for whoever set it.
    limit = reader.field_size_limit(_FIELD_BYTES)
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return _table(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: is no whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    finally:
        reader.field_size_limit(limit)


def _table(path: str, file: Iterable[str]) -> Table:
    rows = _numbered(path, file)
    line, header = next(rows, (0, []))
    if not header:
        raise DataError(f"{path}: the file is empty; it needs a header row and data rows")
    names = _header(f"{path}:{line}", header)
    table = Table(path, names, [], [])
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{path}:{line}: {len(row)} cells, but the header has {len(names)}; quote cells "
                "that hold a comma"
            )
        table.rows.append([_clean(cell) for cell in row])
        table.lines.append(line)
    if not table.rows:
        raise DataError(f"{path}: a header and no rows; add data rows")
    return table


def _numbered(path: str, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line it begins on (a quoted cell may span lines)."""
    rows = reader.reader(file, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except reader.Error as error:
            raise DataError(f"{path}:{line}: {error}; check the quotes of this row") from None
        except UnicodeDecodeError:
            raise DataError(
                f"{path}: not UTF-8 text at line {line} or soon after; save it as UTF-8"
            ) from None
        if row is None:
            return
        if row:
            yield line, row


def _header(where: str, header: Sequence[str]) -> list[str]:
    names = [_clean(name) for name in header]
    for place, name in enumerate(names):
        if not name:
            raise DataError(f"{where}: column {place + 1} has no name; name it or remove it")
        if name in names[:place]:
            raise DataError(f"{where}: two columns are called '{name}'; rename or remove one")
    return names


def _encoder(learn: Table, name: str) -> _Encoder:
    cells = learn.column(name)
    values = [_number(cell) for cell in cells if cell]
    known = [value for value in values if value is not None]
    if not values:
        raise DataError(f"{learn.path}: column '{name}' is empty in all training rows; remove it")
    if len(known) == len(values):
        return _numeric(name, math.fsum(known) / len(known))
    others = {cell for cell in cells if cell and _number(cell) is None}
    if known and all(cell.lower() in _NO_NUMBER for cell in others):
        row = next(row for row, cell in enumerate(cells) if cell in others)
        raise DataError(
            f"{learn.at(row)}: '{cells[row]}' in column '{name}' of numbers is no finite number; "
            "leave the cell empty if the value is missing"
        )
    return _one_hot(learn, name)


def _numeric(name: str, mean: float) -> _Encoder:
    def encode(table: Table) -> Array:
        column = [
            _required_number(table, row, name, cell) if cell else mean
            for row, cell in enumerate(table.column(name))
        ]
        return np.array(column, np.float32)[:, None]

    return encode


def _one_hot(learn: Table, name: str) -> _Encoder:
    categories = sorted(set(learn.column(name)))
    if len(categories) > _MOST_CLASSES:
        row = next(i for i, cell in enumerate(learn.column(name)) if cell and _number(cell) is None)
        raise DataError(
            f"{learn.at(row)}: '{_shown(learn.column(name)[row])}' makes '{name}' a column of "
            f"categories, and it has {len(categories):,} of them (at most {_MOST_CLASSES:,}); "
            "remove the column or repair the cell"
        )
    place = {category: index for index, category in enumerate(categories)}

    def encode(table: Table) -> Array:
        column = np.zeros((len(table.rows), len(categories)), np.float32)
        for row, cell in enumerate(table.column(name)):
            if cell in place:
                column[row, place[cell]] = 1
        return column

    return encode


def _classes(learn: Table, judge: Table, targets: tuple[str, ...]) -> list[str]:
    if len(targets) > 1:
        return list(targets)
    target = targets[0]
    table = learn if target in learn.names else judge
    found = set(_targets(table, target))
    if len(found) > _MOST_CLASSES:
        raise DataError(
            f"{table.path}: target '{target}' has {len(found):,} classes (at most "
            f"{_MOST_CLASSES:,}); give regression: true if it is a number"
        )
    if len(found) < 2:
        raise DataError(
            f"{table.path}: target '{target}' is '{_shown(*found)}' in every row; there is "
            "nothing to tell apart"
        )
    integers = all(re.fullmatch("-?[0-9]{1,18}", name) for name in found)
    return sorted(found, key=lambda name: (int(name) if integers else 0, name))


def _labels(table: Table, targets: tuple[str, ...], classes: list[str] | None) -> Array | None:
    if not targets or targets[0] not in table.names:
        return None
    if classes is None:
        return np.stack([_numbers(table, name) for name in targets], axis=1)
    if len(targets) > 1:
        return np.stack([_yes_or_no(table, name) for name in targets], axis=1)
    return _class_numbers(table, targets[0], classes)


def _numbers(table: Table, target: str) -> Array:
    cells = _targets(table, target)
    words = [cell for cell in cells if _number(cell) is None]
    if 2 * len(words) > len(cells):  # no cell of them is the wrong one: the column is
        some = ", ".join(f"'{_shown(word)}'" for word in list(dict.fromkeys(words))[:2])
        raise DataError(
            f"{table.path}: the target '{target}' holds text such as {some}, and regression needs "
            "numbers; leave regression out, or name a column of numbers"
        )
    values = [_required_number(table, row, target, cell) for row, cell in enumerate(cells)]
    return np.array(values, np.float32)


def _yes_or_no(table: Table, target: str) -> Array:
    cells = _targets(table, target)
    for row, cell in enumerate(cells):
        if cell.lower() not in _YES_OR_NO and _number(cell) not in (0, 1):
            raise DataError(
                f"{table.at(row)}: '{_shown(cell)}' in column '{target}' is neither 0 nor 1, and "
                "each of several targets is a label that holds or not; repair the cell, or give "
                "regression: true if the targets are numbers"
            )
    values = [_YES_OR_NO.get(cell.lower(), _number(cell)) for cell in cells]
    return np.array(values, np.uint8)


def _class_numbers(table: Table, target: str, classes: list[str]) -> Array:
    cells = _targets(table, target)
    place = {name: index for index, name in enumerate(classes)}
    for row, cell in enumerate(cells):
        if cell not in place:
            raise DataError(
                f"{table.at(row)}: class '{_shown(cell)}' is not among the training rows; "
                f"{suggest(cell, classes)}"
            )
    return np.array([place[cell] for cell in cells], np.int64)


def _targets(table: Table, target: str) -> list[str]:
    cells = table.column(target)
    if "" in cells:
        raise DataError(
            f"{table.at(cells.index(''))}: the target '{target}' is empty; fill the cell or remove "
            "the row"
        )
    return cells


def _required_number(table: Table, row: int, name: str, cell: str) -> float:
    value = _number(cell)
    if value is None:
        raise DataError(
            f"{table.at(row)}: '{_shown(cell)}' in column '{name}' is not a finite number, and "
            "the column holds numbers; repair the cell"
        )
    return value


def _number(cell: str) -> float | None:
    """The number in a cell, None if it is none that float32 can hold."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST and "_" not in cell else None


def _clean(text: str) -> str:
    """Without control and other invisible characters, which could write to a terminal."""
    if not text.isprintable():
        text = "".join(sign for sign in text if unicodedata.category(sign)[0] != "C")
    return text.strip()


def _shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
