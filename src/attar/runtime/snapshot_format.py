"""What a checkpoint is made of: its files, their manifest, and how each is verified.

A folder holds one ``<part>.safetensors`` a part, ``facts.json``, and ``manifest.json`` with the
step and the size and SHA-256 of each file. The manifest ends with the SHA-256 of its own bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attar.runtime.errors import DataError, UsageError
from attar.runtime.files import hash_file, naming, reading

Parts = dict[str, dict[str, Tensor]]

SCHEMA = 1
MANIFEST = "manifest.json"
FACTS = "facts.json"
MOST_MANIFEST_BYTES = 1 << 20
MOST_DEPTH = 64

_PART = re.compile(r"[a-z_]{1,64}")
_FILE = re.compile(r"[a-z_]{1,64}\.safetensors|facts\.json")
_SEAL = ',"sha256":"%s"}\n'
_SEAL_BYTES = len(_SEAL % hashlib.sha256().hexdigest())


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: *size* in bytes, *sha256* in small hex digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; equal manifests are equal checkpoints."""

    step: int
    files: tuple[FileEntry, ...]


def serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file; tensors that share memory are written each by value."""
    from safetensors.torch import save

    # On its own: safetensors would write the memory of a conjugate view as if it were no view.
    plain = {
        name: tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    stop = 0
    for name, tensor in sorted(plain.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < stop:  # shares memory with another one
            plain[name] = tensor.clone()
        stop = max(stop, start + tensor.nbytes)
    return save(plain)


def encoded(facts: dict[str, Any]) -> bytes:
    """Facts as JSON that gives equal facts back; a UsageError for what JSON would change."""
    _check_fact(facts, "facts", 0)
    try:
        return json.dumps(facts, separators=(",", ":")).encode("ascii")
    except ValueError as error:  # an int beyond the 4,300 digits that Python converts
        raise UsageError(f"facts cannot be written as JSON ({error})") from None


def sealed(manifest: Manifest) -> bytes:
    """The manifest as JSON whose last entry is the SHA-256 of all bytes before that entry."""
    files = [{"name": f.name, "sha256": f.sha256, "size": f.size} for f in manifest.files]
    body = {"schema": SCHEMA, "step": manifest.step, "files": files}
    data = json.dumps(body, separators=(",", ":")).encode("ascii")[:-1]
    data += (_SEAL % hashlib.sha256(data).hexdigest()).encode("ascii")
    if len(data) > MOST_MANIFEST_BYTES:
        raise UsageError(f"{len(files)} parts are too many for one checkpoint; join some of them")
    return data


def check_step(step: int) -> None:
    """Refuse what is no number of a step."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise UsageError(f"step is {step!r}, but must be a whole number from 0; count the steps")


def check_part(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a part that safetensors could not give back as it is."""
    if not isinstance(part, str) or not _PART.fullmatch(part):
        raise UsageError(
            f"part {part!r} is no name of a part; use 1 to 64 small letters and underscores"
        )
    for name, tensor in tensors.items():
        if fault := _unfit(name, tensor):
            raise UsageError(f"part '{part}', tensor {name!r}: {fault}; leave it out or convert it")


def _unfit(name: str, tensor: Tensor) -> str | None:
    if not isinstance(name, str) or name == "__metadata__" or not _is_text(name):
        return "safetensors has no room for this name"
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.is_meta or tensor.layout != torch.strided:
        return "has no plain memory of its own (it is sparse or meta)"
    if not _is_held(tensor.dtype):
        return f"safetensors cannot write and read {tensor.dtype}"
    return None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@lru_cache
def _is_held(dtype: torch.dtype) -> bool:
    """Tried, not listed: safetensors writes some types that it then cannot read."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        return load(save({"x": torch.empty(0, dtype=dtype)}))["x"].dtype == dtype
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return False


def _check_fact(value: Any, where: str, depth: int) -> None:
    """Refuse what JSON would change on the way, such as a tuple or a number as a key."""
    if depth > MOST_DEPTH:
        raise UsageError(f"{where} lies more than {MOST_DEPTH} levels deep; flatten the facts")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{where} has the key {key!r}; JSON has only str keys")
            _check_fact(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check_fact(item, f"{where}[{place}]", depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise UsageError(
            f"{where} is a {type(value).__name__}, which JSON cannot give back; use None, bool, "
            f"int, float, str, list or dict, and put tensors into a part"
        )


def read(folder: Path, step: int) -> tuple[dict[str, Any], Parts]:
    """Facts and parts; each file is parsed only when its size and hash are right."""
    facts: dict[str, Any] = {}
    parts: Parts = {}
    for file in _listed(folder, step).files:
        data = _content(folder, file)
        if file.name == FACTS:
            facts = _json(data, FACTS)
        else:
            parts[file.name.removesuffix(".safetensors")] = _tensors(data, file.name)
    return facts, parts


def verify(folder: Path, step: int) -> Manifest:
    """The manifest of a checkpoint whose every byte is the right one; else a DataError."""
    manifest = _listed(folder, step)
    for file in manifest.files:
        _check_size(folder, file)
        with _readable(folder / file.name):
            found = hash_file(folder / file.name)
        _check_hash(file, found)
    return manifest


def _listed(folder: Path, step: int) -> Manifest:
    """The manifest, itself verified, of a folder that holds the files it names and no other."""
    there = _plain_names(folder) - {MANIFEST}
    manifest = unsealed(_manifest_bytes(folder / MANIFEST), folder)
    if manifest.step != step:
        raise DataError(f"{MANIFEST} is of step {manifest.step}")
    named = {file.name for file in manifest.files}
    for name in sorted(named - there):
        raise DataError(f"{name} is missing")
    for name in sorted(there - named):
        raise DataError(f"{name} is not in its manifest")
    return manifest


def _plain_names(folder: Path) -> set[str]:
    with naming(folder):
        if folder.is_symlink() or not folder.is_dir():
            raise DataError("it is not a folder")
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    for name in sorted(kinds):
        if not kinds[name]:
            raise DataError(f"{name} is not a plain file")
    return set(kinds)


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, sorted."""
    with naming(folder), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _manifest_bytes(path: Path) -> bytes:
    data = _bytes(path, MOST_MANIFEST_BYTES + 1)
    if len(data) > MOST_MANIFEST_BYTES:
        raise DataError(f"{MANIFEST} has more than {MOST_MANIFEST_BYTES} bytes")
    return data


def _bytes(path: Path, most: int) -> bytes:
    with (
        _readable(path),
        reading(path) as descriptor,
        open(descriptor, "rb", closefd=False) as stream,
    ):
        return stream.read(most)


def unsealed(data: bytes, folder: Path) -> Manifest:
    """Parse a manifest whose seal is right to the byte: no flip finds a place to hide."""
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != (_SEAL % hashlib.sha256(body).hexdigest()).encode("ascii"):
        raise DataError(f"{MANIFEST} has another SHA-256 than it says itself")
    value = _json(data, MANIFEST)
    if value.get("schema") != SCHEMA:
        raise UsageError(
            f"{folder}: is of schema {value.get('schema')}, and this attar reads {SCHEMA}; "
            f"use the attar that wrote it"
        )
    try:
        files = tuple(FileEntry(f["name"], f["size"], f["sha256"]) for f in value["files"])
        manifest = Manifest(value["step"], files)
    except (KeyError, TypeError):
        raise DataError(f"{MANIFEST} is not a manifest of attar") from None
    names = [file.name for file in files]
    sound = all(map(_is_sound, files)) and len(set(names)) == len(names) and FACTS in names
    if not sound or sealed(manifest) != data:
        raise DataError(f"{MANIFEST} is not a manifest of attar")
    return manifest


def _is_sound(file: FileEntry) -> bool:
    return (
        isinstance(file.name, str)
        and _FILE.fullmatch(file.name) is not None
        and type(file.size) is int
        and file.size >= 0
    )


def _content(folder: Path, file: FileEntry) -> bytes:
    _check_size(folder, file)
    data = _bytes(folder / file.name, file.size)
    _check_hash(file, hashlib.sha256(data).hexdigest())
    return data


def _check_size(folder: Path, file: FileEntry) -> None:
    """Before a byte is read, so that no manifest can ask for more memory than there is file."""
    with _readable(folder / file.name):
        size = os.lstat(folder / file.name).st_size
    if size != file.size:
        raise DataError(f"{file.name} has {size} bytes and not {file.size} as its manifest says")


def _check_hash(file: FileEntry, found: str) -> None:
    if found != file.sha256:
        raise DataError(f"{file.name} has another SHA-256 than its manifest says")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A bad sector or a missing file is damage; another fault of the system stays an OSError."""
    try:
        with naming(path):
            yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENOENT):
            raise
        raise DataError(f"{path.name} cannot be read ({error.strerror})") from None


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{name} is not a JSON object")
    return value


def _tensors(data: bytes, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Sorted: safetensors gives another order in each process.
        return dict(sorted(load(data).items()))
    except (SafetensorError, ValueError, KeyError, AssertionError) as error:
        raise DataError(f"{name} is not a whole safetensors file ({error})") from None
