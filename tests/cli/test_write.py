"""What the command line makes of the data that it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import attar
from attar.cli.write import (
    Choices,
    check_names,
    evaluate_model,
    reader,
    usual_size,
    write_recipe,
)
from attar.recipes import parse
from attar.runtime import UsageError

NONE = Choices()


def _draw(folder: Path, sizes: tuple[int, ...] = (16,), count: int = 6) -> str:
    """A folder of images by class: dark and bright noise, of so many sizes."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label, low in (("bright", 150), ("dark", 0)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            side = sizes[i % len(sizes)]
            pixels = generator.integers(low, low + 100, (side, side, 3), np.uint8)
            image.fromarray(pixels).save(folder / label / f"{i}.png")
    return str(folder)


def _parquet(path: Path, **columns: object) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return str(path)


def test_each_kind_of_data_gets_its_reader(tmp_path: Path) -> None:
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").touch()
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    photos, idx = _draw(tmp_path / "photos"), str(tmp_path / "idx")
    split = _draw(tmp_path / "split" / "train") and str(tmp_path / "split")
    found = {
        "digits": "digits",
        "fashion-mnist": "fashion-mnist",
        idx: "fashion_mnist",
        photos: "images",
        split: "images",
    }
    for data, name in found.items():
        options, task = reader(data, NONE)
        assert (options["name"], task) == (name, "image-classification")
    options, task = reader(str(tmp_path / "t.csv"), Choices(target="b"))
    assert (options["name"], options["target"], task) == ("csv", "b", "tabular-classification")


def test_columns_of_a_data_set_are_found_by_what_they_hold(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "t.parquet", a=[0.5, 1.0], label=["x", "y"], b=[1, 2], text="pq")
    options, task = reader(path, NONE)
    assert options == {"name": "dataset", "path": path, "labels": "label", "inputs": ["a", "b"]}
    assert task == "tabular-classification"
    options, task = reader(path, Choices(target="b", inputs=["a"], regression=True))
    assert (options["labels"], options["inputs"], task) == ("b", "a", "regression")


def test_a_folder_of_tables_or_a_saved_data_set_is_no_folder_of_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"a": [0.5, 1.0], "label": [0, 1]})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.to_parquet(str(tmp_path / "hub" / "data" / "train.parquet"))
    for folder in ("saved", "hub"):
        options, _ = reader(str(tmp_path / folder), NONE)
        assert (options["name"], options["inputs"]) == ("dataset", "a")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert reader(str(arrow), NONE)[0]["path"] == str(arrow)
    train, test = attar.data.dataset(path=str(arrow), inputs="a", test_fraction=0.5)
    assert len(train) == len(test) == 1


def test_images_of_several_sizes_get_their_usual_shorter_side(tmp_path: Path) -> None:
    odd = _draw(tmp_path / "odd", (30, 42, 60))
    assert usual_size(odd) == 40
    assert reader(odd, NONE)[0]["size"] == 40
    assert reader(odd, Choices(size=24))[0]["size"] == 24
    assert "size" not in reader(_draw(tmp_path / "even"), NONE)[0]
    said = "# the images are of several sizes"
    assert said in write_recipe("mlp", "mlp", odd, NONE, epochs=1)
    assert said not in write_recipe("mlp", "mlp", odd, Choices(size=24), epochs=1)


def test_a_chosen_size_is_part_of_the_recipe(tmp_path: Path) -> None:
    odd = _draw(tmp_path / "odd", (30, 42, 60))
    text = write_recipe("mlp", "mlp", odd, NONE, epochs=1)
    assert parse(text, "distill").value["data"] == {"name": "images", "folder": odd, "size": 40}


@pytest.mark.parametrize(
    ("data", "said", "says"),
    [
        ("digts", NONE, "did you mean 'digits'"),
        ("nowhere.parquet", NONE, "there is no such file"),
        ("digits", Choices(size=8), "--size does not go with --data digits"),
        ("digits", Choices(inputs=["a"]), "--inputs does not go with --data digits"),
        ("t.parquet", NONE, r"--target; its columns are a \(number\), kind \(text\)"),
        ("t.parquet", Choices(target="knd"), "did you mean 'kind'"),
        ("t.parquet", Choices(target="a"), "--inputs; its columns are kind"),
        ("empty", NONE, "no folders of images by class; .* as empty/CLASS/1.jpg"),
    ],
)
def test_what_cannot_be_told_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, said: Choices, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    _parquet(tmp_path / "t.parquet", a=[0.5, 1.0], kind=["x", "y"])
    with pytest.raises(UsageError, match=says):
        reader(data, said)


@pytest.mark.parametrize(
    ("teacher", "student", "says"),
    [
        ("photo-net", "mlp", "--teacher photo-net: there is no such folder .* mean 'photos-net'"),
        ("resnt", "mlp", "--teacher resnt: .*did you mean 'resnet'"),
        ("resnet", "mobilnet", "--student mobilnet: .*did you mean 'mobilenet'"),
        ("resnet", "photos-net", "--student pretrained student.path=photos-net"),
    ],
)
def test_a_misspelt_teacher_or_student_is_told_with_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, student: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos-net").mkdir()
    (tmp_path / "photos-net" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=says):
        check_names(teacher, student)


def test_what_is_saved_or_a_family_is_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net").mkdir()
    for teacher in ("net", "net.pt/../net", "owner/name", "ResNet"):
        check_names(teacher, "mobile-net")


def _saved(folder: Path, data: dict[str, object], shape: tuple[int, int, int]) -> Path:
    net = attar.models.build("mlp", shape=shape, outputs=2)
    task = {"name": "ImageClassification", "classes": 2}
    attar.models.save(net, folder, extra={"task": task, "data": data})
    return folder


def test_a_model_is_scored_on_the_rows_that_its_run_kept_for_the_test(tmp_path: Path) -> None:
    """Of the same folder: other options than the run's own could test what it was trained on."""
    photos = _draw(tmp_path / "photos", count=10)
    own = {"name": "images", "folder": photos, "size": 8, "test_fraction": 0.5}
    model = _saved(tmp_path / "model", own, (3, 8, 8))
    assert len(evaluate_model(model, f"{photos}/", NONE)) == 10


def test_another_folder_is_read_in_the_size_that_the_model_takes(tmp_path: Path) -> None:
    photos, other = _draw(tmp_path / "photos"), _draw(tmp_path / "other", (30, 42), count=10)
    own = {"name": "images", "folder": photos, "size": 8, "test_fraction": 0.5}
    model = _saved(tmp_path / "model", own, (3, 8, 8))
    assert len(evaluate_model(model, other, NONE)) == 4
