"""The list of a writer's sealed shards, by which a cache knows its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attar.runtime import DataError, UsageError
from attar.runtime.files import naming, reading
from attar.teachers.about import ABOUT
from attar.teachers.shard import check_plain

_MOST_BYTES = 1 << 24
_WRITER = "[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?"
_LIST = re.compile(rf"({_WRITER})\.json")
NAME = re.compile(f"({_WRITER})-([0-9]{{6}})\\.(safetensors|part|log)")


@dataclass(frozen=True)
class Entry:
    """A sealed shard as its manifest names it: rows, bytes of the file, and their SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @property
    def stem(self) -> str:
        """The name without its ending, as that of the part was."""
        return self.file.removesuffix(".safetensors")


@dataclass(frozen=True)
class Manifest:
    """The sealed shards of one writer. Where two hold a slot, the writer of lower order wins."""

    order: int = 0
    shards: tuple[Entry, ...] = ()

    def encoded(self) -> bytes:
        """As JSON, whose last entry is the SHA-256 of the rest."""
        told: dict[str, Any] = {"format": 1, **asdict(self)}
        told["sha256"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        return (json.dumps(told, indent=1) + "\n").encode()


def check_writer(name: str) -> None:
    """Refuse what cannot be a writer's name."""
    if not re.fullmatch(_WRITER, name) or f"{name}.json" == ABOUT:
        raise UsageError(
            f"writer is {name!r}, but names of writers are 1 to 64 small letters, digits, _ and -, "
            "and not 'about'; choose another"
        )


def read_manifest(folder: Path, writer: str) -> Manifest:
    """The manifest of a writer, equal to the bit to what was written; an empty one for none.

    Raises:
        DataError: it is damaged, or lists what is no shard of this writer.
    """
    path = folder / f"{writer}.json"
    with naming(path):
        try:
            check_plain(path)
        except FileNotFoundError:
            return Manifest()
        with reading(path) as descriptor:
            data = os.pread(descriptor, _MOST_BYTES + 1, 0)
    try:
        told = json.loads(data)
        shards = [Entry(e["file"], e["rows"], e["bytes"], e["sha256"]) for e in told["shards"]]
        manifest = Manifest(told["order"], tuple(shards))
        sound = len(data) <= _MOST_BYTES and manifest.encoded() == data
        sound = sound and _is_sound(manifest, writer)
    except (ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise DataError(
            f"{path}: is not the list of shards that was written; restore it from a copy, or "
            f"remove it with {writer}-*.safetensors, whose rows are then asked for again"
        )
    return manifest


def _is_sound(manifest: Manifest, writer: str) -> bool:
    names = [NAME.fullmatch(entry.file) for entry in manifest.shards]
    return (
        type(manifest.order) is int
        and all(name and name[1] == writer and name[3] == "safetensors" for name in names)
        and len({entry.file for entry in manifest.shards}) == len(names)
        and all(type(n) is int and n > 0 for e in manifest.shards for n in (e.rows, e.bytes))
        and all(isinstance(entry.sha256, str) for entry in manifest.shards)
    )


def survey(folder: Path) -> tuple[set[str], dict[str, set[str]]]:
    """The writers that have files here; and by stem, ``WRITER-000000``, the kinds of its files.

    Only names are looked at: a name of another form is none of ours.
    """
    writers: set[str] = set()
    kinds: dict[str, set[str]] = {}
    with naming(folder):
        names = os.listdir(folder)
    for name in names:
        if match := NAME.fullmatch(name):
            kinds.setdefault(f"{match[1]}-{match[2]}", set()).add(match[3])
            writers.add(match[1])
        elif (match := _LIST.fullmatch(name)) and name != ABOUT:
            writers.add(match[1])
    return writers, kinds


def writer_of(stem: str) -> str:
    """Whose shard this is."""
    return stem[:-7]


def number_of(stem: str) -> int:
    """Which of its writer's shards this is."""
    return int(stem[-6:])
