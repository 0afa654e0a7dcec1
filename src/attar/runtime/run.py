"""The run folder: what a run leaves behind, each file whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from attar.runtime.closing import Closing
from attar.runtime.errors import RunExistsError
from attar.runtime.files import finite, write_json


class Run(Closing):
    """A folder that one run writes and others read; never written over.

    Args:
        folder: a path that does not exist yet, or an empty folder.

    Raises:
        RunExistsError: the folder holds something.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_free(self.folder)
        self._metrics: TextIO | None = None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``; a reader sees it at once."""
        if self._metrics is None:
            # Made at the first write: what is refused before it leaves no folder behind.
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._metrics.flush()

    def write(self, name: str, value: Any) -> Path:
        """Write *value* as the JSON file *name* of this run."""
        path = self.folder / name
        write_json(path, value)
        return path

    def close(self) -> None:
        """Close the log."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def check_free(folder: str | Path) -> None:
    """Refuse a folder that already holds something."""
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise RunExistsError(
            f"{path}: already holds a run; choose another folder with --run, or remove this one"
        )
    if path.exists() and not path.is_dir():
        raise RunExistsError(f"{path}: is a file, not a folder; choose another name with --run")
