"""One process at a time: a lock that the kernel gives back when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from attar.runtime.closing import Closing
from attar.runtime.errors import RunExistsError
from attar.runtime.files import naming


class Lock(Closing):
    """Held from construction to ``close``, or to the end of the process, however it ends.

    The file holds the number of the process that took the lock last. It stays when the lock is
    given back: removing it would let two processes lock two files of one name.

    Args:
        path: the lock file; made if it is not there, in a folder that is.

    Raises:
        RunExistsError: another process holds it, or this one does already.
        OSError: the file cannot be made, or the file system has no locks.
    """

    def __init__(self, path: str | Path) -> None:
        self._descriptor: int | None = None
        with naming(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _take(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        _held.add(descriptor)

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


def _take(descriptor: int, path: str | Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise RunExistsError(
            f"{path}: process {holder} is at work in this folder; wait until it has ended, "
            f"or choose another folder with --run"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


_held: set[int] = set()


def _forget() -> None:
    """A forked child shares the lock; a loader's worker must not outlive its parent with it."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)
