"""A disk that fails, dies or loses power at the n-th call of the system."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = [
    "mkdir", "open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir",
    "scandir", "stat", "lstat", "readv", "pwrite", "ftruncate", "pread",
]  # fmt: skip
READS = ("close", "scandir", "stat", "lstat", "readv", "pread")
KILL = "kill"


class Killed(BaseException):
    """The process is dead; no clean-up may change anything any more."""


class Disk:
    """Counts the calls below *root* and lets the *at*-th one go wrong.

    ``fault`` is an errno, or ``KILL``. With *stuck* every later call that writes fails too.
    Calls are not synced for real; what is synced is noted, for ``lose_power``.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.real = {name: getattr(os, name) for name in CALLS}
        self.calls: list[str] = []
        self.at = -1
        self.fault: int | str = KILL
        self.stuck = False
        self.only = ""
        self.hit = False
        self._turn = threading.RLock()  # a thread closes what has the number another one opens
        self._paths: dict[int, str] = {}
        self._unsynced_files: set[int] = set()
        self._unsynced_ranges: dict[int, list[tuple[int, int]]] = {}
        self._unsynced_names: list[tuple[str, str, str, bytes | None]] = []

    def arm(self, at: int, fault: int | str, *, stuck: bool = False, only: str = "") -> None:
        """Fail at call number *at* of those whose path holds *only*."""
        self.at, self.fault, self.stuck, self.only = at, fault, stuck, only
        self.hit, self.calls = False, []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with self._turn:
                path = self._paths.get(args[0], "") if isinstance(args[0], int) else str(args[0])
                if not path.startswith(self.root):
                    return self.real[name](*args, **more)
                if self._fails(name, path):
                    self._fail(name, path, args)
                return self._done(name, path, args, more)

        return call

    def _fails(self, name: str, path: str) -> bool:
        if self.hit:
            return self.fault == KILL or (self.stuck and name not in READS)
        if self.only in path:
            self.calls.append(name)
            self.hit = len(self.calls) == self.at
        return self.hit

    def _fail(self, name: str, path: str, args: tuple[Any, ...]) -> None:
        dead = self.fault == KILL and len(self.calls) != self.at
        if name == "write" and not dead:  # half of it arrives
            self.real["write"](args[0], args[1][: len(args[1]) // 2])
            self._unsynced_files.add(os.fstat(args[0]).st_ino)
        if name == "pwrite" and not dead:
            self.real["pwrite"](args[0], args[1][: len(args[1]) // 2], args[2])
            self._note_range(args)
        if name == "close":  # Linux gives the descriptor back even when close fails
            self._paths.pop(args[0], None)
            self.real["close"](args[0])
        if self.fault == KILL:
            raise Killed
        assert isinstance(self.fault, int)
        named = (path,) if name in ("mkdir", "stat") else ()  # pathlib calls them on its own
        raise OSError(self.fault, os.strerror(self.fault), *named)

    def _done(self, name: str, path: str, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if name == "fsync":
            self._synced(args[0], path)
            return None
        new = name == "open" and args[1] & os.O_CREAT
        hidden = _content(str(args[1])) if name in ("rename", "replace") else None
        result = self.real[name](*args, **more)
        if name == "open":
            self._paths[result] = path
        if name == "close":
            self._paths.pop(args[0], None)
        if name == "write":
            self._unsynced_files.add(os.fstat(args[0]).st_ino)
        if name == "pwrite":
            self._note_range(args)
        if name == "mkdir" or new:
            self._unsynced_names.append(("made", path, "", None))
        if name in ("rename", "replace"):
            self._unsynced_names.append(("renamed", path, str(args[1]), hidden))
        return result

    def _note_range(self, args: tuple[Any, ...]) -> None:
        ranges = self._unsynced_ranges.setdefault(os.fstat(args[0]).st_ino, [])
        ranges.append((args[2], len(args[1])))

    def _synced(self, descriptor: int, path: str) -> None:
        self._unsynced_files.discard(os.fstat(descriptor).st_ino)
        self._unsynced_ranges.pop(os.fstat(descriptor).st_ino, None)
        kept: list[tuple[str, str, str, bytes | None]] = []
        for kind, old, new, hidden in self._unsynced_names:
            if os.path.dirname(new or old) != path:
                kept.append((kind, old, new, hidden))
            elif kind == "renamed":  # it lasts: what happened inside is now below the new name
                kept = [(k, _moved(a, old, new), _moved(b, old, new), h) for k, a, b, h in kept]
        self._unsynced_names = kept

    def close_all(self) -> None:
        """What the kernel does for a dead process."""
        for descriptor in list(self._paths):
            self.real["close"](descriptor)
        self._paths.clear()

    def lose_power(self, last: int, chance: random.Random | None = None) -> None:
        """Empty every file that was not synced and undo the *last* newest unsynced names.

        What ``pwrite`` wrote becomes zeros: all of it, or by *chance* half of the writes.
        """
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                number = os.lstat(path).st_ino
                if number in self._unsynced_files:
                    os.truncate(path, 0)
                for start, length in self._unsynced_ranges.get(number, []):
                    if chance is None or chance.random() < 0.5:
                        with open(path, "r+b") as file:
                            file.seek(start)
                            file.write(bytes(length))
        for kind, old, new, hidden in self._unsynced_names[::-1][:last]:
            if kind == "renamed" and os.path.lexists(new):
                self.real["rename"](new, old)
                if hidden is not None:
                    with open(new, "wb") as file:
                        file.write(hidden)
            elif kind == "made" and os.path.isdir(old):
                shutil.rmtree(old)
            elif kind == "made" and os.path.lexists(old):
                os.remove(old)

    @property
    def unsynced(self) -> int:
        return len(self._unsynced_names)


def _content(path: str) -> bytes | None:
    """What a file of this name holds, that a rename is about to hide."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(old + os.sep) else path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small folders come and go here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def killed() -> type[BaseException]:
    """What a dead process raises."""
    return Killed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path], Disk]]:
    """Makes a failing disk: ``disk(root)``; its descriptors are closed at the end."""
    made: list[Disk] = []

    def make(root: Path) -> Disk:
        made.append(Disk(root))
        return made[-1]

    yield make
    for each in made:
        each.close_all()


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing takes no time; for tests that note what is synced, or need not wait for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


FAULTS: list[tuple[int | str, bool]] = [
    (errno.ENOSPC, False),
    (errno.EIO, False),
    (errno.EACCES, False),
    (errno.EINTR, False),
    (errno.ENOSPC, True),
    (errno.EIO, True),
    (KILL, False),
]


@pytest.fixture(params=FAULTS, ids=lambda f: f"{errno.errorcode.get(f[0], f[0])}-{f[1]}")
def fault(request: pytest.FixtureRequest) -> tuple[int | str, bool]:
    """An errno or ``kill``, and whether the disk stays broken after it."""
    return request.param  # type: ignore[no-any-return]
