"""The verb `cache`: a teacher, rows and addresses become a cached teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attar.data import Augmentation, Source
from attar.data.draw import augmented
from attar.data.reading import read
from attar.data.source import VIEW_SEED
from attar.losses import TopK
from attar.runtime import Bar, DataError, Ranks, connect, resolve_device, to_device
from attar.tasks import Task
from attar.teachers.cached import Cached, Filling
from attar.teachers.columns import Keep
from attar.teachers.live import Teacher

SAMPLE = 4096  # rows of which the mass that is not kept is told
NUMBER = 8  # bytes of a row's own number


def cache(
    teacher: Any,
    data: Source,
    task: Task,
    addresses: Sequence[str] = (),
    *,
    into: str | Path,
    views: int | None = None,
    augment: Sequence[Augmentation] = (),
    keep: Keep | None = None,
    batch_size: int = 256,
    device: str = "auto",
    progress: bool | None = None,
) -> Cached:
    """Ask *teacher* about every row of *data*, once, and keep what it says; returns that.

    A folder that is there already is gone on with: only what is missing is asked for. Under
    ``torchrun`` each process asks about its share and writes files of its own; folders that were
    filled on different machines are brought together by ``attar.teachers.join``.

    Args:
        teacher: an ``attar.Teacher``, a module, or anything that answers like a teacher and has a
            ``fingerprint()``.
        data: the rows, whose numbers the answers are kept by.
        task: what a batch means.
        addresses: what is asked for; the task's main output when left out.
        into: the folder.
        views: how many augmented versions of each row; the stage that learns from the cache has
            the same ``views`` and ``augment``. None where nothing is augmented.
        augment: functions of ``attar.data``, in order.
        keep: in what form, ``attar.teachers.Keep``.
        batch_size: rows the teacher is asked about at a time.
        progress: draw a bar; by default where standard error is a terminal.

    Raises:
        PreflightError: what cannot be cached, or a folder that is the cache of something else.
    """
    task = task.fitted(data)
    live = Teacher(teacher, task) if isinstance(teacher, nn.Module) else teacher
    asked = list(addresses) or [f"output:{task.outputs[0]}"]
    with connect("auto", device) as ranks:
        place = ranks.device if ranks.world > 1 else resolve_device(device)
        filling = Filling(
            live,
            data,
            folder=into,
            views=views,
            augment=augment,
            keep=keep,
            writer=f"rank{ranks.rank}",
        )
        try:
            filling.open(asked, place)
            filling.check_source(data, views=views, augment=augment)
            fill(filling, tuple(augment), batch_size, ranks, place, progress)
        finally:
            filling.close()
        ranks.barrier()
    return Cached(into)


def fill(
    filling: Filling,
    augment: tuple[Augmentation, ...],
    batch_size: int,
    ranks: Ranks,
    device: torch.device,
    progress: bool | None = None,
) -> None:
    """Ask about every row and view that no answer is kept of."""
    steps = -(-len(filling) // batch_size) * filling.views
    with Bar("cache", steps, show=progress if ranks.main else False) as bar:
        # Again where processes that know of different rows have shared them out: none is left out.
        while (missing := _missing(filling, ranks)) and any(len(ids) for ids in missing):
            done = 0
            for view, ids in enumerate(missing):
                for batch in _batches(filling, view, ids, augment, batch_size, ranks):
                    if "idle" not in batch:
                        filling(to_device(batch, device))
                    done += 1
                    bar.watch(done)


def _missing(filling: Filling, ranks: Ranks) -> list[NDArray[np.int64]]:
    """The rows of each view that no answer is kept of, before any process asks for another."""
    ranks.barrier()
    filling.refresh()
    rows = np.arange(len(filling), dtype=np.int64)
    views = range(filling.views)
    missing = [rows[~filling.known(rows + view * len(filling))] for view in views]
    ranks.barrier()
    return missing


def _batches(
    filling: Filling,
    view: int,
    ids: NDArray[np.int64],
    augment: tuple[Augmentation, ...],
    batch_size: int,
    ranks: Ranks,
) -> Iterator[dict[str, Tensor]]:
    """This process's share of these rows, in order."""
    part, pixels = (ranks.rank, ranks.world), (VIEW_SEED, view)
    for batch in read(filling.data, ids, batch_size, part, augment=augment, pixels=pixels):
        yield {**batch, "view": torch.tensor(view)}


def inspect_cache(folder: str | Path) -> dict[str, Any]:
    """What a cache holds, as JSON: rows, bytes a row, who was asked what."""
    cached = Cached(folder)
    with closing(cached):
        store = cached.store
        shards = store.shards()
        size = sum(each["bytes"] for each in shards)
        return {
            "rows": len(cached),
            "views": cached.views,
            "slots": len(cached) * cached.views,
            "filled": store.filled,
            "bytes": size,
            "bytes_per_row": NUMBER + sum(field.bytes for field in cached.fields),
            "shards": len(shards),
            "signals": {address: column.to_json() for address, column in cached.columns.items()},
            "tail_mass": _tail_masses(cached),
            **{name: cached.asked[name] for name in ("teacher", "data", "augment", "keep")},
        }


def _tail_masses(cached: Cached) -> dict[str, float]:
    """The mean probability of what is not kept of wide logits, of a sample of rows."""
    slots = np.arange(len(cached) * cached.views, dtype=np.int64)
    slots = slots[cached.store.known(slots)]
    rows = cached.store.take(slots[:: -(-len(slots) // SAMPLE) or 1])
    kept = {address: column.decode(rows) for address, column in cached.columns.items()}
    return {
        address: float(value.tail_mass(1.0).mean())
        for address, value in kept.items()
        if isinstance(value, TopK) and 1.0 in value.temperatures and len(slots)
    }


def verify_cache(folder: str | Path) -> int:
    """Read all that a cache holds again; returns how many rows agree with their hashes.

    Raises:
        DataError: what does not, with the file's name.
    """
    cached = Cached(folder)
    with closing(cached):
        if faults := cached.store.verify():
            more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{more}; remove what is damaged and fill the cache again")
        return cached.store.filled


def compare_again(
    cached: Cached,
    teacher: Any,
    data: Source,
    augment: Sequence[Augmentation] = (),
    *,
    rows: int = 64,
) -> tuple[float, float]:
    """Ask *teacher* again about a sample; returns the largest difference and what is allowed.

    Raises:
        PreflightError: the cache is of another teacher, or of other data.
        DataError: an answer is further from what is kept than its form allows.
    """
    cached.check_teacher(teacher)
    cached.check_source(data, views=cached.views if augment else None, augment=augment)
    total = len(cached) * cached.views
    slots = np.arange(0, total, -(-total // rows), dtype=np.int64)
    slots = slots[cached.store.known(slots)]
    worst, allowed = 0.0, 0.0
    teacher.open(list(cached.columns))
    try:
        for view in np.unique(slots // len(cached)):
            ids = torch.from_numpy(slots[slots // len(cached) == view] % len(cached))
            batch = augmented(data, ids, augment, seed=VIEW_SEED, view=int(view))
            batch["view"] = torch.tensor(int(view))
            now, kept = teacher(batch), cached(batch)
            for address, column in cached.columns.items():
                found, bound = column.compare(kept[address], now[address])
                if found > bound:
                    raise DataError(
                        f"{cached.folder}: {address} is {found:.3g} from what the teacher says "
                        f"now, and at most {bound:.3g} is rounding; make the cache anew"
                    )
                worst, allowed = max(worst, found), max(allowed, bound)
    finally:
        teacher.close()
    return worst, allowed
