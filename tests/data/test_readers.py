"""The readers of real data, and idx files that are not what they should be."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from attar.data import Splits, csv, digits, fashion_mnist, tensors
from attar.runtime import DataError

REAL = Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = 7, 5
FILES = {
    "train-images-idx3-ubyte": (3, (TRAIN, 4, 6)),
    "train-labels-idx1-ubyte": (1, (TRAIN,)),
    "t10k-images-idx3-ubyte": (3, (TEST, 4, 6)),
    "t10k-labels-idx1-ubyte": (1, (TEST,)),
}


def _idx(dimensions: int, sizes: tuple[int, ...], kind: int = 8) -> bytes:
    count = 1
    for size in sizes:
        count *= size
    content = bytes(i % (10 if dimensions == 1 else 251) for i in range(count))
    return bytes([0, 0, kind, dimensions]) + struct.pack(f">{len(sizes)}I", *sizes) + content


def _folder(root: Path, zipped: bool) -> Path:
    for name, (dimensions, sizes) in FILES.items():
        content = _idx(dimensions, sizes)
        if zipped:
            (root / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (root / name).write_bytes(content)
    return root


def _contents(source) -> set[bytes]:
    return {row.numpy().tobytes() for row in source.rows(torch.arange(len(source)))["inputs"]}


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    train, test = fashion_mnist(folder=str(_folder(tmp_path, zipped)))
    assert (len(train), len(test), train.shape) == (TRAIN, TEST, (1, 4, 6))
    assert train.labels.tolist() == list(range(7))
    expected = torch.arange(TRAIN * 24).reshape(TRAIN, 1, 4, 6).float() / 255
    assert torch.equal(train.rows(torch.arange(TRAIN))["inputs"], expected)
    assert train.classes == test.classes
    assert train.classes[0] == "t-shirt/top"
    assert train.classes[9] == "ankle boot"


def test_a_plain_file_goes_before_its_archive(tmp_path: Path) -> None:
    _folder(tmp_path, zipped=False)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    assert len(fashion_mnist(folder=str(tmp_path)).train) == TRAIN


IMAGES = "train-images-idx3-ubyte"
FAULTS = {
    "truncated": (lambda data: data[:-1], r"7 x 4 x 6 is 168 bytes, and there are 167"),
    "too long": (lambda data: data + b"x", "168 bytes, and there are more"),
    "header only": (lambda data: data[:9], "ends within its header"),
    "empty": (lambda data: b"", "begins with 0x and"),
    "labels": (lambda data: _idx(1, (168,)), "begins with 0x00000801 .* with 0x00000803"),
    "floats": (lambda data: _idx(3, (7, 4, 6), kind=13), "begins with 0x00000d03"),
    "huge": (
        lambda data: data[:4] + struct.pack(">3I", *(2**32 - 1,) * 3) + data[16:],
        "its header claims",
    ),
    "no images": (lambda data: _idx(3, (0, 4, 6)), "empty data set"),
    "fewer images": (lambda data: _idx(3, (6, 4, 6)), "6 inputs but 7 labels"),
    "other size": (lambda data: _idx(3, (7, 5, 6)), r"shape \[1, 5, 6\] in train but \[1, 4, 6\]"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_idx_files_are_named(tmp_path: Path, fault: str, zipped: bool) -> None:
    _folder(tmp_path, zipped)
    change, message = FAULTS[fault]
    path = tmp_path / (f"{IMAGES}.gz" if zipped else IMAGES)
    data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    path.write_bytes(gzip.compress(change(data)) if zipped else change(data))
    with pytest.raises(DataError, match=message) as error:
        fashion_mnist(folder=str(tmp_path))
    about_one_file = fault not in ("no images", "fewer images", "other size")
    assert str(error.value).startswith(str(path) if about_one_file else "fashion_mnist train")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"plain text",
        lambda data: data[:30] + b"\xff" * 20 + data[50:],
        lambda data: data[:-8] + b"\x00" * 8,
    ],
    ids=["half", "no gzip", "damaged", "checksum"],
)
def test_broken_archives_are_named(tmp_path: Path, change) -> None:
    _folder(tmp_path, zipped=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot be read .*fetch it again") as error:
        fashion_mnist(folder=str(tmp_path))
    assert str(error.value).startswith(str(path))


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path, zipped=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(DataError, match="label 10 of row 6 is not a class number"):
        fashion_mnist(folder=str(tmp_path))


def test_a_missing_folder_or_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset-fashion-mnist .* give the option folder"):
        fashion_mnist(folder=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"has neither train-images-idx3-ubyte nor .*\.gz"):
        fashion_mnist(folder=str(tmp_path))


@pytest.mark.skipif(not REAL.is_dir(), reason="Debian package dataset-fashion-mnist is missing")
def test_the_real_fashion_mnist() -> None:
    train, test = fashion_mnist()
    assert (len(train), len(test), train.shape) == (60_000, 10_000, (1, 28, 28))
    assert train.labels.bincount().tolist() == [6_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10
    assert train.labels[:6].tolist() == [9, 0, 0, 3, 0, 2]
    mean, std = train.statistics()
    # The published statistics are 0.2860 and 0.3530 over all 60,000 images.
    assert mean[0] == pytest.approx(0.2860, abs=3e-3)
    assert std[0] == pytest.approx(0.3530, abs=3e-3)
    assert not _contents(train) & _contents(test)


@pytest.mark.parametrize("reader", [csv, digits, fashion_mnist, tensors])
def test_a_recipe_can_read_the_signature(reader) -> None:
    assert get_type_hints(reader, include_extras=True)["return"] is Splits


def test_digits() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (1_078, 719)
    assert train.shape == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    batch = train.rows(torch.arange(len(train)))
    assert (batch["inputs"].min(), batch["inputs"].max()) == (0, 1)
    assert batch["inputs"].dtype == torch.float32
    assert torch.equal((batch["inputs"] * 16).round() / 16, batch["inputs"])
    assert not _contents(train) & _contents(test)
    assert len(_contents(train) | _contents(test)) == 1_797
    assert test.labels.bincount().tolist() == [71, 73, 71, 73, 72, 73, 72, 72, 70, 72]


def test_digits_by_seed_and_size() -> None:
    fingerprints = {digits(seed=seed).test.fingerprint() for seed in (0, 0, 1)}
    assert len(fingerprints) == 2
    assert len(digits(test=0.1).test) == 180
