"""Checkpoints of a training that a crash, a full disk or a flipped bit cannot spoil unseen.

A checkpoint is a folder ``step-000000123``. It is written beside its place under a name of its
own, each file synced; then the folder is synced, renamed, its parent synced, and all of it read
back. Only then are older ones removed. ``LATEST`` names the newest for a human reader; nothing
here trusts it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from attar.runtime.errors import DataError, UsageError
from attar.runtime.files import at_work, make_folder, naming, remove, sync_folder, write_new
from attar.runtime.snapshot_format import (
    FACTS,
    MANIFEST,
    FileEntry,
    Manifest,
    Parts,
    check_part,
    check_step,
    encoded,
    names_in,
    read,
    sealed,
    serialized,
    verify,
)

LATEST = "LATEST"

_FOLDER = re.compile(r"step-([0-9]{9,18})(\.old-[0-9]+-[0-9]+)?")
_DRAFT = re.compile(r"(?:step-[0-9]{9,18}|LATEST)\.tmp-([0-9]{1,18})")


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint, read and verified: tensors on the CPU, in memory of their own."""

    step: int
    folder: Path
    facts: dict[str, Any]
    parts: Parts


class Snapshots:
    """Checkpoints of one training: a folder a step, newest kept, each whole or absent.

    For one process at a time; hold a `Lock` where two might meet.

    Args:
        folder: where they lie; made at the first save.
        keep: how many to keep, 2 or more: one alone is none when its disk fails.

    Raises:
        UsageError: *keep* is below 2.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 2:
            raise UsageError(
                f"keep is {keep}, but at least 2 checkpoints are kept, so that one is left when "
                f"the other is damaged; use keep=2"
            )
        self.folder = Path(folder)
        self._keep = keep
        # Read in full once by this object: pruning need not read them again at each save.
        self._verified: set[Path] = set()

    def save(
        self, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, read it back, and then remove those that are no longer kept.

        When it fails before the new one stands, the folder is as it was before.

        Args:
            step: 0 or more. A step that is there already is replaced, unless it is the same.
            parts: tensors by name, by part. Any type that safetensors can hold and read, on any
                device; tensors that share memory are written each by value.
            facts: what JSON can hold: None, bool, int, float, str, list, dict with str keys.
                Floats come back equal to the bit; infinities and NaN are written as the words
                ``Infinity`` and ``NaN``, which Python reads and strict JSON does not know.

        Returns:
            The folder of the checkpoint.

        Raises:
            UsageError: a name, a tensor or a fact that could not be read back; nothing written.
            OSError: the disk failed or is full; ``filename`` is the file concerned.
        """
        check_step(step)
        text = encoded(dict(facts))
        for part, tensors in parts.items():
            check_part(part, tensors)
        make_folder(self.folder)
        self._sweep()
        target = self.folder / _name(step)
        draft = _draft_of(target)
        with _clean(draft):
            manifest = _write_draft(draft, step, parts, text)
            if _is_same(target, manifest):
                remove(draft)
            else:
                _place(draft, target, step)
        self._verified.add(target)
        self._hint(target.name)
        self._prune(target, step)
        return target

    def latest(self, *, tell: Callable[[str], None] | None = None) -> Snapshot | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
            tell: is given one sentence for each newer checkpoint that was refused.

        Raises:
            DataError: there are checkpoints, but all are damaged.
            UsageError: the newest was written by a newer attar.
            OSError: the folder cannot be read.
        """
        try:
            found = self._found()
        except FileNotFoundError:
            return None
        with suppress(OSError):  # a folder that can only be read can still be resumed from
            self._sweep()
        for number, (step, folder) in enumerate(found, 1):
            try:
                facts, parts = read(folder, step)
            except DataError as error:
                last = f"checkpoint {folder} is damaged: {error}"
                if tell is not None and number < len(found):
                    tell(f"{last}; going on from the one before")
            else:
                self._verified.add(folder)
                return Snapshot(step, folder, facts, parts)
        if not found:
            return None
        raise DataError(
            f"{self.folder}: none of the {len(found)} checkpoints is whole ({last}); "
            f"restore one from a copy, or start again in another folder"
        )

    def _found(self) -> list[tuple[int, Path]]:
        """What may be a checkpoint, newest first; one that was set aside after its successor."""
        found = []
        for name in names_in(self.folder):
            match = _FOLDER.fullmatch(name)
            if match and name.startswith(_name(int(match[1]))):
                found.append((int(match[1]), match[2] is None, self.folder / name))
        return [(step, path) for step, _, path in sorted(found, reverse=True)]

    def _sweep(self) -> None:
        """Remove what dead processes, or failed saves of this one, left half-written."""
        for name in names_in(self.folder):
            match = _DRAFT.fullmatch(name)
            if match and not at_work(int(match[1])):
                remove(self.folder / name)

    def _hint(self, name: str) -> None:
        path = self.folder / LATEST
        draft = _draft_of(path)
        with _clean(draft), naming(path):
            write_new(draft, f"{name}\n".encode())
            os.replace(draft, path)

    def _prune(self, saved: Path, saved_step: int) -> None:
        """Remove what lies behind the newest whole ones, and other ones of a step that is kept.

        A damaged one, or one of another attar, does not count; it goes when its turn comes.
        """
        kept = {saved_step}
        for step, folder in self._found():
            if folder == saved:
                continue
            if step in kept or len(kept) >= self._keep:
                self._remove(folder, step)
            elif self._is_whole(folder, step):
                kept.add(step)

    def _remove(self, folder: Path, step: int) -> None:
        self._verified.discard(folder)
        # Renamed first: a half-removed one is never taken for a checkpoint.
        rubbish = _draft_of(self.folder / _name(step))
        with naming(folder):
            os.rename(folder, rubbish)
        remove(rubbish)

    def _is_whole(self, folder: Path, step: int) -> bool:
        if folder not in self._verified:
            try:
                verify(folder, step)
            except (DataError, UsageError):
                return False
            self._verified.add(folder)
        return True


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _draft_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _is_there(path: Path) -> bool:
    """Unlike `Path.exists`, a folder that cannot be read is an OSError and not an empty one."""
    return path.name in names_in(path.parent)


@contextmanager
def _clean(draft: Path) -> Iterator[None]:
    """Remove the draft when what is inside fails, as far as the disk lets us."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def _write_draft(
    draft: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: bytes
) -> Manifest:
    with naming(draft):
        os.mkdir(draft)
    files = [FileEntry(FACTS, len(facts), write_new(draft / FACTS, facts))]
    for part in sorted(parts):
        data = serialized(parts[part])  # one part at a time in memory
        name = f"{part}.safetensors"
        files.append(FileEntry(name, len(data), write_new(draft / name, data)))
        del data
    manifest = Manifest(step, tuple(files))
    write_new(draft / MANIFEST, sealed(manifest))
    sync_folder(draft)
    return manifest


def _is_same(target: Path, manifest: Manifest) -> bool:
    """Whether the checkpoint is there already, whole and of equal content."""
    if not _is_there(target):
        return False
    try:
        return verify(target, manifest.step) == manifest
    except DataError:
        return False


def _place(draft: Path, target: Path, step: int) -> None:
    """Rename the draft into its place and read it back; undo all of it when that fails."""
    aside = _set_aside(target) if _is_there(target) else None
    try:
        with naming(target):
            os.rename(draft, target)
        sync_folder(target.parent)
        try:
            verify(target, step)
        except DataError as error:
            broken = f"what was written does not read back ({error})"
            raise OSError(errno.EIO, broken, str(target)) from None
    except BaseException:
        with suppress(OSError):
            if not draft.exists():
                os.rename(target, draft)
            if aside is not None:
                os.rename(aside, target)
        raise


def _set_aside(target: Path) -> Path:
    """Rename a checkpoint to a name under which it is still found, should the swap be cut."""
    names = (target.with_name(f"{target.name}.old-{os.getpid()}-{n}") for n in count())
    aside = next(name for name in names if not _is_there(name))
    with naming(target):
        os.rename(target, aside)
    return aside
