"""The files of a teacher's cache: rows by slot, written once, read at the speed of memory.

Each writer has shards of its own. The one it is filling survives the end of the process, however
it ends, but for the batch in flight; a full one is sealed, hashed and listed in ``WRITER.json``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.runtime import Closing, DataError, RunExistsError, UsageError
from attar.runtime.files import hash_file, make_folder
from attar.teachers.joining import join
from attar.teachers.manifest import Entry, check_writer, read_manifest, survey, writer_of
from attar.teachers.part import Writer
from attar.teachers.shard import (
    SLOTS,
    Arrays,
    Field,
    Layout,
    check_slots,
    damaged,
    history,
    mapped,
    mapped_part,
)
from attar.teachers.verifying import faults

__all__ = ["Field", "Store", "join"]

Slots = NDArray[np.int64]
_MISSING = 1 << 62  # above all others, so that one maximum finds it
_ROW = (1 << 32) - 1
_MOST_SLOTS = 1 << 32
_HASHED_AT_OPEN = 64 << 20  # bytes


@dataclass
class _Followed:
    """A part that another process fills: where its rows are, and the lines of its log we know."""

    shard: int
    arrays: Arrays
    lines: int


class Store(Closing):
    """Rows by slot, in a folder that several writers may fill at once, each in its own name.

    Opening reads what all of them have written. A writer takes its name with its first row, and
    gives it back at ``close``.

    Args:
        folder: where the files lie; a writer makes it.
        slots: how many slots there are, numbered from 0.
        fields: what a row holds.
        writer: the name to write under: small letters, digits, ``_`` and ``-``. None reads.
        shard_bytes: about how large a shard becomes.

    Raises:
        DataError: a file is damaged or of another cache; the error names it and says what to do.
        UsageError: slots, fields or a name that no cache can have.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        slots: int,
        fields: Sequence[Field],
        writer: str | None = None,
        shard_bytes: int = 256 << 20,
    ) -> None:
        if not 0 < slots <= _MOST_SLOTS:
            raise UsageError(f"slots is {slots}, but a cache has 1 to {_MOST_SLOTS}")
        if writer is not None:
            check_writer(writer)
        self.folder = Path(folder)
        self._layout = Layout(fields)
        self._slots = slots
        self._index = np.full(slots, _MISSING, dtype=np.int64)
        self._filled = 0
        self._shards: list[Arrays] = []
        self._opened: set[str] = set()
        self._followed: dict[str, _Followed] = {}
        self._name, self._shard_bytes = writer, shard_bytes
        self._process = os.getpid()
        self._writer: Writer | None = None
        self._closed = False
        if writer is not None:
            make_folder(self.folder)
        self.refresh()

    @property
    def filled(self) -> int:
        """How many slots have a row."""
        return self._filled

    def known(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots have a row."""
        return self._codes(_as_slots(slots)) != _MISSING

    def take(self, slots: Slots) -> Arrays:
        """The rows of these slots, in this order, in arrays of their own.

        Raises:
            DataError: a slot has no row; the first such is named.
        """
        slots = _as_slots(slots)
        codes = self._codes(slots)
        last = int(codes[codes.argmax()]) if len(codes) else 0
        if last == _MISSING:
            raise DataError(
                f"{self.folder}: slot {slots[codes.argmax()]} has no row yet; go on with the "
                "command that fills this cache"
            )
        shard = last >> 32
        if shard == 0 and self._shards:  # as all are, in most caches
            return self._gathered(0, codes)
        if not len(codes):
            return self._empty()
        if int(codes[codes.argmin()]) >> 32 == shard:
            return self._gathered(shard, codes & _ROW)
        return self._scattered(codes)

    def _gathered(self, shard: int, rows: Slots) -> Arrays:
        return {name: array.take(rows, 0) for name, array in self._shards[shard].items()}

    def _scattered(self, codes: Slots) -> Arrays:
        """Gather shard by shard, and then bring what was gathered into its order."""
        order = codes.argsort()
        codes = codes.take(order)
        bounds = np.arange(len(self._shards) + 1, dtype=np.int64) << 32
        starts = codes.searchsorted(bounds).tolist()
        pieces = [piece for piece in enumerate(pairwise(starts)) if piece[1][0] < piece[1][1]]
        rows = codes & _ROW
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        taken = {}
        for name, first in self._shards[0].items():
            gathered = np.empty((len(codes), *first.shape[1:]), first.dtype)
            for shard, (start, stop) in pieces:
                array = self._shards[shard][name]
                array.take(rows[start:stop], 0, gathered[start:stop], "clip")
            taken[name] = gathered.take(back, 0)
        return taken

    def add(self, slots: Slots, rows: Mapping[str, NDArray[Any]]) -> None:
        """Commit a batch: when this returns, no end of the process can lose it.

        A slot that has a row already is passed over; of a slot given twice the first counts.

        Args:
            slots: [n]
            rows: by name of the field, [n, ...], of the very type and shape of the field.

        Raises:
            RunExistsError: another process writes under this name.
            UsageError: arrays that are not those of the fields, or a store opened to be read.
            OSError: the disk failed or is full; ``filename`` is the file concerned. What was
                committed before is safe, and ``add`` may be called again.
        """
        slots = _as_slots(slots)
        arrays = self._checked(slots, rows)
        places = self._missing(slots)
        if not len(places):
            return
        if os.getpid() != self._process:
            raise UsageError("a store is written to by the process that opened it; open it here")
        if self._writer is None:
            self._writer = self._begun()
            places = self._missing(slots)  # what was left under our name is known now
        if len(places) < len(slots):
            arrays = {name: array[places] for name, array in arrays.items()}
        start = 0
        while start < len(places):
            part = self._writer.with_room()
            if part.shard < 0:
                part.shard = self._place(part.arrays)
            stop = min(len(places), start + part.room)
            batch = {name: array[start:stop] for name, array in arrays.items()}
            first = part.add(batch)
            self._enter(batch[SLOTS], part.shard, first)
            start = stop

    def refresh(self) -> None:
        """See what other writers have committed since."""
        if self._closed:
            raise UsageError(f"{self.folder}: this store is closed; open another")
        for _ in range(3):  # a shard that is sealed while we look has moved by the next look
            if self._look():
                return

    def close(self) -> None:
        """Seal what is being filled, and let the files go; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._index = np.empty(0, dtype=np.int64)
        self._shards, self._followed = [], {}
        if os.getpid() != self._process:
            return
        if self._writer is None and self._name is not None:
            self._writer = self._heir(self._name)
        if self._writer is not None:
            try:
                self._writer.finish()
            finally:
                self._writer.close()

    def shards(self) -> list[dict[str, Any]]:
        """The sealed shards of all writers: file, rows, bytes, sha256."""
        if self._writer is not None:
            self._writer.wait()
        writers, _ = survey(self.folder)
        lists = [read_manifest(self.folder, writer) for writer in sorted(writers)]
        return [asdict(entry) for manifest in lists for entry in manifest.shards]

    def verify(self) -> list[str]:
        """Read every byte again; returns a sentence for each fault, none where all is sound."""
        if self._writer is not None:
            self._writer.wait()
        return list(faults(self.folder, self._layout, self._slots))

    # Slots

    def _codes(self, slots: Slots) -> Slots:
        """Where the rows are: the number of the shard times 2**32, plus the row."""
        try:
            if not len(slots) or slots[slots.argmin()] >= 0:
                return self._index.take(slots)
        except IndexError:
            pass
        if self._closed:
            raise UsageError(f"{self.folder}: this store is closed; open another")
        wrong = slots[(slots < 0) | (slots >= len(self._index))][0]
        raise UsageError(
            f"{self.folder}: slot {wrong} is none of the {len(self._index)} slots of this cache, "
            "which are numbered from 0; give the ids of the data it was made for"
        )

    def _missing(self, slots: Slots) -> NDArray[np.intp]:
        """The places, in *slots*, of those without a row; of equal ones the first."""
        places = np.flatnonzero(self._codes(slots) == _MISSING)
        firsts = np.unique(slots[places], return_index=True)[1]
        return places if len(firsts) == len(places) else places[np.sort(firsts)]

    def _enter(self, slots: Slots, shard: int, first: int) -> int:
        """Note where these slots are, but for those that are somewhere already; how many."""
        codes = np.arange(len(slots), dtype=np.int64) + ((shard << 32) + first)
        fresh = self._index[slots] == _MISSING
        if not fresh.all():
            slots, codes = slots[fresh], codes[fresh]
        self._index[slots] = codes
        count = int((self._index[slots] == codes).sum())
        self._filled += count
        return len(slots) - count

    def _checked(self, slots: Slots, rows: Mapping[str, NDArray[Any]]) -> Arrays:
        """The rows as they are written, slots included; refuses what is not of the fields."""
        given, known = sorted(rows), sorted({f.name for f in self._layout.fields} - {SLOTS})
        if given != known:
            raise UsageError(f"the rows have the fields {given}, but this cache keeps {known}")
        arrays = {SLOTS: np.ascontiguousarray(slots)}
        for field in self._layout.fields:
            if field.name == SLOTS:
                continue
            array, shape = np.asarray(rows[field.name]), (len(slots), *field.shape)
            if array.dtype != np.dtype(field.dtype) or array.shape != shape:
                raise UsageError(
                    f"field {field.name!r} of {len(slots)} slots is {array.dtype} "
                    f"{list(array.shape)}, but this cache keeps {field.dtype} {list(shape)}; "
                    "convert it"
                )
            arrays[field.name] = np.ascontiguousarray(array)
        return arrays

    # Reading

    def _look(self) -> bool:
        """Open what is new; False where a file went away meanwhile, which is one just sealed."""
        writers, kinds = survey(self.folder)
        if self._writer is not None:
            writers.discard(self._writer.name)
        lists = [(read_manifest(self.folder, writer), writer) for writer in sorted(writers)]
        lists.sort(key=lambda pair: pair[0].order)
        new = [
            (entry, writer)
            for manifest, writer in lists
            for entry in manifest.shards
            if entry.stem not in self._opened
        ]
        small = sum(entry.bytes for entry, _ in new) <= _HASHED_AT_OPEN
        for entry, writer in new:
            with suppress(FileNotFoundError):  # removed, as an error may have told to
                self._open(entry, writer, hashed=small)
        whole = True
        for stem in sorted(kinds):
            if "log" in kinds[stem] and writer_of(stem) in writers and stem not in self._opened:
                try:
                    self._follow(stem)
                except FileNotFoundError:
                    whole = False
        return whole

    def _open(self, entry: Entry, writer: str, *, hashed: bool) -> None:
        path = self.folder / entry.file
        arrays = mapped(path, self._layout, self._slots)
        rows = len(arrays[SLOTS])
        if (rows, self._layout.size(rows)) != (entry.rows, entry.bytes):
            raise damaged(path, f"has {rows} rows and not {entry.rows} as {writer}.json says")
        if hashed and hash_file(path) != entry.sha256:
            raise damaged(path, f"has another SHA-256 than {writer}.json says")
        check_slots(path, arrays[SLOTS], self._slots)
        if self._enter(arrays[SLOTS], self._place(arrays), 0):
            raise damaged(path, "holds a slot twice")
        self._opened.add(entry.stem)
        self._followed.pop(entry.stem, None)

    def _follow(self, stem: str) -> None:
        """Read on in the log of a part, and take in the rows that it says are there."""
        if stem not in self._followed:
            arrays = mapped_part(self.folder, stem, self._layout, self._slots)
            self._followed[stem] = _Followed(self._place(arrays), arrays, 0)
        known = self._followed[stem]
        past = history(self.folder / f"{stem}.log", known.lines, known.arrays)
        for commit in past.sound:
            slots = known.arrays[SLOTS][commit.first : commit.first + commit.rows]
            check_slots(self.folder / f"{stem}.part", slots, self._slots)
            self._enter(slots, known.shard, commit.first)
        known.lines = past.lines

    def _place(self, arrays: Arrays) -> int:
        """Give a shard its number."""
        self._shards.append({name: array for name, array in arrays.items() if name != SLOTS})
        return len(self._shards) - 1

    def _empty(self) -> Arrays:
        named = {field.name: field for field in self._layout.fields if field.name != SLOTS}
        return {name: np.empty((0, *f.shape), f.dtype) for name, f in named.items()}

    # Writing

    def _begun(self) -> Writer:
        """The writer, who takes the name and goes on in what was left under it."""
        if self._name is None:
            raise UsageError(f"{self.folder}: was opened to be read; give writer a name")
        writer = self._taken(self._name)
        try:
            self.refresh()
        except BaseException:
            writer.close()
            raise
        for part in writer.parts:
            part.shard = self._followed.pop(part.stem).shard
        return writer

    def _taken(self, name: str) -> Writer:
        return Writer(self.folder, name, self._layout, self._slots, self._shard_bytes)

    def _heir(self, name: str) -> Writer | None:
        """Who seals what an earlier process of our name has left, if it is there and at rest."""
        with suppress(RunExistsError, OSError):
            _, kinds = survey(self.folder)
            if any(writer_of(stem) == name and "log" in kinds[stem] for stem in kinds):
                return self._taken(name)
        return None


def _as_slots(slots: Slots) -> Slots:
    slots = np.asarray(slots)
    if slots.ndim != 1 or slots.dtype.kind not in "iu":
        raise UsageError(
            f"slots are {slots.dtype} {list(slots.shape)}, but must be whole numbers in one row"
        )
    return slots.astype(np.int64, copy=False)
