"""Caches of one teacher, filled in different places, brought together."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from attar.runtime import DataError, UsageError
from attar.runtime.files import (
    hash_file,
    make_folder,
    naming,
    reading,
    sync_folder,
    write_atomic,
    write_new,
)
from attar.teachers.about import ABOUT, HEAD, MADE, difference, read_about
from attar.teachers.manifest import Entry, Manifest, read_manifest, survey, writer_of
from attar.teachers.part import locked
from attar.teachers.shard import check_plain


def join(into: str | Path, parts: Sequence[str | Path]) -> None:
    """Bring the shards of other folders into one, which may be new; each file is hashed on its way.

    Files are linked where the file system can, and copied elsewhere. Where two folders hold a
    slot, what is in *into* wins, then the first of *parts*. Joining again adds nothing.

    Args:
        into: a cache, or a folder that becomes one.
        parts: caches that were made alike: their ``about.json`` differs in ``made`` at most.

    Raises:
        UsageError: *parts* is empty, or holds *into*.
        DataError: a folder is of another cache, damaged, or still being filled.
        RunExistsError: another process writes into *into* under a name that is needed.
    """
    target, folders = Path(into), [Path(part) for part in parts]
    if not folders or target.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"{target}: give one or more other folders to bring into this one")
    told = {folder: read_about(folder) for folder in folders}
    first = target if (target / ABOUT).exists() else folders[0]
    known = read_about(first)
    for folder, about in told.items():
        if found := difference({**known, MADE: None}, {**about, MADE: None}):
            raise DataError(
                f"{folder}: is not the same cache as {first}: {found}; join caches of one teacher, "
                "data and form"
            )
        _check_sealed(folder)
    make_folder(target)
    if first is not target:
        if (first / HEAD).exists():
            check_plain(first / HEAD)
            write_atomic(target / HEAD, (first / HEAD).read_bytes())
        write_atomic(target / ABOUT, (json.dumps(known, indent=2) + "\n").encode())
    for folder in folders:
        writers, _ = survey(folder)
        lists = [(read_manifest(folder, writer), writer) for writer in sorted(writers)]
        for manifest, writer in sorted(lists, key=lambda pair: pair[0].order):
            _adopt(target, folder, writer, manifest)


def _check_sealed(folder: Path) -> None:
    _, kinds = survey(folder)
    for stem in sorted(kinds):
        if "log" in kinds[stem]:
            raise DataError(
                f"{folder}: {writer_of(stem)!r} has not finished here; let the command that fills "
                "this folder come to its end, and join then"
            )


def _adopt(target: Path, folder: Path, writer: str, manifest: Manifest) -> None:
    """Bring the shards of one writer, under its name or, where that is taken, another."""
    writers, kinds = survey(target)
    lists = {each: read_manifest(target, each) for each in writers}
    have = {entry.sha256 for each in lists.values() for entry in each.shards}
    new = [entry for entry in manifest.shards if (folder / entry.file).exists()]
    new = [entry for entry in new if entry.sha256 not in have]
    if not new:
        return
    taken = {each for each in lists if lists[each].shards}
    taken |= {writer_of(stem) for stem in kinds if "log" in kinds[stem]}
    name = next(n for n in _names(writer) if n not in taken)
    order = 1 + max((each.order for each in lists.values() if each.shards), default=-1)
    with locked(target, name):
        entries = [
            replace(entry, file=_brought(folder, entry, target, f"{name}-{number:06d}.safetensors"))
            for number, entry in enumerate(new)
        ]
        sync_folder(target)
        write_atomic(target / f"{name}.json", Manifest(order, tuple(entries)).encoded())


def _names(writer: str) -> Iterator[str]:
    yield writer
    for number in count(2):
        yield f"{writer[:57]}-{number}"


def _brought(folder: Path, entry: Entry, target: Path, name: str) -> str:
    """Link or copy a shard whose content is what its list says; returns its new name."""
    source, draft = folder / entry.file, target / f".{name}.tmp-{os.getpid()}"
    check_plain(source)
    if hash_file(source) != entry.sha256:
        raise DataError(
            f"{source}: has another SHA-256 than its list says; remove it there, and its rows are "
            "asked for again"
        )
    with suppress(FileNotFoundError):
        os.unlink(draft)
    try:
        with naming(target / name, draft=draft):
            try:
                os.link(source, draft, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                with reading(source) as descriptor:
                    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                write_new(draft, memoryview(content))
            os.replace(draft, target / name)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
    return name


# Another disk, a file system without links, one that forbids them, or a file of too many.
_NO_LINK = {errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK, errno.ENOSYS}
