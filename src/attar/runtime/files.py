"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from attar.runtime.errors import DataError

CHUNK = 1 << 20

_DRAFT = re.compile(r"\.(.+)\.tmp-([0-9]{1,18})")


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write *data* beside *path*, sync it and rename it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, target.name)
    draft = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with naming(target, draft=draft):
            write_new(draft, data)
            os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(target.parent)


def sweep(folder: Path, name: str = "") -> None:
    """Remove the drafts of ``write_atomic`` that processes left which are no more.

    Args:
        name: of this file alone.
    """
    for entry in os.listdir(folder):
        match = _DRAFT.fullmatch(entry)
        if match and name in ("", match[1]) and not at_work(int(match[2])):
            with suppress(FileNotFoundError):
                os.unlink(folder / entry)


def at_work(pid: int) -> bool:
    """Whether another process of this number lives, so that its draft is not ours to remove."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid > 0


def write_json(path: str | Path, value: Any) -> None:
    """Write *value* as JSON that any parser reads: a non-finite number becomes ``null``."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken file is a DataError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None


def finite(value: Any) -> Any:
    """The value with every number that JSON has no word for replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@contextmanager
def naming(path: str | Path, *, draft: Path | None = None) -> Iterator[None]:
    """Give an OSError inside the name *path* where the system did not: fsync knows no names.

    Where the system named *draft*, nobody but us has ever heard of it: *path* is said instead.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or (draft is not None and str(error.filename) == str(draft)):
            error.filename = str(path)
            error.filename2 = None
        raise


def write_new(path: Path, *data: bytes | memoryview) -> str:
    """Write a file that was not there and sync it; returns the SHA-256 of all the *data*.

    Raises:
        OSError: with ``filename`` set; FileExistsError when the file is there.
    """
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with naming(path), _descriptor(path, flags) as descriptor:
        for piece in data:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK):
                # Hashed while it is warm: one pass over memory for both.
                chunk = view[start : start + CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, read once, a mebibyte at a time."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with naming(path), reading(path) as descriptor:
        while count := os.readv(descriptor, [buffer]):
            digest.update(buffer[:count])
    return digest.hexdigest()


def reading(path: Path) -> AbstractContextManager[int]:
    """A context with a descriptor of the file to read; a symbolic link is not followed."""
    return _descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* last: what was made, renamed or removed in it."""
    with naming(folder), _descriptor(folder, os.O_RDONLY | os.O_CLOEXEC) as descriptor:
        os.fsync(descriptor)


def make_folder(folder: Path) -> None:
    """Make *folder* and the ones above it, each synced into its parent."""
    with naming(folder):
        if folder.is_dir():
            return
        make_folder(folder.parent)
        try:
            os.mkdir(folder)
        except FileExistsError:  # another process made it meanwhile, or it is a file
            if not folder.is_dir():
                raise
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds; a link is not followed."""
    with naming(path):
        if path.is_symlink() or not path.is_dir():
            os.unlink(path)
            return
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            remove(path / name)
        os.rmdir(path)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
