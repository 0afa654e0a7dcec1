"""Weights files in safetensors: writing, verifying, reading."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attar.models.record import PICKLES, TensorInfo, WeightsFile, to_convert
from attar.runtime import DataError, UsageError


def to_bytes(stored: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in stored.items()}
    try:
        return save(tensors, metadata={"format": "pt"})
    except (KeyError, ValueError, SafetensorError) as error:
        raise UsageError(f"safetensors cannot hold these tensors ({error})") from None


def header_of(data: bytes) -> dict[str, dict[str, Any]]:
    """Type and shape of each tensor in what `to_bytes` made."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()
    }


def damage(path: Path, expected: WeightsFile) -> str | None:
    """What is wrong with the file at *path*; None when it is the expected one."""
    if not path.is_file():
        return "there is no such file, although model.json is there"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"has {size} bytes, not the {expected.bytes} that model.json names"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.sha256:
        return "its SHA-256 is not the one in model.json, so it is damaged or of another model"
    return None


def safetensors_file(path: Path) -> Path:
    """*path*, if it is an existing ``.safetensors`` file; else a DataError with the way out."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; use attar.models.load(folder), or name the file")
    if path.suffix.lower() in PICKLES:
        raise DataError(f"{path}: {to_convert(path)}")
    if path.suffix.lower() != ".safetensors":
        raise DataError(f"{path}: is no .safetensors file; only such a file is read")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the path of a .safetensors file")
    return path


def header(path: Path) -> dict[str, TensorInfo]:
    """Type and shape of each tensor, without reading one."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(dtype=part.get_dtype(), shape=part.get_shape())
            for name, part in slices.items()
        }


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({error}); use another copy"
        ) from None
