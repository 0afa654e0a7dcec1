"""What a cache says of itself, and how that differs from what is wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attar.runtime import DataError
from attar.runtime.files import naming, reading
from attar.teachers.shard import check_plain

ABOUT = "about.json"  # of the whole cache, and not a writer's
HEAD = "head.safetensors"  # the layer behind what is kept, where it is kept
MADE = "made"  # by whom and when: no matter

_MOST_BYTES = 1 << 24


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a cache, as JSON; what it says is not looked at.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / ABOUT
    try:
        check_plain(path)
        with naming(path), reading(path) as descriptor:
            data = os.pread(descriptor, _MOST_BYTES + 1, 0)
        told = json.loads(data) if len(data) <= _MOST_BYTES else None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: is no teacher's cache: it has no {ABOUT}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        told = None
    if not isinstance(told, dict):
        raise DataError(f"{path}: is not the description of a cache; restore it from a copy")
    return told


def difference(known: Any, now: Any, where: str = "") -> str | None:
    """The first field in which two answers to "who was asked what" differ, in words."""
    if isinstance(known, dict) and isinstance(now, dict):
        for name in sorted(known.keys() | now.keys()):
            path = f"{where}.{name}" if where else name
            if found := difference(known.get(name), now.get(name), path):
                return found
        return None
    if known == now:
        return None
    return f"{where} is {str(now)[:80]}, and was {str(known)[:80]}"
