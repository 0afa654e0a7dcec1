"""A teacher that is asked once: its answers by row, in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import attar
from attar.data import Augmentation, Source
from attar.data.augment import spelled
from attar.data.contents import contents
from attar.data.draw import augmented
from attar.data.source import VIEW_SEED
from attar.runtime import (
    DataError,
    PreflightError,
    RunExistsError,
    described,
    write_json,
)
from attar.teachers.about import ABOUT, MADE, difference, read_about
from attar.teachers.columns import (
    CONTENT,
    AnyColumn,
    Column,
    HeadColumn,
    Keep,
    Slots,
    head_column,
    read_column,
)
from attar.teachers.fingerprint import fingerprint_or_refuse
from attar.teachers.store import Field, Store

VERSION = 1
Batch = dict[str, Tensor]

_SAMPLE = 64  # rows that are compared with the data when a stage opens
_MOST_WRITERS = 100  # processes that fill one cache at once under one name
_PATIENCE = 5.0  # seconds between two looks at what other processes have written


def asked_of(
    teacher: Any,
    data: Source,
    addresses: Sequence[str],
    *,
    views: int | None,
    augment: Sequence[Augmentation],
    keep: Keep,
) -> dict[str, Any]:
    """Who was asked what, as JSON: all that must be the same for an answer to be the same."""
    return {
        "teacher": fingerprint_or_refuse(teacher, "the teacher"),
        "data": {"rows": len(data), "sha256": data.fingerprint()},
        "augment": spelled(augment),
        "views": views or 1,
        "addresses": sorted(addresses),
        "keep": described(keep),
    }


def check_views(views: int | None, augment: Sequence[Augmentation]) -> None:
    """Refuse pixels of which a cache could hold but a part."""
    if augment and (views is None or views == 1):
        names = ", ".join(
            getattr(getattr(change, "func", change), "__name__", type(change).__name__)
            for change in augment
        )
        what = "every epoch has new pixels" if views is None else "one view is no augmentation"
        raise PreflightError(
            f"the data are augmented ({names}): {what}, and a cached teacher answers for pixels "
            "it was asked about; give views: N, with N of 2 or more, or leave augment out"
        )


class Cached:
    """Answers ``teacher(batch) -> {address: tensor}`` from a folder; no teacher is needed.

    Args:
        folder: what ``attar.cache`` made.

    Raises:
        DataError: the folder is no cache, or is damaged.
    """

    model: Any = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.asked, self._columns = _read_about(self.folder)
        self._store: Store | None = None
        self._device = torch.device("cpu")

    @property
    def views(self) -> int:
        """How many augmented versions of each row there are."""
        return int(self.asked["views"])

    def __len__(self) -> int:
        """How many rows the data have."""
        return int(self.asked["data"]["rows"])

    def fingerprint(self) -> Any:
        """That of the teacher who was asked."""
        return self.asked["teacher"]

    @property
    def columns(self) -> Mapping[str, AnyColumn]:
        """What is kept, by address."""
        return self._columns

    @property
    def fields(self) -> list[Field]:
        """The arrays of the folder."""
        return [CONTENT, *(field for each in self._columns.values() for field in each.fields)]

    def check_teacher(self, teacher: Any) -> None:
        """Refuse another teacher than the one who was asked; the error names the field."""
        if found := difference(self.asked["teacher"], teacher.fingerprint(), "teacher"):
            raise PreflightError(f"{self.folder}: was made with another teacher: {found}")

    @property
    def store(self) -> Store:
        """The rows, opened where they were not."""
        if self._store is None:
            self._open_store()
        assert self._store is not None
        return self._store

    def open(self, addresses: Sequence[str] = (), device: torch.device | None = None) -> Self:
        """Make ready to answer *addresses*; refuses one that is not kept."""
        for address in addresses:
            if address not in self._columns:
                raise PreflightError(
                    f"{self.folder}: the teacher was not asked for {address}, but for "
                    f"{', '.join(self._columns)}; make a cache with it"
                )
        self._device = device or torch.device("cpu")
        self._place()
        if missing := len(self) * self.views - self.store.filled:
            raise PreflightError(
                f"{self.folder}: {missing:,} of {len(self) * self.views:,} answers are missing; "
                "go on with the command that made it, which asks for them alone"
            )
        return self

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """What the teacher said of these rows."""
        return self._answer(self._slots(batch))

    def check_source(
        self, data: Any, *, views: int | None, augment: Sequence[Augmentation]
    ) -> None:
        """Refuse data that are not those the teacher was asked about; the error names the field."""
        check_views(views, augment)
        given = {
            "data": {"rows": len(data), "sha256": data.fingerprint()},
            "augment": spelled(augment),
            "views": views or 1,
        }
        if found := difference({name: self.asked[name] for name in given}, given):
            raise PreflightError(f"{self.folder}: is for other data: {found}")
        self._check_rows(data, augment)

    def _check_rows(self, data: Any, augment: Sequence[Augmentation]) -> None:
        """Read a sample of the rows again; each must be what it was when the teacher saw it."""
        total = len(self) * self.views
        slots = np.arange(0, total, -(-total // _SAMPLE), dtype=np.int64)
        slots = slots[self.store.known(slots)]
        kept = self.store.take(slots)[CONTENT.name]
        for view in np.unique(slots // len(self)):
            chosen = slots // len(self) == view
            ids = torch.from_numpy(slots[chosen] % len(self))
            now = contents(augmented(data, ids, augment, seed=VIEW_SEED, view=int(view)))
            if (wrong := now != kept[chosen]).any():
                raise DataError(
                    f"{self.folder}: row {int(ids[int(wrong.argmax())])} of {data.name} is not "
                    "what the teacher was asked about, though the rest looks the same; make the "
                    "cache anew"
                )

    def close(self) -> None:
        """Let the files go."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _open_store(self, writer: str | None = None) -> None:
        self._place()
        slots = len(self) * self.views
        self._store = Store(self.folder, slots=slots, fields=self.fields, writer=writer)

    def _place(self) -> None:
        """Last layers that are kept lie where they are used."""
        for address, column in self._columns.items():
            if isinstance(column, HeadColumn):
                self._columns[address] = column.to(self._device)

    def _slots(self, batch: Batch) -> Slots:
        if "ids" not in batch:
            raise DataError("the batch has no ids, by which a cached teacher knows its rows")
        slots: Slots = batch["ids"].cpu().numpy()
        return slots + int(batch["view"]) * len(self) if "view" in batch else slots

    def _answer(self, slots: Slots) -> dict[str, Any]:
        rows = self.store.take(slots)
        told = {address: column.decode(rows) for address, column in self._columns.items()}
        if self._device.type == "cpu":
            return told
        return {address: value.to(self._device) for address, value in told.items()}


class Filling(Cached):
    """A teacher that is asked for what its cache does not have yet, and then never again.

    Args:
        teacher: a live one, that stays as it is.
        data: the rows it is asked about.
        root: folder of caches; each has a name made of who was asked what.
        folder: this very one instead.
        views, augment: as the stage is going to use them.
        keep: the form of what is kept.

    Attributes:
        count: how many answers the teacher has given to this object.
    """

    def __init__(
        self,
        teacher: Any,
        data: Source,
        *,
        root: str | Path = "runs/cache",
        folder: str | Path | None = None,
        views: int | None = None,
        augment: Sequence[Augmentation] = (),
        keep: Keep | None = None,
        writer: str = "rank0",
    ) -> None:
        check_views(views, augment)
        if hasattr(teacher, "follow"):
            raise PreflightError(
                "a teacher that follows the student says something else every time; leave cache out"
            )
        self.teacher = teacher
        self.model = getattr(teacher, "model", None)
        self.data = data
        self._keep = keep or Keep()
        self._root = Path(root)
        self._given = None if folder is None else Path(folder)
        self._how: dict[str, Any] = {"views": views, "augment": tuple(augment), "keep": self._keep}
        self._writer = writer
        self._store = None
        self._columns = {}
        self._layers: dict[str, tuple[str, nn.Linear]] = {}
        self._looked = time.monotonic()
        self._device = torch.device("cpu")
        self.count = 0

    def open(self, addresses: Sequence[str] = (), device: torch.device | None = None) -> Self:
        """Open the teacher, and what there is of its cache."""
        self._device = device or torch.device("cpu")
        self.asked = asked_of(self.teacher, self.data, addresses, **self._how)
        self.folder = self._given or self._root / _name(self.asked)
        self._layers = self._heads(addresses) if self._keep.head else {}
        self.teacher.open([self._instead(address) for address in addresses], device)
        if (self.folder / ABOUT).exists():
            self._join()
        return self

    def _join(self) -> None:
        """Go on with a folder that is there."""
        asked, self._columns = _read_about(self.folder)
        if found := difference(asked, self.asked):
            raise PreflightError(f"{self.folder}: is the cache of something else: {found}")
        self._open_store(self._writer)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """What the teacher says, or has said, of these rows."""
        slots = self._slots(batch)
        if self._store is None or self._store.filled < len(self) * self.views:
            self._ask(batch, slots)
        return self._answer(slots)

    def refresh(self) -> None:
        """See what other processes have kept since."""
        if self._store is not None:
            self._store.refresh()
        elif (self.folder / ABOUT).exists():
            self._join()

    def known(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots (view x rows + row) an answer is kept of."""
        if self._store is None:
            return np.zeros(len(slots), dtype=bool)
        return self._store.known(slots)

    def check(self) -> None:
        """Refuse a teacher that has changed."""
        if hasattr(self.teacher, "check"):
            self.teacher.check()

    def close(self) -> None:
        """Keep what was said, and close the teacher."""
        try:
            super().close()
        finally:
            self.teacher.close()

    def _check_rows(self, data: Any, augment: Sequence[Augmentation]) -> None:
        if self._store is not None:  # else there is no row yet
            super()._check_rows(data, augment)

    def _ask(self, batch: Batch, slots: Slots) -> None:
        missing = np.ones(len(slots), dtype=bool)
        if self._store is not None:
            missing = ~self._store.known(slots)
            if missing.any() and time.monotonic() - self._looked > _PATIENCE:
                self._looked = time.monotonic()
                self._store.refresh()
                missing = ~self._store.known(slots)
            if not missing.any():
                return
        whole = bool(missing.all())
        part = batch if whole else _some(batch, torch.from_numpy(missing))
        told = self.teacher(part)
        self.count += int(missing.sum())
        if self._store is None:
            self._begin(told, len(slots))
        assert self._store is not None
        wanted = slots[missing]
        rows = {CONTENT.name: contents(part)}
        for address, column in self._columns.items():
            rows |= column.encode(told[self._instead(address)], wanted)
        self._add(wanted, rows)

    def _add(self, slots: Slots, rows: Mapping[str, NDArray[Any]]) -> None:
        """Keep rows; where another process of our name keeps some, under another name."""
        assert self._store is not None
        try:
            self._store.add(slots, rows)
        except RunExistsError:
            name, _, number = self._writer.partition("_")
            self._writer = f"{name}_{int(number or 0) + 1}"
            if int(number or 0) > _MOST_WRITERS:
                raise
            self._store.close()
            self._open_store(self._writer)
            self._add(slots, rows)

    def _begin(self, told: Mapping[str, Any], rows: int) -> None:
        """Make the folder, now that it is known what an answer looks like."""
        for address in self.asked["addresses"]:
            column: AnyColumn = self._keep.column(address, told[self._instead(address)], rows)
            if address in self._layers:
                assert isinstance(column, Column)
                column = head_column(column, self._layers[address][1])
            if isinstance(column, HeadColumn):
                column.save(self.folder)
            elif self._keep.head and address.startswith("output:"):
                raise PreflightError(
                    "keep: head is for a teacher whose logits are those of its last linear layer, "
                    "and this one has no such layer; leave head out"
                )
            self._columns[address] = column
        _write_about(self.folder, self.asked, self._columns)
        self._open_store(self._writer)

    def _instead(self, address: str) -> str:
        """What is asked for in the place of logits that are kept as what makes them."""
        return self._layers[address][0] if address in self._layers else address

    def _heads(self, addresses: Sequence[str]) -> dict[str, tuple[str, nn.Linear]]:
        task = getattr(self.teacher, "task", None)
        if task is None or task.criterion is not None:  # its answers hold the layer themselves
            return {}
        layer = None if self.model is None else task.head(self.model)
        if layer is None:
            return {}
        path = next(name for name, part in self.model.named_modules() if part is layer)
        main = f"output:{task.outputs[0]}"
        return {main: (f"input:{path}", layer)} if main in addresses else {}


def _some(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen rows of a batch; what is of no row stays."""
    return {k: v[chosen.to(v.device)] if v.ndim else v for k, v in batch.items()}


def _name(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _write_about(folder: Path, asked: Any, columns: Mapping[str, AnyColumn]) -> None:
    made = {
        "attar": attar.__version__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(
        folder / ABOUT,
        {
            "format": "attar-cache",
            "version": VERSION,
            "asked": asked,
            "signals": {address: column.to_json() for address, column in columns.items()},
            MADE: made,
        },
    )


def _read_about(folder: Path) -> tuple[dict[str, Any], dict[str, AnyColumn]]:
    told = read_about(folder)
    if told.get("format") != "attar-cache":
        raise DataError(f"{folder}: is no teacher's cache")
    if told.get("version") != VERSION:
        raise DataError(
            f"{folder}: is of version {told.get('version')!r} of the format, and this attar reads "
            f"version {VERSION}; make it anew"
        )
    asked, signals = told.get("asked"), told.get("signals")
    if isinstance(asked, dict) and isinstance(signals, dict):
        with suppress(TypeError, KeyError):
            sizes = (asked["data"]["rows"], asked["views"])
            if all(type(size) is int and size > 0 for size in sizes):
                return asked, {a: read_column(a, f, folder) for a, f in sorted(signals.items())}
    raise DataError(f"{folder / ABOUT}: does not say what was asked; make the cache anew")
