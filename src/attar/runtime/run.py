"""The run folder: what a run leaves behind, each file whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from attar.runtime.closing import Closing
from attar.runtime.errors import RunExistsError
from attar.runtime.files import finite, sweep, write_atomic, write_json
from attar.runtime.lock import Lock
from attar.runtime.ranks import Ranks

LOG = "metrics.jsonl"


class Run(Closing):
    """A folder that one run writes and others read; never written over.

    Args:
        folder: a path that does not exist yet, or an empty folder.
        resume: the folder may hold a run, which is gone on with.
        silent: write nothing, as another process writes this run.

    Raises:
        RunExistsError: the folder holds something, or another process writes it.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, silent: bool = False) -> None:
        self.folder = Path(folder)
        self.silent = silent
        if not resume and not silent:
            check_free(self.folder)
        self._metrics: TextIO | None = None
        self._lock: Lock | None = None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``; a reader sees it at once."""
        if self.silent:
            return
        if self._metrics is None:
            self.open()
            self._metrics = (self.folder / LOG).open("a", encoding="utf-8")
        self._metrics.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._metrics.flush()

    def open(self) -> None:
        """Make the folder and hold it alone. What is refused before leaves no folder behind."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder / ".lock")
            sweep(self.folder)

    def sync(self) -> None:
        """Have the log on the disk, before something that counts on it is."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def rewind(self, mark: Mapping[str, Any], *, epoch: int, step: int) -> None:
        """Drop the records of *mark* that come after *step* or after the start of *epoch*.

        They will be written again; so does a line that a crash has cut.
        """
        path = self.folder / LOG
        if self.silent or not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _before(line, mark, epoch, step)]
        if kept != lines:
            self._close_log()
            write_atomic(path, b"".join(kept))

    def write(self, name: str, value: Any) -> Path:
        """Write *value* as the JSON file *name* of this run."""
        path = self.folder / name
        if not self.silent:
            self.open()
            write_json(path, value)
        return path

    def close(self) -> None:
        """Close the log and let go of the folder."""
        self._close_log()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_log(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _before(line: bytes, mark: Mapping[str, Any], epoch: int, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if any(record.get(name) != value for name, value in mark.items()):
        return True
    if record.get("split") == "train":
        return record["step"] <= step
    return record["epoch"] < epoch


def opened(ranks: Ranks, folder: str | Path, *, resume: bool = False) -> Run:
    """The run of all ranks: rank 0 writes it, the others only know where it lies."""
    with ranks.together():
        return Run(folder, resume=resume, silent=not ranks.main)


def check_free(folder: str | Path) -> None:
    """Refuse a folder that already holds something."""
    path = Path(folder)
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise RunExistsError(
            f"{path}: already holds a run; go on with it by --resume, choose another folder with "
            "--run, or remove this one"
        )
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path}: is a file, not a folder; choose another name with --run")
