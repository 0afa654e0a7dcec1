"""One file of a teacher's cache: how it is laid out, mapped into memory and checked.

A shard is a safetensors file: an array ``slots`` and one for each field, a row a row. A part is
such a file of full size of which only some rows are written yet; its log has a line a batch, of
fixed width, with the rows of the batch and the CRC-32 of its bytes. A line counts when it is
whole, and its rows when their CRC-32 agrees.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attar.runtime import DataError, UsageError
from attar.runtime.files import naming, reading

SLOTS = "slots"

Arrays = dict[str, NDArray[Any]]

_ALIGNED = 64
_MOST_HEADER = 1 << 20
_KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
LINE = 44  # bytes
_TEXT = re.compile(rb"([0-9]{12}) ([0-9]{12}) ([0-9a-f]{8}) ([0-9a-f]{8})\n")


@dataclass(frozen=True)
class Field:
    """An array of a cache: its name, numpy's name of its type, and the shape of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class Layout:
    """Where the arrays of a shard lie in its file.

    Raises:
        UsageError: fields that no shard can hold.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        for field in fields:
            _check(field)
        if len({field.name for field in fields}) < len(fields):
            raise UsageError("two fields have the same name; give each its own")
        every = [Field(SLOTS, "int64", ()), *fields]
        # Wide numbers first: each array is then aligned, whatever the number of rows.
        self.fields = sorted(every, key=lambda field: -np.dtype(field.dtype).itemsize)
        self.row_bytes = sum(field.bytes for field in self.fields)
        if len(self.header(1 << 32)) > _MOST_HEADER:
            raise UsageError(f"{len(fields)} fields are too many for one cache; join some of them")

    def header(self, rows: int) -> bytes:
        """The beginning of a file of so many rows; what follows it is aligned to 64 bytes."""
        entries = {
            field.name: {
                "dtype": _KINDS[field.dtype],
                "shape": [rows, *field.shape],
                "data_offsets": [start, start + rows * field.bytes],
            }
            for field, start in self._starts(rows)
        }
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        text += b" " * (-(8 + len(text)) % _ALIGNED)
        return struct.pack("<Q", len(text)) + text

    def places(self, rows: int) -> Iterator[tuple[Field, int]]:
        """Each field with the byte of the file at which its array starts."""
        begin = len(self.header(rows))
        return ((field, begin + start) for field, start in self._starts(rows))

    def size(self, rows: int) -> int:
        """The bytes of a file of so many rows."""
        return len(self.header(rows)) + rows * self.row_bytes

    def capacity(self, most_bytes: int, most_rows: int) -> int:
        """Rows of a new part; a multiple of 64, so that all its arrays are aligned."""
        rows = max(1, min(most_bytes // self.row_bytes, most_rows))
        return -(-rows // _ALIGNED) * _ALIGNED

    def _starts(self, rows: int) -> Iterator[tuple[Field, int]]:
        start = 0
        for field in self.fields:
            yield field, start
            start += rows * field.bytes


def _check(field: Field) -> None:
    name = field.name
    if not isinstance(name, str) or not name.isprintable() or name in ("", SLOTS, "__metadata__"):
        raise UsageError(f"a field of a cache cannot be called {name!r}; choose another name")
    if field.dtype not in _KINDS:
        raise UsageError(
            f"field {name!r} has the type {field.dtype!r}, and a cache keeps {', '.join(_KINDS)}; "
            "convert it"
        )
    if any(type(size) is not int or size < 1 for size in field.shape):
        raise UsageError(
            f"field {name!r} has rows of shape {field.shape}, but sizes are whole numbers from 1; "
            "leave out a field that is empty"
        )


def damaged(path: Path, fault: str) -> DataError:
    """The error of a shard or a part that cannot be used."""
    return DataError(f"{path}: {fault}; remove the file, and its rows are asked for again")


def mapped(path: Path, layout: Layout, most_rows: int) -> Arrays:
    """The arrays of a shard or a part, to be read: mapped into memory, not loaded.

    Nothing in the file is believed: its first bytes must be those that we would write for as many
    rows as its size allows.

    Raises:
        DataError: it is something else.
        FileNotFoundError: there is none.
    """
    with naming(path):
        check_plain(path)
        with reading(path) as descriptor:
            size = os.fstat(descriptor).st_size
            begin = os.pread(descriptor, 8, 0)
            length = 8 + (struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0)
            if not 8 < length <= min(_MOST_HEADER, size):
                raise damaged(path, "does not begin with the header of a shard")
            rows = (size - length) // layout.row_bytes
            header = layout.header(rows)
            if os.pread(descriptor, length, 0) != header or size != layout.size(rows):
                wanted = ", ".join(f"{f.name} {f.dtype}{list(f.shape)}" for f in layout.fields)
                raise damaged(path, f"is not a shard, of {size} bytes, of this cache ({wanted})")
            if not 0 < rows <= most_rows:
                raise damaged(path, f"has {rows} rows, and not 1 to {most_rows}")
            memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    return {
        field.name: np.frombuffer(
            memory, field.dtype, rows * math.prod(field.shape), offset
        ).reshape(rows, *field.shape)
        for field, offset in layout.places(rows)
    }


def mapped_part(folder: Path, stem: str, layout: Layout, slots: int) -> Arrays:
    """The arrays of a part; of the shard that it has become where that is not listed yet."""
    most = layout.capacity(slots * layout.row_bytes, slots)
    try:
        return mapped(folder / f"{stem}.part", layout, most)
    except FileNotFoundError:
        return mapped(folder / f"{stem}.safetensors", layout, most)


def check_slots(path: Path, slots: NDArray[np.int64], total: int) -> None:
    """Refuse slots that the cache does not have."""
    if len(slots) and not 0 <= slots.min() <= slots.max() < total:
        raise damaged(path, f"holds a slot that is none of 0 to {total - 1}")


def check_plain(path: Path) -> None:
    """Refuse a link, which may lead anywhere, and a pipe, which would keep us waiting."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise damaged(path, "is not a plain file")


class Commit(NamedTuple):
    """One line of a log: rows *first* to *first* + *rows* hold a batch of this CRC-32."""

    first: int
    rows: int
    crc: int

    def line(self) -> bytes:
        """As text of a fixed width, which ends with its own CRC-32."""
        text = b"%012d %012d %08x " % self
        return text + b"%08x\n" % zlib.crc32(text)

    def is_sound(self, arrays: Arrays) -> bool:
        """Whether the rows are there, to the bit."""
        stop = self.first + self.rows
        if stop > len(arrays[SLOTS]):
            return False
        crc = 0
        for array in arrays.values():
            crc = zlib.crc32(raw(array[self.first : stop]), crc)
        return crc == self.crc


class History(NamedTuple):
    """What a log says: batches that count, lines that were read, rows that are written or were."""

    sound: list[Commit]
    lines: int
    used: int


def history(path: Path, start: int, arrays: Arrays) -> History:
    """Read a log from line *start* on, and the rows of *arrays* that it speaks of.

    A damaged line is passed over, and one at the end is left to be read again: perhaps it is being
    written.
    """
    found = commits(path, start, len(arrays[SLOTS]))
    while found and found[-1] is None:
        found.pop()
    sound, used, stop = [], 0, 0
    for commit in found:
        if commit is not None:
            used = max(used, commit.first + commit.rows)
            if commit.first >= stop and commit.is_sound(arrays):
                sound.append(commit)
                stop = commit.first + commit.rows
    return History(sound, start + len(found), min(used, len(arrays[SLOTS])))


def commits(path: Path, start: int, most: int) -> list[Commit | None]:
    """Lines number *start* to *most* of a log; None is one that is damaged.

    A last line without its end is left out.
    """
    with naming(path):
        check_plain(path)
        with reading(path) as descriptor:
            stop = min(os.fstat(descriptor).st_size, most * LINE)
            data = os.pread(descriptor, max(0, stop - start * LINE), start * LINE)
    lines = (data[at : at + LINE] for at in range(0, len(data) - LINE + 1, LINE))
    return [_parsed(line) for line in lines]


def _parsed(line: bytes) -> Commit | None:
    match = _TEXT.fullmatch(line)
    if match is None or zlib.crc32(line[: -len(match[4]) - 1]) != int(match[4], 16):
        return None
    return Commit(int(match[1]), int(match[2]), int(match[3], 16))


def raw(array: NDArray[Any]) -> memoryview:
    """The bytes of an array that lies in one piece."""
    return array.reshape(-1).view(np.uint8).data
