"""Folders of images, one folder a class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Lt

from attar.data import decoding
from attar.data.checks import Array
from attar.data.decoding import Header, Pictures
from attar.data.source import Source
from attar.data.splits import Splits, consistent, split
from attar.runtime import DataError, UsageError

_PARTS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_LITTER = {"thumbs.db", "desktop.ini"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class _Folder(NamedTuple):
    """One part: its files by class, both sorted, and what is there and is no image."""

    root: str
    name: str
    classes: list[str]
    files: list[str]
    targets: Array
    faults: list[str]


class _Files(Pictures):
    def __init__(self, part: _Folder, channels: int, size: int | None) -> None:
        super().__init__(part.targets, channels, size)
        self._root, self._files = part.root, part.files

    def __len__(self) -> int:
        return len(self._files)

    def content(self, index: int) -> str | bytes:
        return os.path.join(self._root, self._files[index])

    def where(self, index: int) -> str:
        return _printable(self._files[index])


def images(
    *,
    folder: str,
    size: Annotated[int, Ge(1)] | None = None,
    test: str | None = None,
    seed: int = 0,
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2,
    workers: Annotated[int, Ge(0)] = 0,
) -> Splits:
    """A folder of images by class, uint8 [3, H, W], or [1, H, W] when all of them are grey.

    Either ``folder/train/CLASS/*`` and ``folder/test/CLASS/*``, perhaps with
    ``folder/validation/CLASS/*`` (or ``val``), or ``folder/CLASS/*`` alone. Classes are sorted by
    name. PNG, JPEG, GIF (the first picture), BMP, WebP, TIFF and PPM are read; pictures are turned
    upright by their EXIF orientation, transparency is dropped, and of 16 bits the upper 8 are
    kept. Hidden files, ``Thumbs.db`` and ``desktop.ini`` are ignored; everything else in the
    folder of a class must be an image.

    Images that take up to 512 MB of pixels are decoded once; more are decoded whenever a batch
    asks for them. Both give the same bytes.

    Parameters
    ----------
    size:
        Pixels: the shorter side is resized to it and the centre is cropped to a square. None
        takes the images as they are, and all must have one size.
    test:
        Another folder with the test part, ``test/CLASS/*``. Where neither it nor ``folder/test``
        is given, ``test_fraction`` of the training images become the test part, stratified by
        class, chosen by ``seed``.
    workers:
        Threads that look at and decode the images at the start; processes that decode batches
        ahead where not all fit.

    Raises
    ------
    DataError
        A folder that is missing, has no classes, or other classes than the training part; an
        empty class; files that are no images, links that lead out of the folder, images above 89
        million pixels (8 are named); images of several sizes without ``size``.
    UsageError
        Pillow is not installed: ``pip install "attar[images]"``.
    """
    decoding.need_pillow("images")
    roots = _roots(folder, test)
    name = Path(os.path.abspath(folder)).name
    parts = {
        part: _folder(root, test if root == test else folder, f"{name} {part}")
        for part, root in roots.items()
    }
    with decoding.quiet():
        sources = _sources(parts, size, workers)
    train = sources["train"]
    if "test" not in sources:
        train, sources["test"] = split(train, test_fraction, seed=seed)
    return consistent(train, sources["test"], sources.get("validation"))


def _roots(folder: str, test: str | None) -> dict[str, str]:
    """The folder of each part that is there."""
    if not os.path.isdir(folder):
        raise DataError(f"images: there is no folder {_printable(folder)}; check the path")
    names = {entry.name for entry in _folders(folder)}
    roots = {"train": folder}
    known = {name for some in _PARTS.values() for name in some}
    within = "train" in names and any(_folders(os.path.join(folder, "train")))
    if names and (names <= known or within):
        roots = _named(folder, names)
    if test is not None:
        if "test" in roots:
            raise UsageError(
                f"images: {_printable(folder)} has a folder test already; leave out the option "
                "test, or rename the folder"
            )
        if not os.path.isdir(test):
            raise DataError(f"images: there is no folder {_printable(test)}; check test")
        roots["test"] = test
    return roots


def _named(folder: str, names: set[str]) -> dict[str, str]:
    roots: dict[str, str] = {}
    for part, known in _PARTS.items():
        there = [name for name in known if name in names]
        if len(there) > 1:
            raise DataError(
                f"images: {_printable(folder)} has both {there[0]} and {there[1]}; remove one"
            )
        if there:
            roots[part] = os.path.join(folder, there[0])
    if "train" not in roots:
        raise DataError(f"images: {_printable(folder)} has no folder train; add it")
    other = sorted(names.difference(*_PARTS.values()))
    if other:
        raise DataError(
            f"images: {_printable(folder)} has the folder '{_printable(other[0])}' beside train; "
            "known are train, validation (or val) and test: move it away"
        )
    return roots


def _folder(root: str, home: str, name: str) -> _Folder:
    """One part; links may lead anywhere in ``home``."""
    part = _Folder(root, name, [], [], np.empty(0, np.int64), [])
    counts = []
    real = os.path.realpath(home)
    if not Path(os.path.realpath(root)).is_relative_to(real):
        raise DataError(
            f"{name}: {_printable(root)} is a link that leads out of the folder; copy it"
        )
    for label, entry in _classes(root, name):
        before = len(part.files), len(part.faults)
        _list_files(entry, part, real)
        if before == (len(part.files), len(part.faults)):
            raise DataError(
                f"{name}: class '{label}' has no image; put some in {entry.name}, or remove it"
            )
        part.classes.append(label)
        counts.append(len(part.files) - before[0])
    stray = [e.name for e in _entries(root) if Path(e.name).suffix.lower() in _SUFFIXES]
    part.faults.extend(f"{_printable(file)} (outside the folder of a class)" for file in stray)
    return part._replace(targets=np.repeat(np.arange(len(counts)), counts).astype(np.int64))


def _classes(root: str, name: str) -> list[tuple[str, os.DirEntry[str]]]:
    """The folders of the classes by name, sorted by it."""
    found: dict[str, os.DirEntry[str]] = {}
    for entry in _folders(root):
        # One system spells an accented letter with one code, another with two.
        label = unicodedata.normalize("NFC", entry.name)
        if not label.isprintable():
            raise DataError(
                f"{name}: the folder '{_printable(label)}' has a name that cannot be printed; "
                "rename it"
            )
        if label in found:
            raise DataError(f"{name}: two folders are called '{label}'; rename or join them")
        found[label] = entry
    if len(found) < 2:
        there = f"only the folder '{next(iter(found))}'" if found else "no folder"
        raise DataError(
            f"{name}: {_printable(root)} holds {there}, and each class needs a folder of its own; "
            "name the folder above the classes"
        )
    return sorted(found.items())


def _list_files(folder: os.DirEntry[str], part: _Folder, real: str) -> None:
    """Adds the files of one class to ``part``, and the faults."""
    if _outside(folder, real):
        part.faults.append(f"{_printable(folder.name)} (a link that leads out of the folder)")
        return
    for entry in sorted(_entries(folder.path), key=lambda entry: entry.name):
        path = os.path.join(folder.name, entry.name)
        if _outside(entry, real):
            part.faults.append(f"{_printable(path)} (a link that leads out of the folder)")
        elif not entry.is_file():
            what = "a folder" if entry.is_dir() else "no file"
            part.faults.append(f"{_printable(path)} ({what})")
        else:
            part.files.append(path)


def _outside(entry: os.DirEntry[str], real: str) -> bool:
    if not entry.is_symlink():
        return False
    return not Path(os.path.realpath(entry.path)).is_relative_to(real)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _LITTER:
                    yield entry
    except OSError as error:
        raise DataError(
            f"images: {_printable(folder)} cannot be read ({error.strerror}); check its rights"
        ) from None


def _folders(folder: str) -> Iterator[os.DirEntry[str]]:
    return (entry for entry in _entries(folder) if entry.is_dir())


def _sources(parts: dict[str, _Folder], size: int | None, workers: int) -> dict[str, Source]:
    _same_classes(list(parts.values()))
    headers = [_headers(part, workers) for part in parts.values()]
    files = [file for part in parts.values() for file in part.files]
    flat = [found for some in headers for found in some]
    if size is None:
        _one_size(files, flat)
    channels = 1 if all(found.grey for found in flat) else 3
    shape = (channels, size or flat[0].height, size or flat[0].width)
    make = decoding.in_memory if decoding.fits(len(flat), shape) else decoding.on_demand
    return {
        name: make(
            _Files(part, channels, size), classes=part.classes, name=part.name, workers=workers
        )
        for name, part in parts.items()
    }


def _same_classes(parts: Sequence[_Folder]) -> None:
    train = set(parts[0].classes)
    for part in parts[1:]:
        extra, absent = sorted(set(part.classes) - train), sorted(train - set(part.classes))
        if extra or absent:
            said = [f"lacks {decoding.listed(absent)}"] if absent else []
            said += [f"has {decoding.listed(extra)} besides"] if extra else []
            raise DataError(
                f"{part.name}: its classes are not those of {parts[0].name}: it "
                f"{' and '.join(said)}; make the folders agree"
            )


def _headers(part: _Folder, workers: int) -> list[Header]:
    """The headers of all files, after a check that they are images."""

    def look(index: int) -> Header | str:
        file = part.files[index]
        try:
            return decoding.header(os.path.join(part.root, file))
        except Exception as error:
            return f"{_printable(file)} ({decoding.reason(error)})"

    found = list(decoding.spread(look, len(part.files), workers))
    faults = [*part.faults, *(fault for fault in found if isinstance(fault, str))]
    if faults:
        raise decoding.refused(part.name, faults)
    return found


def _one_size(files: Sequence[str], headers: Sequence[Header]) -> None:
    first = headers[0]
    others = [
        f"{_printable(file)} ({other.height} x {other.width})"
        for file, other in zip(files, headers, strict=True)
        if other[1:] != first[1:]
    ]
    if others:
        raise DataError(
            f"{len(others):,} of {len(files):,} images are not {first.height} x {first.width} as "
            f"{_printable(files[0])} is, and all must have one size: {decoding.listed(others)}; "
            "give size: 64, or any other, to resize them"
        )


def _printable(text: str) -> str:
    """Without what could write to a terminal, or cannot be written at all."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
