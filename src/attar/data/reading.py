"""How the batches of a source are read: which part of them, and by which process."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from attar.data.checks import Array
from attar.data.draw import augmented, key_of
from attar.data.types import Augmentation, Batch
from attar.runtime import AttarError, DataError, UsageError

if TYPE_CHECKING:
    from attar.data.source import Source

Rows = Callable[[Tensor], Batch]

_PIPED = 1 << 20  # bytes
_GRACE = 30  # seconds
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_OPEN: WeakSet[Generator[Batch, None, None]] = WeakSet()


def check_part(part: tuple[int, int]) -> None:
    """A UsageError unless ``part`` is a rank and a world that it fits in."""
    match part:
        case (int(rank), int(world)) if 0 <= rank < world:
            return
    raise UsageError(f"part must be (rank, world), two integers with 0 <= rank < world, not {part}")


def read(
    source: Source,
    order: Array,
    batch_size: int,
    part: tuple[int, int],
    *,
    start: int = 0,
    augment: tuple[Augmentation, ...] = (),
    pixels: tuple[int, int] = (0, 0),
) -> Iterator[Batch]:
    """The share ``part`` of each batch of the rows ``order``, from batch ``start`` on.

    The shares of the ranks lie one after the other: joined they are the batch of one process.
    ``pixels`` is the (seed, view) with which the augmentations draw.
    """
    rows: Rows = source.rows
    seed, view = pixels
    if augment:
        rows = partial(augmented, source, augment=augment, seed=seed, view=view)
    firsts = range(start * batch_size, len(order), batch_size)
    whole = (order[first : first + batch_size] for first in firsts)
    key = key_of("workers", seed, view)
    if part == (0, 1):
        return _mapped(rows, whole, source, key)
    batches = list(whole)
    shares = [_share(ids, *part) for ids in batches]
    # A rank without a row must still take the step, so it takes it with the others' rows.
    filled = [own if len(own) else ids for own, ids in zip(shares, batches, strict=True)]
    return map(_marked, _mapped(rows, filled, source, key), shares)


def _share(ids: Array, rank: int, world: int) -> Array:
    return ids[rank * len(ids) // world : (rank + 1) * len(ids) // world]


def _marked(batch: Batch, share: Array) -> Batch:
    return batch if len(share) else {**batch, "idle": torch.ones(())}


def _mapped(rows: Rows, asked: Iterable[Array], source: Source, key: int) -> Iterator[Batch]:
    if not source.workers:
        return map(rows, map(torch.from_numpy, asked))
    batches = _ahead(rows, list(asked), source.workers, key, source.name)
    _OPEN.add(batches)
    return batches


def _ahead(
    rows: Rows, asked: list[Array], workers: int, key: int, name: str
) -> Generator[Batch, None, None]:
    """The rows ``asked``, in order, by processes that run at most 2 batches each ahead.

    The processes start with the first batch and end with the last, or when the iterator is
    dropped. ``key`` is for data sets with random numbers of their own: with one key for all
    epochs they would draw the same every time.
    """
    if not asked:
        return
    batches = _started(rows, asked, workers, key, name)
    try:
        for batch in batches:
            if isinstance(batch, AttarError):
                raise batch
            yield {key: _unpacked(value) for key, value in batch.items()}
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"{name}: a process that reads rows has died, which too little memory or, in a "
            "container, too little shared memory can cause; give fewer workers, or workers=0"
        ) from error
    finally:
        # Left to the garbage collector, they would live as long as the traceback of an error.
        batches._shutdown_workers()


def _started(rows: Rows, asked: list[Array], workers: int, key: int, name: str) -> Any:
    from torch.utils.data import DataLoader

    # The processes inherit that signals wait, until each has said how it takes them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            # Of more processes than cores, and of the error below.
            warnings.simplefilter("ignore", UserWarning)
            loader: DataLoader[Any] = DataLoader(
                asked,  # type: ignore[arg-type]  # any sequence is a map-style data set
                batch_size=None,
                collate_fn=partial(_told, rows),
                num_workers=min(workers, len(asked)),
                worker_init_fn=partial(_begin, os.getpid()),
                # Without a generator of its own it would take a number from the global one.
                generator=torch.Generator().manual_seed(key),
            )
            return iter(loader)
    except (OSError, RuntimeError):  # no process could start, or one died at once
        raise
    except Exception as error:  # where processes are not forked, all they need is sent
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{name}: cannot be sent to other processes ({reason}); define the data set and the "
            "augmentations at the top of a module, or give workers=0"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _told(rows: Rows, ids: Array) -> dict[str, Tensor | Array] | AttarError:
    """An error of ours is handed over as it is; one raised would come with a traceback inside."""
    try:
        batch = rows(torch.from_numpy(ids))
    except AttarError as error:
        return error
    return {key: _packed(value) for key, value in batch.items()}


def _packed(value: Tensor) -> Tensor | Array:
    """A small tensor as an array, which is sent through the pipe; a tensor is sent as memory.

    Shared memory holds a file open for as long as the tensor lives, and whoever collects the ids
    or labels of all batches would run out of them.
    """
    value = value.detach()  # with a gradient it could not be sent at all
    if value.nbytes > _PIPED or value.dtype == torch.bfloat16:  # which numpy has not
        return value
    array: Array = value.numpy()
    return array


def _unpacked(value: Tensor | Array) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)


def _begin(parent: int, worker: int) -> None:
    """What a process does first."""
    _leave_signals_to_the_main_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End when the main process has, however it ended.

    torch looks for that too, but takes for the parent whoever is it by then: a process whose
    parent was killed while it started would wait for ever.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _leave_signals_to_the_main_process() -> None:
    """It may want a few more batches, until it can stop in good order.

    So Ctrl-C is not heard, and SIGTERM, which a scheduler sends to every process of a job, ends
    this one only after a while, or when it comes again.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(_GRACE)


@atexit.register
def _end_all() -> None:
    """At its end Python sends one SIGTERM to each process and waits for it: too long for us."""
    for batches in list(_OPEN):
        batches.close()
