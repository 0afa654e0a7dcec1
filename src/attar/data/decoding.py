"""Image files into bytes of pixels, by Pillow, and sources of many of them."""

from __future__ import annotations

import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np

from attar.data.checks import Array
from attar.data.dataset import DatasetSource
from attar.data.source import Source, TensorSource
from attar.runtime import DataError, UsageError

# Pillow knows 40 formats more; some of them start other programs or were never made safe.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_GREY = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"}
_WIDE = {"I", "F"}
_MOST_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MB in RGB
_MOST_BYTES = 2**29
_TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_NAMED = 8
_BLOCK = 1_024


class Header(NamedTuple):
    """What an image says of itself, before any pixel is read; sides as it is to be seen."""

    grey: bool
    height: int
    width: int


class Pictures(ABC):
    """A map-style data set of uint8 [C, H, W] and class numbers, for a ``DatasetSource``.

    ``channels`` is 1 or 3; with ``size`` images are resized and cropped to a square.
    """

    def __init__(self, targets: Array | None, channels: int, size: int | None) -> None:
        self.targets = targets
        self._channels = channels
        self._size = size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def content(self, index: int) -> str | bytes:
        """The path or the bytes of one image file."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What an error calls this image."""

    def pixels(self, index: int) -> Array:
        """uint8 [C, H, W]; a DataError that names the image."""
        try:
            return decoded(self.content(index), self._channels, self._size)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.where(index)}: {reason(error)}; repair or remove it") from None

    def __getitem__(self, index: int) -> tuple[Array, ...]:
        pixels = self.pixels(index)
        return (pixels,) if self.targets is None else (pixels, self.targets[index])


def need_pillow(reader: str, extra: str = "images") -> None:
    """A UsageError that says how to install Pillow, where it is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError(
            f'{reader} needs Pillow to read images; install it: pip install "attar[{extra}]"'
        ) from None


def header(content: str | bytes) -> Header:
    """Mode and sides of one image file; a ValueError or what Pillow raises if it has none."""
    with _opened(content) as image:
        if image.mode in _WIDE:
            raise ValueError(f"pixels of 32 bits (mode {image.mode}); save it with 8 or 16")
        width, height = image.size
        # PNG's getexif would read all pixels if the header has none.
        if ("exif" in image.info or image.format == "TIFF") and (
            image.getexif().get(_ORIENTATION) in _TURNED
        ):
            width, height = height, width
        return Header(image.mode in _GREY, height, width)


def decoded(content: str | bytes, channels: int, size: int | None) -> Array:
    """The pixels of one image file, uint8 [C, H, W]: upright, without transparency.

    With ``size``: the largest centred square, resized by an antialiased bilinear filter. That is
    the shorter side to ``size`` and a centre crop, in one pass. A JPEG is decoded at the smallest
    scale that leaves twice ``size``.
    """
    from PIL import Image, ImageOps

    with _opened(content) as opened:
        if size is not None:
            opened.draft(None, (2 * size, 2 * size))
        image: Any = ImageOps.exif_transpose(opened)
        image = _with_mode(image, "L" if channels == 1 else "RGB")
        if size is not None:
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        array = np.asarray(image, np.uint8)
    if channels == 1:
        return np.ascontiguousarray(array[None])
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def reason(error: Exception) -> str:
    """Why a file is no image that can be read, in few words."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {_MOST_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"cannot be decoded ({text})"


def listed(found: Sequence[str]) -> str:
    """At most 8 of them, and how many more there are."""
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns of large images and odd metadata; the first are refused, the second no harm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def spread(work: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """``work(0)`` to ``work(count - 1)`` in order, by threads: Pillow lets others run meanwhile."""
    if not workers:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, _BLOCK):
            yield from pool.map(work, range(start, min(start + _BLOCK, count)))


def fits(count: int, shape: Sequence[int]) -> bool:
    """Whether so many images of bytes may be held in memory (512 MB)."""
    return count * prod(shape) <= _MOST_BYTES


def in_memory(
    pictures: Pictures, *, classes: Sequence[str] | int | None, name: str, workers: int
) -> Source:
    """All images, decoded once. What ``on_demand`` gives, to the same bytes.

    Raises
    ------
    DataError
        All images that cannot be decoded, or the first two of different sides.
    """
    whole: Array | None = None
    faults: list[str] = []
    for index, found in enumerate(spread(_tried(pictures), len(pictures), workers)):
        if isinstance(found, DataError):
            faults.append(str(found).removesuffix("; repair or remove it"))
            continue
        if whole is None:
            whole, first = np.empty((len(pictures), *found.shape), np.uint8), index
        if found.shape != whole.shape[1:]:
            raise differ(
                (pictures.where(first), *whole.shape[2:]),
                (pictures.where(index), *found.shape[1:]),
            )
        whole[index] = found
    if faults:
        raise refused(name, faults)
    assert whole is not None, "no data set is empty"
    return TensorSource(whole, pictures.targets, classes=classes, name=name)


def on_demand(
    pictures: Pictures, *, classes: Sequence[str] | int | None, name: str, workers: int
) -> Source:
    """Images decoded when a batch asks for them, by ``workers`` processes."""
    return DatasetSource(pictures, classes=classes, name=name, workers=workers)


def refused(name: str, faults: Sequence[str]) -> DataError:
    """The error that names files which are no images."""
    files = "file is no image" if len(faults) == 1 else "files are no images"
    return DataError(
        f"{name}: {len(faults):,} {files} that can be read: {listed(faults)}; repair or remove "
        f"{'it' if len(faults) == 1 else 'them'}"
    )


def differ(first: tuple[str, int, int], second: tuple[str, int, int]) -> DataError:
    """The error that two images (name, height, width) have different sides."""
    sides = [f"{name} is {height} x {width}" for name, height, width in (first, second)]
    return DataError(
        f"{sides[0]} and {sides[1]}, and all images must have one size; give size: 64, or any "
        "other, to resize them"
    )


def _tried(pictures: Pictures) -> Callable[[int], Array | DataError]:
    def work(index: int) -> Array | DataError:
        try:
            return pictures.pixels(index)
        except DataError as error:
            return error

    return work


def _opened(content: str | bytes) -> Any:
    from PIL import Image

    if not (content if isinstance(content, bytes) else os.path.getsize(content)):
        raise ValueError("empty file")
    image = Image.open(
        io.BytesIO(content) if isinstance(content, bytes) else content, "r", _FORMATS
    )
    width, height = image.size
    if width * height > _MOST_PIXELS:
        image.close()
        raise ValueError(f"{width:,} x {height:,} is more than {_MOST_PIXELS:,} pixels")
    return image


def _with_mode(image: Any, mode: str) -> Any:
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow itself takes of 16-bit colours; its own conversion would clip.
        image = _eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
