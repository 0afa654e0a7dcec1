"""Multi-label rows: how they are kept, mixed, split and read, and what is refused."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from attar.data import (
    DatasetSource,
    Draw,
    Source,
    Subset,
    TensorSource,
    csv,
    cutmix,
    fashion_mnist,
    garments,
    mixup,
    split,
    tensors,
    yeast,
)
from attar.data.draw import augmented
from attar.recipes import parse, resolve
from attar.runtime import DataError, UsageError

NAMES = ("shirt", "bag", "shoe")
LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])


def source(labels: Tensor = LABELS) -> TensorSource:
    inputs = torch.rand(len(labels), 2, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorSource(inputs, labels, classes=NAMES, name="mine")


def whole(data: Source) -> dict[str, Tensor]:
    return data.rows(torch.arange(len(data)))


# Sources


@pytest.mark.parametrize(
    "form", [lambda x: x, Tensor.bool, Tensor.float, Tensor.numpy, lambda x: x.byte().numpy()]
)
def test_labels_of_any_dtype_become_floats_beside_their_classes(
    form: Callable[[Tensor], object],
) -> None:
    found = TensorSource(torch.rand(4, 2), form(LABELS), classes=NAMES)  # type: ignore[arg-type]
    assert (found.labels.dtype, found.classes, found.outputs) == (torch.float32, NAMES, 3)
    assert torch.equal(found.labels, LABELS.float())
    assert torch.equal(whole(found)["labels"], LABELS.float())


@pytest.mark.parametrize(
    ("row", "value", "says"),
    [
        (2, 2.0, "mine: the label 'bag' of row 2 is 2; a multi-label row has a 0 or 1 for"),
        (3, 0.5, "label 'bag' of row 3 is 0.5"),
        (0, float("nan"), "label 'bag' of row 0 is nan"),
        (1, -1.0, "label 'bag' of row 1 is -1"),
    ],
)
def test_a_label_that_is_neither_0_nor_1_is_refused_by_row(
    row: int, value: float, says: str
) -> None:
    labels = LABELS.float()
    labels[row, 1] = value
    with pytest.raises(DataError, match=says):
        source(labels)


def test_labels_and_classes_of_other_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="3 classes but 2 labels a row"):
        source(LABELS[:, :2])
    with pytest.raises(DataError, match="or name the classes for multi-label rows"):
        TensorSource(torch.rand(4, 2), LABELS)


def test_tensors_take_the_number_of_classes_from_the_columns() -> None:
    x, y = torch.rand(4, 2), LABELS.bool()
    found = tensors(x, y, x[:2], y[:2])
    assert found.train.classes == ("0", "1", "2")
    assert torch.equal(found.test.labels, LABELS[:2].float())


def test_a_subset_and_a_split_keep_the_rows_with_their_labels() -> None:
    data = source(LABELS.repeat(10, 1))
    assert torch.equal(Subset(data, torch.tensor([3, 0])).labels, LABELS[[3, 0]].float())
    rest, part = split(data, 0.25, seed=1)
    assert (len(rest), len(part)) == (30, 10)
    for found in (rest, part):
        rows = whole(found)
        same = (whole(data)["inputs"][:, None] == rows["inputs"]).flatten(2).all(2)
        assert torch.equal(data.labels[same.int().argmax(0)], rows["labels"])
    assert not torch.equal(split(data, 0.25, seed=2)[1].labels, part.labels)


class Items:
    """A map-style data set that lists its labels and counts how often it is asked."""

    classes: ClassVar[list[str]] = list(NAMES)

    def __init__(self, targets: list[list[int]]) -> None:
        self.targets = targets
        self.asked = 0

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked += 1
        return torch.full((2,), float(index)), LABELS[index % 4]


def test_a_data_set_of_rows_is_multi_label_and_its_list_is_believed() -> None:
    items = Items((LABELS.tolist()) * 100)
    data = DatasetSource(items)
    assert data.classes == NAMES
    assert torch.equal(data.labels, LABELS.float().repeat(100, 1))
    assert items.asked < 100  # the list agrees with a sample, so not all items are read
    assert torch.equal(whole(data)["labels"][:4], LABELS.float())
    items = Items((LABELS.flip(0).tolist()) * 100)
    assert torch.equal(DatasetSource(items).labels[:4], LABELS.float())  # and here it does not


# Mixing


def test_mixup_mixes_each_label_by_the_share_of_its_image() -> None:
    inputs = torch.arange(40.0)[:, None, None, None].expand(-1, 1, 4, 4)
    data = TensorSource(inputs, torch.eye(40, dtype=torch.int64), classes=40)
    mixed = augmented(data, torch.arange(40), [mixup], seed=0, view=0)
    labels = mixed["labels"]
    torch.testing.assert_close(labels.sum(1), torch.ones(40))
    # Row i is the number i: what is mixed of the numbers must be mixed of the labels.
    torch.testing.assert_close(labels @ torch.arange(40.0), mixed["inputs"][:, 0, 0, 0])
    assert (labels.max(1).values < 1).any()


def test_cutmix_of_several_labels_is_refused_also_after_mixup() -> None:
    for before in ([], [mixup]):
        with pytest.raises(DataError, match=r"mine: cutmix mixes .* by area.*use mixup"):
            augmented(source(), torch.arange(4), [*before, cutmix], seed=0, view=0)


def test_cutmix_still_mixes_class_numbers_after_mixup_and_values() -> None:
    inputs = torch.rand(8, 1, 6, 6)
    for labels, classes in ((torch.arange(8) % 2, 2), (torch.rand(8, 3), None), (None, 2)):
        data = TensorSource(inputs, labels, classes=classes)
        draw = Draw(data, torch.arange(8), seed=0, view=0, before=[mixup])
        batch = mixup(whole(data), draw)
        assert ("labels" in cutmix(batch, draw)) == (labels is not None)


# Tables

TABLE = """\
a,big,x,red
1,1,5,0
2,0,6,true
3,False,7,1.0
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_several_targets_are_labels_in_the_order_they_are_named(write) -> None:
    path = write("t.csv", TABLE)
    train, test = csv(train=path, test=path, target=["red", "big"])
    assert train.classes == test.classes == ("red", "big")
    assert train.labels.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert whole(train)["inputs"].tolist() == [[1, 5], [2, 6], [3, 7]]


def test_several_targets_of_a_regression_are_columns_of_numbers(write) -> None:
    path = write("t.csv", "a,u,v\n1,2.5,-1\n2,3.5,1e3\n")
    train, _ = csv(train=path, test=path, target=["v", "u"], regression=True)
    assert train.labels.tolist() == [[-1, 2.5], [1000, 3.5]]
    assert train.classes is None


def test_one_target_in_a_list_is_one_target(write) -> None:
    path = write("t.csv", "a,kind\n" + "1,cat\n2,dog\n" * 5)
    train, test = csv(train=path, target=["kind"], test_fraction=0.4)
    assert train.classes == ("cat", "dog")
    assert test.labels.bincount().tolist() == [2, 2]


def test_one_file_is_split_at_random_and_a_gzipped_one_is_the_same(write) -> None:
    rows = "".join(f"{i},{i % 2},{i % 3 == 0:d}\n" for i in range(50))
    plain = write("t.csv", "a,p,q\n" + rows)
    packed = write("t.csv.gz", gzip.compress(("a,p,q\n" + rows).encode()))
    train, test = csv(train=plain, target=["p", "q"], seed=1)
    assert (len(train), len(test)) == (40, 10)
    value = whole(test)["inputs"][:, 0]
    assert torch.equal(test.labels, torch.stack([value % 2, (value % 3 == 0).float()], 1))
    again = csv(train=packed, target=["p", "q"], seed=1)
    assert again.test.fingerprint() == test.fingerprint()
    assert csv(train=plain, target=["p", "q"]).test.fingerprint() != test.fingerprint()


def test_training_rows_without_the_targets_have_no_labels(write) -> None:
    train, test = csv(
        train=write("a.csv", "a\n1\n2\n"), test=write("b.csv", "a,p,q\n1,0,1\n"), target=["p", "q"]
    )
    assert train.labels is None
    assert test.labels.tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"a\.csv: no column 'q' for target"):
        csv(
            train=write("a.csv", "a,p\n1,0\n2,1\n"),
            test=write("b.csv", "a,p,q\n1,0,1\n"),
            target=["p", "q"],
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,p,q\n1,0,1\n1,2,1\n", r"t\.csv:3: '2' in column 'p' is neither 0 nor 1.*regression"),
        ("a,p,q\n1,0,1\n1,yes,1\n", "'yes' in column 'p' is neither 0 nor 1"),
        ("a,p,q\n1,0,1\n1,0,\n", r"t\.csv:3: the target 'q' is empty"),
        ("a,p\n1,0\n", "no column 'q' for target"),
        ("p,q\n1,0\n", "no column besides the targets"),
    ],
)
def test_faults_of_several_targets_are_named(write, text: str, says: str) -> None:
    path = write("t.csv", text)
    with pytest.raises(DataError, match=says):
        csv(train=path, test=path, target=["p", "q"])


@pytest.mark.parametrize(
    ("target", "says"), [(["p", "p"], "names 'p' twice"), ([], "empty list; name")]
)
def test_a_list_of_targets_names_each_once(write, target: list[str], says: str) -> None:
    path = write("t.csv", "a,p,q\n1,0,1\n")
    with pytest.raises(UsageError, match=says):
        csv(train=path, test=path, target=target)


@pytest.mark.parametrize("damage", [lambda b: b[:-6], lambda b: b"no gzip", lambda b: b[:20]])
def test_a_damaged_gzip_file_is_named(write, damage: Callable[[bytes], bytes]) -> None:
    path = write("t.csv.gz", damage(gzip.compress(b"a,p,q\n" + b"1,0,1\n" * 99)))
    with pytest.raises(DataError, match=r"t\.csv\.gz: is no whole gzip file .*fetch it again"):
        csv(train=path, target=["p", "q"])


def test_a_recipe_names_several_targets(write) -> None:
    path = write("t.csv", "a,p,q\n" + "1,0,1\n2,1,0\n" * 5)
    text = (
        "task: multi-label-classification\n"
        f"data: {{name: csv, train: {path}, target: [p, q]}}\n"
        "teacher: {model: mlp, train: {epochs: 1}}\n"
        "student: mlp\n"
        "stages: [{do: distill, terms: [{loss: binary_kl}]}]\n"
    )
    recipe = resolve(parse(text)).recipe
    assert recipe.data().train.classes == ("p", "q")


# Yeast


def genes(rows: int) -> str:
    head = ["Att1", "Att2", *(f"Class{n}" for n in range(1, 15))]
    lines = [[i, -i, *(int(i % (n + 2) == 0) for n in range(14))] for i in range(rows)]
    return "\n".join(",".join(map(str, line)) for line in [head, *lines])


def test_yeast_is_read_from_any_file_of_its_form(write) -> None:
    train, test = yeast(path=write("y.csv", genes(100)), test=0.2)
    assert (train.shape, len(train), len(test)) == ((2,), 80, 20)
    assert train.classes == tuple(f"Class{n}" for n in range(1, 15))
    value = whole(test)["inputs"][:, 0]
    assert torch.equal(test.labels[:, 3], (value % 5 == 0).float())


@pytest.mark.skipif(importlib.util.find_spec("river") is None, reason="river is not installed")
def test_yeast_as_it_is_published() -> None:
    train, test = yeast()
    assert (train.shape, len(train), len(test)) == ((103,), 1499, 918)
    labels = torch.cat([train.labels, test.labels])
    assert labels.sum(1).mean().item() == pytest.approx(4.237, abs=1e-3)
    assert labels.sum(0).min() == 34
    assert yeast(seed=1).test.fingerprint() != test.fingerprint() == yeast().test.fingerprint()


def test_yeast_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["attar.data.yeast"], "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps river"):
        yeast()


# Garments


def clothes(folder: Path, height: int = 28, width: int = 28) -> str:
    """Idx files whose images tell class and part by one value: 22 k + 30, and 1 more in the test.

    The image of class k is a box of k + 10 rows and 12 columns, with faint dirt around it.
    """
    folder.mkdir(exist_ok=True)
    for more, (prefix, count) in enumerate((("train", 50), ("t10k", 20))):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.full((count, height, width), 20, np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 : label + 12, 5:17] = 22 * int(label) + 30 + more
        head = b"\0\0\x08\x03" + np.array(pixels.shape, ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = b"\0\0\x08\x01" + np.array(labels.shape, ">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return str(folder)


def pixels(data: Source) -> Tensor:
    return (whole(data)["inputs"] * 255).round().long()[:, 0]


def test_a_scene_shows_what_its_labels_say_and_each_garment_whole(tmp_path: Path) -> None:
    found = garments(train=300, test=100, folder=clothes(tmp_path / "f"))
    for more, part in enumerate((found.train, found.test)):
        amounts = torch.zeros(len(part), dtype=torch.long)
        values = pixels(part)
        for label in range(10):
            shown = (values == 22 * label + 30 + more).flatten(1).sum(1)
            assert (shown % ((label + 10) * 12) == 0).all()  # boxes never cover one another
            assert torch.equal(part.labels[:, label] == 1, shown > 0)
            amounts += shown // ((label + 10) * 12)
        # Nothing else is in the scene: no dirt, and nothing of the other part's images.
        known = torch.tensor([0, *(22 * label + 30 + more for label in range(10))])
        assert torch.isin(values, known).all()
        assert set(amounts.tolist()) == {1, 2, 3, 4}


def test_scenes_depend_on_the_seed_and_not_on_how_many_there_are(tmp_path: Path) -> None:
    folder = clothes(tmp_path / "f")
    few, more = (garments(train=n, test=5, folder=folder).train for n in (40, 1100))
    assert torch.equal(pixels(few), pixels(more)[:40])
    assert torch.equal(few.labels, more.labels[:40])
    again = garments(train=40, test=5, folder=folder).train
    other = garments(train=40, test=5, seed=1, folder=folder).train
    assert few.fingerprint() == again.fingerprint() != other.fingerprint()
    train, test = garments(train=40, test=40, folder=folder)
    assert not torch.equal(train.labels, test.labels)


def test_garments_stand_everywhere(tmp_path: Path) -> None:
    """The first garment's place is uniform: every pixel that a box can reach is reached."""
    seen = (pixels(garments(train=3000, test=1, folder=clothes(tmp_path / "f")).train) > 0).any(0)
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 36 + 20, 5, 36 + 16)
    assert seen[2:57, 5:53].all()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"train": 0}, UsageError, "train must be from 1 to 200,000, not 0"),
        ({"test": 10**9}, UsageError, "test must be from 1"),
        ({"folder": "nowhere"}, DataError, "there is no folder nowhere"),
    ],
)
def test_scenes_that_cannot_be_made_are_refused(options, kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        garments(**{"train": 1, "test": 1, "folder": "nowhere"} | options)


def test_images_larger_than_a_scene_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images of 28 x 65 do not fit into scenes of 64 x 64"):
        garments(train=1, test=1, folder=clothes(tmp_path / "f", width=65))


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Fashion-MNIST is not installed"
)
def test_scenes_of_real_garments_are_not_one_image_alone() -> None:
    found = garments(train=2000, test=1)
    amounts = found.train.labels.sum(1).long().bincount(minlength=5)
    assert amounts[0] == 0
    assert (amounts[1:] > 20).all()
    assert found.train.classes == fashion_mnist().train.classes
    assert found.train.shape == (1, 64, 64)
