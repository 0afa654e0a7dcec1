"""Fashion-MNIST, and any data set in the same four idx files."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from attar.data.checks import Array, input_array, label_array
from attar.data.source import TensorSource
from attar.data.splits import Splits, consistent
from attar.runtime import DataError

_FOLDER = "/usr/share/datasets/fashion-mnist"
_PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_UNSIGNED_BYTE = 8  # the idx format's code for uint8
_MOST_BYTES = 2**31  # a header may claim anything; memory is asked for only up to here


def fashion_mnist(*, folder: str | None = None) -> Splits:
    """60,000 training and 10,000 test images of clothes, uint8 [1, 28, 28], in 10 classes.

    Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
    Learning Algorithms" (2017).

    Parameters
    ----------
    folder:
        Where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files
        are, plain or with ``.gz``; where both are, the plain file is read. None is the folder of
        the Debian package ``dataset-fashion-mnist``.

    Raises
    ------
    DataError
        A folder or file that is missing, truncated, too long or not an idx file of bytes, with
        its name.
    """
    parts = ("train", "t10k")
    sources = [
        TensorSource(*part_arrays(folder, part), classes=CLASSES, name=f"fashion_mnist {part}")
        for part in parts
    ]
    return consistent(*sources)


def part_arrays(folder: str | None, part: str) -> tuple[Array, Array]:
    """The images uint8 [N, H, W] and the class numbers [N] of one part, ``train`` or ``t10k``."""
    root = Path(_FOLDER if folder is None else folder)
    if not root.is_dir():
        raise DataError(
            f"fashion_mnist: there is no folder {root}; install the Debian package {_PACKAGE} "
            f"(apt-get install {_PACKAGE}) or give the option folder"
        )
    images = read_idx(_file(root, f"{part}-images-idx3-ubyte"), 3)
    labels = read_idx(_file(root, f"{part}-labels-idx1-ubyte"), 1)
    name = f"fashion_mnist {part}"
    return input_array(images, name)[:, 0], label_array(labels, len(images), CLASSES, name)


def _file(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"fashion_mnist: {root} has neither {name} nor {name}.gz; install the Debian package "
        f"{_PACKAGE} or give another folder"
    )


def read_idx(path: Path, dimensions: int) -> Array:
    """The array in one idx file of bytes, plain or gzipped.

    The format: two zero bytes, the code of the type (8 is uint8), the number of dimensions, each
    dimension as a big-endian 32-bit number, then the bytes of the array and nothing more.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic, shape = file.read(4), file.read(4 * dimensions)
            sizes = _sizes(path, magic, shape, dimensions)
            content = file.read(prod(sizes) + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from None
    if len(content) != prod(sizes):
        found = "more" if len(content) > prod(sizes) else f"{len(content):,}"
        raise DataError(
            f"{path}: {' x '.join(map(str, sizes))} is {prod(sizes):,} bytes, and there are "
            f"{found}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8).reshape(sizes)


def _sizes(path: Path, magic: bytes, shape: bytes, dimensions: int) -> list[int]:
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if magic != expected:
        raise DataError(
            f"{path}: begins with 0x{magic.hex()} and an idx file of {dimensions} dimensions of "
            f"bytes with 0x{expected.hex()}; it is another kind of file"
        )
    if len(shape) != 4 * dimensions:
        raise DataError(f"{path}: ends within its header; fetch the file again")
    sizes = [int(size) for size in np.frombuffer(shape, ">u4")]
    if prod(sizes) > _MOST_BYTES:
        raise DataError(
            f"{path}: its header claims {prod(sizes):,} bytes, more than the {_MOST_BYTES:,} that "
            "are read; it is damaged, or too large for memory"
        )
    return sizes
