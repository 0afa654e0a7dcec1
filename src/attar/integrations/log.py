"""Reads a run's log while the run writes it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from attar.runtime import DataError

_PLACE = {"split", "step"}
_LONGEST = 80  # letters of the name of a stage


class Point(NamedTuple):
    """One record of the log.

    Attributes:
        stage: whose it is, such as ``distilled-0``: what its record says beside the numbers.
        split: ``train`` or ``validation``.
        step: optimiser steps so far.
        values: the numbers by name; one that was not finite is absent.
    """

    stage: str
    split: str
    step: int
    values: dict[str, float]

    @property
    def stream(self) -> str:
        """The records among which steps only grow."""
        return f"{self.stage}/{self.split}"


class Log:
    """The records of ``metrics.jsonl``, each read once while the file only grows.

    A resumed run drops what comes after its checkpoint and writes it again. The file is then
    another one, and is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = self._inode = 0
        self._last = b""

    def read(self) -> Iterator[Point]:
        """What came since the last call; a line that is still being written is left for later."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            self._find_place(file)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._lines += 1
                point = _point(line, f"{self._path}, line {self._lines}")
                self._offset += len(line)
                self._last = line
                if point is not None:
                    yield point

    def _find_place(self, file: BinaryIO) -> None:
        """Go on where the last reading ended, or begin anew if that place is not there."""
        inode = os.fstat(file.fileno()).st_ino
        file.seek(self._offset - len(self._last))
        # The number of a removed file can be given to the next, so the bytes are compared too.
        if inode != self._inode or file.read(len(self._last)) != self._last:
            self._offset = self._lines = 0
            self._last = b""
            file.seek(0)
        self._inode = inode


def _point(line: bytes, where: str) -> Point | None:
    """The record of a line; None where it holds no place in a training."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{where}: is no record in JSON; remove the line")
    split, step = record.get("split"), record.get("step")
    if not isinstance(split, str) or not isinstance(step, int):
        return None
    rest = {name: value for name, value in record.items() if name not in _PLACE}
    mark = [str(value) for name, value in rest.items() if name == "seed" or isinstance(value, str)]
    values = {name: value for name, value in rest.items() if name != "seed"}
    stage = _plain("-".join(mark)) or "stage"
    return Point(stage, _plain(split) or "split", step, dict(_numbers(values, "")))


def _plain(name: str) -> str:
    """A name that leads nowhere else: trackers make folders of it, and anybody may write a log."""
    return re.sub(r"[^\w.+ -]", "_", name).strip(". ")[:_LONGEST]


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
