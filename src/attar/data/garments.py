"""Scenes of several garments, each a real image of Fashion-MNIST: multi-label images."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from attar.data.checks import Array
from attar.data.draw import hashed, key_of
from attar.data.fashion_mnist import CLASSES, part_arrays
from attar.data.source import TensorSource
from attar.data.splits import Splits, consistent
from attar.runtime import DataError, UsageError

_SIDE = 64  # of a scene, in pixels
_MOST = 4  # garments in a scene
_TRIES = 20  # places for a garment, before the scene goes without it
_VISIBLE = 20  # of 255: a fainter pixel belongs to no garment
_CHUNK = 1_000
_SCENES = 200_000

Numbers = NDArray[np.int64]
Count = Annotated[int, Ge(1), Le(_SCENES)]


def garments(
    *, train: Count = 8_000, test: Count = 2_000, seed: int = 0, folder: str | None = None
) -> Splits:
    """Scenes of 1 to 4 garments side by side, uint8 [1, 64, 64], labelled with what is in them.

    Labels are float32 [10] of 0 and 1: which of the 10 classes of
    :func:`~attar.data.fashion_mnist` are in the scene, once or more. How many garments, which and
    where is drawn uniformly; no garment's bounding box touches another's, and one that finds no
    free place in 20 tries is left out. Training scenes are made of training images alone and test
    scenes of test images. Scene i depends on (seed, i) and not on how many are asked for.

    Parameters
    ----------
    train, test:
        How many scenes; 1 to 200,000.
    seed:
        Of the scenes.
    folder:
        As for ``fashion_mnist``.

    Raises
    ------
    UsageError
        A number of scenes outside the range.
    DataError
        What ``fashion_mnist`` raises; images larger than a scene.
    """
    for part, count in (("train", train), ("test", test)):
        if not 1 <= count <= _SCENES:
            raise UsageError(f"garments: {part} must be from 1 to {_SCENES:,}, not {count}")
    sources = [
        TensorSource(
            *_scenes(folder, prefix, count, seed), classes=CLASSES, name=f"garments {part}"
        )
        for prefix, part, count in (("train", "train", train), ("t10k", "test", test))
    ]
    return consistent(*sources)


def _scenes(folder: str | None, part: str, count: int, seed: int) -> tuple[Array, Array]:
    images, classes = part_arrays(folder, part)
    if max(images.shape[1:]) > _SIDE:
        raise DataError(
            f"garments: images of {images.shape[1]} x {images.shape[2]} do not fit into scenes of "
            f"{_SIDE} x {_SIDE}; give a folder of smaller ones"
        )
    draw = _Draw(count, part, seed)
    amount = 1 + draw.below(_MOST, "amount")
    chosen = np.stack([draw.below(len(images), "image", n) for n in range(_MOST)], axis=1)
    rows, columns, there = _places(_boxes(images)[chosen], amount, images.shape[1:], draw)
    labels = np.zeros((count, len(CLASSES)), np.uint8)
    scene, garment = there.nonzero()
    labels[scene, classes[chosen[scene, garment]]] = 1
    return _painted(images, chosen, rows, columns, there), labels


class _Draw:
    """Random numbers of each scene, by what they are for."""

    def __init__(self, count: int, part: str, seed: int) -> None:
        self._ids = np.arange(count, dtype=np.int64)
        self._keys = ("garments", part, seed)

    def below(self, limit: int, *what: str | int) -> Numbers:
        """Uniform integers from 0 to limit - 1, one a scene."""
        bits = hashed(key_of(*self._keys, *what), self._ids)
        return ((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def _boxes(images: Array) -> Numbers:
    """The bounding box of what can be seen in each image: [N, 4] of top, left, bottom, right."""
    visible = images > _VISIBLE
    rows, columns = np.any(visible, axis=2), np.any(visible, axis=1)
    height, width = images.shape[1:]
    ends = [rows.argmax(1), columns.argmax(1)]
    ends += [height - rows[:, ::-1].argmax(1), width - columns[:, ::-1].argmax(1)]
    # Where nothing can be seen the four are 0, 0, height, width: the whole image.
    return np.stack(ends, axis=1)


def _places(
    boxes: Numbers, amount: Numbers, shape: tuple[int, ...], draw: _Draw
) -> tuple[Numbers, Numbers, NDArray[np.bool_]]:
    """Where the images stand, rows and columns [N, 4], and which of the four are there."""
    count = len(boxes)
    rows, columns = np.zeros((2, count, _MOST), np.int64)
    there = np.zeros((count, _MOST), bool)
    taken = np.zeros((count, _MOST, 4), np.int64)  # an empty box touches nothing
    for garment in range(_MOST):
        wanted = garment < amount
        for trial in range(_TRIES):
            row = draw.below(_SIDE - shape[0] + 1, "row", garment, trial)
            column = draw.below(_SIDE - shape[1] + 1, "column", garment, trial)
            box = boxes[:, garment] + np.stack([row, column, row, column], axis=1)
            now = wanted & ~there[:, garment] & ~_touches(box, taken, there)
            rows[now, garment], columns[now, garment] = row[now], column[now]
            taken[now, garment] = box[now]
            there[now, garment] = True
    return rows, columns, there


def _touches(box: Numbers, taken: Numbers, there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a box [N, 4] shares a pixel with any of those that stand, [N, 4, 4]."""
    apart = (box[:, None, :2] >= taken[:, :, 2:]) | (box[:, None, 2:] <= taken[:, :, :2])
    return np.any(there & ~np.any(apart, axis=2), axis=1)


def _painted(
    images: Array, chosen: Numbers, rows: Numbers, columns: Numbers, there: NDArray[np.bool_]
) -> Array:
    scenes = np.zeros((len(chosen), _SIDE, _SIDE), np.uint8)
    down, right = np.arange(images.shape[1])[:, None], np.arange(images.shape[2])
    for start in range(0, len(chosen), _CHUNK):
        part = slice(start, start + _CHUNK)
        for garment in range(_MOST):
            scene = start + there[part, garment].nonzero()[0]
            at = (
                scene[:, None, None],
                rows[scene, garment][:, None, None] + down,
                columns[scene, garment][:, None, None] + right,
            )
            image = images[chosen[scene, garment]]
            scenes[at] = np.maximum(scenes[at], np.where(image > _VISIBLE, image, 0))
    return scenes
