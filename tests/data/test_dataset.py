"""DatasetSource: any map-style data set, read item by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

from attar.data import DatasetSource, TensorSource
from attar.runtime import DataError

INPUTS = torch.rand(10, 3)
LABELS = torch.arange(10) % 2
IDS = torch.tensor([4, 9, 0])


class Listing(Dataset):
    """A data set that lists its labels and counts what is read."""

    def __init__(self, targets=None, labels=None, transform=lambda label: label, names=None):
        self.read = []
        self._transform = transform
        if targets is not None:
            self.targets = targets
        if labels is not None:
            self.labels = labels
        if names is not None:
            self.classes = names

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((2,), float(index)), self._transform(index % 4)


FORMS = {
    "TensorDataset": TensorDataset(INPUTS, LABELS),
    "tuples": [(x, int(y)) for x, y in zip(INPUTS, LABELS, strict=True)],
    "lists": [[x, y] for x, y in zip(INPUTS, LABELS, strict=True)],
    "arrays": [(x, y) for x, y in zip(INPUTS.numpy(), LABELS.numpy(), strict=True)],
    "dicts": [{"inputs": x, "labels": y, "path": "x"} for x, y in zip(INPUTS, LABELS, strict=True)],
    "subset": TorchSubset(TensorDataset(INPUTS, LABELS), list(range(10))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rows_of_the_tensors(form: str) -> None:
    source = DatasetSource(FORMS[form], classes=2, name="x")
    expected = TensorSource(INPUTS, LABELS, classes=2)
    batch, wanted = source.rows(IDS), expected.rows(IDS)
    assert batch.keys() == wanted.keys()
    for key in batch:
        assert torch.equal(batch[key], wanted[key])
        assert batch[key].dtype == wanted[key].dtype
    assert torch.equal(source.labels, LABELS)
    assert (len(source), source.shape, source.outputs) == (10, (3,), 2)
    assert source.fingerprint() == expected.fingerprint()
    assert source.statistics() == expected.statistics()


@pytest.mark.parametrize(
    "dataset", [TensorDataset(INPUTS), list(INPUTS), [{"inputs": x} for x in INPUTS]]
)
def test_unlabelled_forms(dataset) -> None:
    source = DatasetSource(dataset)
    assert (source.labels, source.classes, source.outputs) == (None, None, None)
    assert source.rows(IDS).keys() == {"inputs", "ids"}
    assert torch.equal(source.rows(IDS)["inputs"], INPUTS[IDS])


def test_values_of_regression() -> None:
    one = DatasetSource([(float(i), i / 2) for i in range(5)])
    assert one.shape == (1,)
    assert one.rows(torch.tensor([3]))["labels"].tolist() == [[1.5]]
    assert (one.outputs, one.labels.shape) == (1, (5, 1))
    many = DatasetSource(TensorDataset(INPUTS, INPUTS.double()))
    assert many.outputs == 3
    assert torch.equal(many.labels, INPUTS)


def test_bytes_of_images() -> None:
    pixels = torch.randint(0, 256, (4, 5, 6), dtype=torch.uint8)
    source = DatasetSource(list(pixels))
    assert source.shape == (1, 5, 6)
    assert torch.equal(source.rows(torch.arange(4))["inputs"], pixels[:, None] / 255)


def test_empty_ids_give_an_empty_batch() -> None:
    batch = DatasetSource(FORMS["tuples"], classes=2).rows(torch.empty(0, dtype=torch.int64))
    assert batch["inputs"].shape == (0, 3)
    assert batch["labels"].shape == (0,)


def test_only_item_0_is_read_at_the_start() -> None:
    dataset = Listing()
    source = DatasetSource(dataset, classes=4)
    assert dataset.read == [0]
    assert (source.name, source.outputs) == ("Listing", 4)
    assert dataset.read == [0]


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_listed_labels_are_taken_and_not_read(attribute: str, kind) -> None:
    dataset = Listing(**{attribute: kind([i % 4 for i in range(100)])})
    source = DatasetSource(dataset, classes=4)
    assert torch.equal(source.labels, torch.arange(100) % 4)
    assert len(dataset.read) <= 1 + 32
    assert source.labels is source.labels


@pytest.mark.parametrize(
    ("listed", "transform"),
    [
        (None, int),
        ([i % 4 for i in range(99)], int),
        ([f"class {i}" for i in range(100)], int),
        ([[0], [0, 1]] * 50, int),
        ([i % 4 / 1 for i in range(100)], int),
        ([[i % 4, 0] for i in range(100)], int),
        ([i % 4 for i in range(100)], lambda label: 3 - label),
    ],
    ids=["none", "short", "names", "ragged", "floats", "wide", "target_transform"],
)
def test_lists_that_do_not_fit_are_not_believed(listed, transform) -> None:
    dataset = Listing(targets=listed, transform=transform)
    source = DatasetSource(dataset, classes=4)
    expected = torch.tensor([transform(i % 4) for i in range(100)])
    assert torch.equal(source.labels, expected)
    read = len(dataset.read)
    assert torch.equal(source.labels, expected)
    assert len(dataset.read) == read


def test_class_names_of_the_data_set() -> None:
    names = ["a", "b", "c", "d"]
    assert DatasetSource(Listing(names=names)).classes == ("a", "b", "c", "d")
    assert DatasetSource(Listing(names=names), classes=5).outputs == 5
    assert DatasetSource(Listing(names=[0, 1])).classes is None
    assert DatasetSource(Listing(names=names, transform=float)).classes is None


class _Stream(IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty data set"),
        (_Stream(), r"such as list\(dataset\)"),
        (iter([1]), "cannot be read by row number"),
        ({"a": 1}, "cannot be read by row number"),
        ([(1.0, 2, 3)], "item 0 is a tuple of 3"),
        ([()], "item 0 is a tuple of 0"),
        (["text"], "item 0: input must be a torch tensor or a numpy array, not str"),
        ([(1.0, "cat")], "item 0: label must be a torch tensor or a numpy array, not str"),
        ([{"pixel_values": 1.0, "label": 0}], r"\['label', 'pixel_values'\]; rename"),
    ],
)
def test_other_forms_are_refused_at_the_start(dataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DatasetSource(dataset)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.rand(4), 0), r"item 2 is \(float32 \[4\].* item 0 is \(float32 \[3\]"),
        ((torch.rand(3).double(), 0), r"item 2 is \(float64 \[3\]"),
        ((torch.rand(3), 0.5), r"float \[\]\) and item 0 is .*integer \[\]\)"),
        ((torch.rand(3), torch.tensor([0])), r"item 2 .*integer \[1\]\)"),
        (torch.rand(3), r"item 2 is .*no label\) and item 0"),
        ("text", "item 2: input must be"),
        ((torch.rand(3), 2), "label 2 of row 2 is not a class number"),
        ((torch.rand(3), -1), "label -1 of row 2 is not a class number"),
        ((torch.full((3,), float("nan")), 0), "inputs of row 2 are not all finite"),
    ],
)
def test_a_bad_item_is_named_when_it_is_read(item, message: str) -> None:
    items = [(torch.rand(3), 0), (torch.rand(3), 1), item, (torch.rand(3), 0)]
    source = DatasetSource(items, classes=2)
    assert source.rows(torch.tensor([1, 0, 3]))["labels"].tolist() == [1, 0, 0]
    with pytest.raises(DataError, match=message):
        source.rows(torch.tensor([1, 2]))
    with pytest.raises(DataError, match=message):
        assert source.labels is None
