"""Every byte of a cache, read again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attar.runtime import DataError
from attar.runtime.files import hash_file
from attar.teachers.manifest import Entry, read_manifest, survey, writer_of
from attar.teachers.shard import SLOTS, Layout, check_slots, commits, damaged, mapped, mapped_part


def faults(folder: Path, layout: Layout, slots: int) -> Iterator[str]:
    """A sentence for each fault of a folder's lists, shards, parts and logs."""
    writers, kinds = survey(folder)
    listed: dict[str, Entry] = {}
    for writer in sorted(writers):
        try:
            listed |= {entry.stem: entry for entry in read_manifest(folder, writer).shards}
        except (DataError, OSError) as error:
            yield str(error)
    for entry in listed.values():
        try:
            _check_shard(folder / entry.file, entry, layout, slots)
        except FileNotFoundError:
            yield f"{folder / entry.file}: is listed but not there; its rows are asked for again"
        except (DataError, OSError) as error:
            yield str(error)
    for stem in sorted(kinds.keys() - listed):
        if "log" not in kinds[stem] and "safetensors" in kinds[stem]:
            path = folder / f"{stem}.safetensors"
            yield f"{path}: {writer_of(stem)}.json does not list it, so it is not used; remove it"
        if "log" in kinds[stem]:
            try:
                yield from _of_part(folder, stem, layout, slots)
            except FileNotFoundError:
                continue  # sealed while we looked
            except (DataError, OSError) as error:
                yield str(error)


def _check_shard(path: Path, entry: Entry, layout: Layout, slots: int) -> None:
    found = mapped(path, layout, slots)[SLOTS]
    if len(found) != entry.rows:
        raise damaged(path, f"has {len(found)} rows and not {entry.rows} as its list says")
    if hash_file(path) != entry.sha256:  # of a size that has been checked
        raise damaged(path, "has another SHA-256 than its list says")
    check_slots(path, found, slots)
    if len(np.unique(found)) < len(found):
        raise damaged(path, "holds a slot twice")


def _of_part(folder: Path, stem: str, layout: Layout, slots: int) -> Iterator[str]:
    arrays = mapped_part(folder, stem, layout, slots)
    for number, commit in enumerate(commits(folder / f"{stem}.log", 0, len(arrays[SLOTS])), 1):
        if commit is None:
            yield f"{folder / stem}.log: line {number} is damaged; its rows are asked for again"
        elif not commit.is_sound(arrays):
            yield (
                f"{folder / stem}.part: rows {commit.first} to {commit.first + commit.rows - 1} "
                "are not what was written; they are asked for again"
            )
        else:
            rows = arrays[SLOTS][commit.first : commit.first + commit.rows]
            check_slots(folder / f"{stem}.part", rows, slots)
