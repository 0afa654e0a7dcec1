"""What one writer of a teacher's cache does: it fills a part, and seals it into a shard."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.runtime import RunExistsError
from attar.runtime.files import (
    CHUNK,
    naming,
    sweep,
    sync_folder,
    write_atomic,
    write_new,
)
from attar.runtime.lock import Lock
from attar.teachers.manifest import Entry, Manifest, number_of, read_manifest, survey, writer_of
from attar.teachers.shard import LINE, SLOTS, Commit, Layout, damaged, history, mapped_part, raw


class Part:
    """A shard that is being filled, by the one process that holds the lock of its writer.

    Opening it reads what it has: all that earlier processes have committed.
    """

    def __init__(self, folder: Path, stem: str, layout: Layout, slots: int) -> None:
        self.stem = stem
        self.path, self.log = folder / f"{stem}.part", folder / f"{stem}.log"
        self.target = folder / f"{stem}.safetensors"
        self.arrays = mapped_part(folder, stem, layout, slots)
        self.capacity = len(self.arrays[SLOTS])
        self.runs: list[tuple[int, int]] = []  # rows that count: from, to
        self.shard = -1  # what the store calls it
        self._layout = layout
        self._offsets = dict(layout.places(self.capacity))
        self._digest: str | None = None
        self._placed = False
        self._distrusted = False
        past = history(self.log, 0, self.arrays)
        for commit in past.sound:
            self._count(commit.first, commit.rows)
        runs = [self.arrays[SLOTS][start:stop] for start, stop in self.runs]
        if runs and len(np.unique(np.concatenate(runs))) < sum(map(len, runs)):
            raise damaged(self.path, "holds a slot twice")
        # Rows of a line that is whole are not written again, be they damaged: others may have read
        # that line.
        self._lines, self._used = past.lines, past.used
        self._descriptors: list[int] = []
        try:
            for path in (self.path, self.log):
                with naming(path):
                    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._descriptors.append(os.open(path, flags))
            with naming(self.log):
                os.ftruncate(self._descriptors[1], self._lines * LINE)
        except BaseException:
            self.close()
            raise

    @classmethod
    def begin(cls, folder: Path, stem: str, layout: Layout, capacity: int) -> Part:
        """Make an empty one, whose header is on the disk before its first row."""
        path, log = folder / f"{stem}.part", folder / f"{stem}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with naming(path):
            descriptor = os.open(path, flags, 0o666)
        try:
            with naming(path):
                try:
                    os.ftruncate(descriptor, layout.size(capacity))
                    _put(descriptor, 0, memoryview(layout.header(capacity)), 0)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            write_new(log, b"")
            sync_folder(folder)
            return cls(folder, stem, layout, capacity)
        except BaseException:
            for each in (log, path):
                with suppress(OSError):
                    os.unlink(each)
            raise

    @property
    def room(self) -> int:
        """Rows that can still be added."""
        return self.capacity - self._used

    def add(self, rows: Mapping[str, NDArray[Any]]) -> int:
        """Commit a batch, slots included; returns its first row. It counts as we return."""
        first, count = self._used, len(rows[SLOTS])
        crc = 0
        with naming(self.path):
            for field, offset in self._offsets.items():
                place = offset + first * field.bytes
                crc = _put(self._descriptors[0], place, raw(rows[field.name]), crc)
        # Counted before the line is written: where that fails, somebody may have read the line
        # all the same, so these rows are not written again.
        self._used += count
        with naming(self.log):
            line = memoryview(Commit(first, count, crc).line())
            _put(self._descriptors[1], self._lines * LINE, line, 0)
        self._lines += 1
        self._count(first, count)
        return first

    def seal(self) -> Entry | None:
        """Make a shard of the rows that count; None where there are none.

        A second call goes on where the first one failed. The log stays until ``remove``.
        """
        rows = sum(stop - start for start, stop in self.runs)
        if not rows:
            return None
        if not self._placed:
            if self.runs == [(0, self.capacity)] and not self._distrusted:
                self._seal_in_place()
            else:
                self._seal_copy(rows)
        sync_folder(self.target.parent)
        assert self._digest is not None
        return Entry(self.target.name, rows, self._layout.size(rows), self._digest)

    def _seal_in_place(self) -> None:
        # What could not be synced once may be lost though syncing it again succeeds.
        self._distrusted = True
        with naming(self.path):
            os.fsync(self._descriptors[0])
        self._distrusted = False
        digest = hashlib.sha256(self._layout.header(self.capacity))
        for array in self.arrays.values():  # as they lie in the file, and without a copy
            digest.update(raw(array))
        self._digest = digest.hexdigest()
        with naming(self.path):
            os.rename(self.path, self.target)
        self._placed = True

    def _seal_copy(self, rows: int) -> None:
        sweep(self.target.parent, self.target.name)
        draft = self.target.with_name(f".{self.target.name}.tmp-{os.getpid()}")
        parts = [
            raw(self.arrays[field.name][start:stop])
            for field in self._layout.fields
            for start, stop in self.runs
        ]
        try:
            with naming(self.target, draft=draft):
                self._digest = write_new(draft, self._layout.header(rows), *parts)
                os.replace(draft, self.target)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft)
            raise
        self._placed = True

    def remove(self) -> None:
        """Remove part and log, once the shard is listed; what is open stays readable."""
        self.close()
        for path in (self.path, self.log):
            with naming(path), suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Let the files go, as they are."""
        if self._descriptors:
            try:
                with naming(self.path):
                    os.close(self._descriptors.pop())
            finally:
                self.close()

    def _count(self, first: int, rows: int) -> None:
        start = self.runs.pop()[0] if self.runs and self.runs[-1][1] == first else first
        self.runs.append((start, first + rows))


class Writer:
    """One writer's name and files, which are no other's until ``close``.

    Raises:
        RunExistsError: another process writes under this name.
    """

    def __init__(
        self, folder: Path, name: str, layout: Layout, slots: int, shard_bytes: int
    ) -> None:
        self.folder, self.name = folder, name
        self._layout = layout
        self._capacity = layout.capacity(shard_bytes, slots)
        self._slots = slots
        self._pool: ThreadPoolExecutor | None = None
        self._sealing: Future[None] | None = None
        self._full: list[Part] = []
        self._lock = locked(folder, name)
        try:
            self._manifest, found = self._recovered()
        except BaseException:
            self._lock.close()
            raise
        self.part = found.pop() if found else None
        self._full = found

    @property
    def parts(self) -> list[Part]:
        """All that is not sealed yet."""
        return [*self._full, *([self.part] if self.part else [])]

    def with_room(self) -> Part:
        """The part to add to; a full one is sealed meanwhile, by a thread."""
        if self.part is not None and not self.part.room:
            self.wait()
            self._full.append(self.part)
            self.part = None
            self._pool = self._pool or ThreadPoolExecutor(1, "attar-cache")
            self._sealing = self._pool.submit(self._seal_full)
        if self.part is None:
            _, kinds = survey(self.folder)
            stems = [*kinds, *(entry.stem for entry in self._manifest.shards)]
            numbers = [number_of(stem) for stem in stems if writer_of(stem) == self.name]
            stem = f"{self.name}-{max(numbers, default=-1) + 1:06d}"
            self.part = Part.begin(self.folder, stem, self._layout, self._capacity)
        return self.part

    def wait(self) -> None:
        """Until nothing is being sealed; an error of it is raised here, once."""
        task, self._sealing = self._sealing, None
        if task is not None:
            task.result()

    def finish(self) -> None:
        """Seal all there is."""
        with suppress(OSError):  # tried again below
            self.wait()
        if self.part is not None:
            self._full.append(self.part)
            self.part = None
        self._seal_full()

    def close(self) -> None:
        """Let go of the files, as they are, and of the name."""
        try:
            if self._pool is not None:
                self._pool.shutdown()
            for part in self.parts:
                part.close()
        finally:
            with naming(lock_of(self.folder, self.name)):
                self._lock.close()

    def _seal_full(self) -> None:
        while self._full:
            part = self._full[0]
            entry = part.seal()
            if entry is not None and entry not in self._manifest.shards:
                manifest = replace(self._manifest, shards=(*self._manifest.shards, entry))
                write_atomic(self.folder / f"{self.name}.json", manifest.encoded())
                self._manifest = manifest
            part.remove()
            self._full.pop(0)

    def _recovered(self) -> tuple[Manifest, list[Part]]:
        """Bring what a process that was cut has left into a state from which we go on.

        Returns:
            the shards that are listed and there, and the parts that are not sealed, oldest first.
        """
        manifest = read_manifest(self.folder, self.name)
        _, kinds = survey(self.folder)
        listed = [e for e in manifest.shards if "safetensors" in kinds.get(e.stem, ())]
        sealed = {entry.stem for entry in listed}
        parts = []
        for stem in sorted(stem for stem in kinds if writer_of(stem) == self.name):
            path = self.folder / stem
            if stem not in sealed and "log" in kinds[stem] and len(kinds[stem]) > 1:
                if "part" not in kinds[stem]:  # renamed, but not yet listed
                    with naming(path):
                        os.rename(path.with_suffix(".safetensors"), path.with_suffix(".part"))
                parts.append(Part(self.folder, stem, self._layout, self._slots))
                continue
            for kind in kinds[stem] - {"safetensors"}:
                with naming(path), suppress(FileNotFoundError):
                    os.unlink(path.with_suffix(f".{kind}"))
        return replace(manifest, shards=tuple(listed)), parts


def lock_of(folder: Path, writer: str) -> Path:
    """The file whose lock is a writer's name; it stays, or two could lock two of them."""
    return folder / f".{writer}.lock"


def locked(folder: Path, writer: str) -> Lock:
    """Take a writer's name."""
    path = lock_of(folder, writer)
    try:
        return Lock(path)
    except RunExistsError:
        holder = path.read_text(errors="replace").strip() or "unknown"
        raise RunExistsError(
            f"{folder}: process {holder} writes here as {writer!r}, and two cannot under one name; "
            "wait until it has ended, or write under another"
        ) from None


def _put(descriptor: int, place: int, data: memoryview, crc: int) -> int:
    """Write all of *data*; returns the CRC-32 that *crc* becomes with it."""
    for start in range(0, len(data), CHUNK):
        # Summed while it is warm: one pass over memory for both.
        chunk = data[start : start + CHUNK]
        crc = zlib.crc32(chunk, crc)
        while chunk:
            count = os.pwrite(descriptor, chunk, place)
            place, chunk = place + count, chunk[count:]
    return crc
