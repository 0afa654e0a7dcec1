"""Data sets of Hugging Face's datasets: columns, splits by name, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attar.data import DatasetSource, TensorSource, dataset, decoding
from attar.runtime import DataError, UsageError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def _pixels(seed: int, channels: int = 3, height: int = 8, width: int = 8) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _photos(seed: int, count: int = 6, channels: int = 3, **sides: int):
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["owl", "ape"])}
    )
    shots = [Image.fromarray(_pixels(seed + i, channels, **sides)) for i in range(count)]
    return datasets.Dataset.from_dict(
        {"photo": shots, "kind": [i % 2 for i in range(count)]}, features=features
    )


def _saved(root: Path, **parts) -> str:
    datasets.DatasetDict(parts).save_to_disk(str(root / "set"))
    return str(root / "set")


def _all(source) -> torch.Tensor:
    return source.rows(torch.arange(len(source)))["inputs"]


def test_images_and_class_names_come_from_their_columns(tmp_path: Path) -> None:
    path = _saved(tmp_path, train=_photos(0), validation=_photos(50, 3), test=_photos(100, 4))
    train, validation, test = dataset(path=path, inputs="photo", labels="kind")
    assert (len(train), len(validation), len(test), train.shape) == (6, 3, 4, (3, 8, 8))
    assert train.classes == ("owl", "ape")
    assert test.labels.tolist() == [0, 1, 0, 1]
    expected = torch.from_numpy(_pixels(102)).permute(2, 0, 1).float()
    assert torch.equal(_all(test)[2] * 255, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_demand_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path = _saved(tmp_path, train=_photos(0, height=20, width=30), test=_photos(9))
    whole = dataset(path=path, inputs="photo", labels="kind", size=6, workers=workers)
    monkeypatch.setattr(decoding, "_MOST_BYTES", 0)
    lazy = dataset(path=path, inputs="photo", labels="kind", size=6, workers=workers)
    assert isinstance(whole.train, TensorSource)
    assert isinstance(lazy.train, DatasetSource)
    assert torch.equal(_all(whole.train), _all(lazy.train))
    assert whole.train.fingerprint() == lazy.train.fingerprint()
    read = torch.cat([batch["inputs"] for batch in lazy.train.batches(2)])
    assert torch.equal(read, _all(whole.train))


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    path = _saved(tmp_path, train=_photos(0, channels=1), test=_photos(9, channels=1))
    train = dataset(path=path, inputs="photo", labels="kind").train
    assert torch.equal(_all(train)[1, 0] * 255, torch.from_numpy(_pixels(1, 1)).float())


def test_a_late_colour_image_among_grey_ones_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = datasets.concatenate_datasets([_photos(0, 1, 1), _photos(0, 1), _photos(0, 1, 1)])
    path = _saved(tmp_path, train=mixed, test=_photos(0, channels=1))
    from attar.data import huggingface

    assert dataset(path=path, inputs="photo", labels="kind").train.shape == (3, 8, 8)
    monkeypatch.setattr(huggingface, "_LOOKED_AT", 2)
    with pytest.raises(DataError, match="row 1 of column 'photo' is a colour image"):
        dataset(path=path, inputs="photo", labels="kind")


def test_images_of_two_sizes_are_named(tmp_path: Path) -> None:
    mixed = datasets.concatenate_datasets([_photos(0, 2), _photos(0, 1, height=9)])
    path = _saved(tmp_path, train=mixed, test=_photos(0))
    with pytest.raises(DataError, match=r"row 0 .* is 8 x 8 and .*row 2 .* 9 x 8.*size: 64"):
        dataset(path=path, inputs="photo", labels="kind")


def _encoded(path: Path, cells: list, **columns) -> str:
    """A parquet file as others than ``datasets`` write it."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    kind = image if isinstance(cells[0], dict) else pyarrow.binary()
    parquet.write_table(pyarrow.table({"x": pyarrow.array(cells, kind), **columns}), path)
    return str(path)


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_pixels(seed)).save(file, "PNG")
    return file.getvalue()


def test_encoded_images_in_a_file_of_another_writer(tmp_path: Path) -> None:
    named = [{"bytes": _png(i), "path": f"{i}.png"} for i in range(6)]
    for number, cells in enumerate((named, [cell["bytes"] for cell in named])):
        path = _encoded(tmp_path / f"{number}.parquet", cells, y=[0, 1] * 3)
        train, test = dataset(path=path, inputs="x", labels="y", test_fraction=0.5)
        assert train.shape == (3, 8, 8)
        expected = {_pixels(i).transpose(2, 0, 1).tobytes() for i in range(6)}
        rows = [row for part in (train, test) for row in (_all(part) * 255).byte().numpy()]
        assert {row.tobytes() for row in rows} == expected


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"bytes": b"no image"}, "not an image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"path": "http://localhost:9/a.png"}, "a link to another machine, which is not followed"),
        ({"path": "absent.png"}, "the file that it names is not there"),
        ({"bytes": _png(0)[:-80]}, "cannot be decoded"),
    ],
)
def test_an_image_that_is_none_is_named_by_its_row(tmp_path: Path, bad: dict, said: str) -> None:
    path = _encoded(tmp_path / "x.parquet", [{"bytes": _png(0)}] * 4 + [bad], y=[0, 1, 0, 1, 0])
    with pytest.raises(DataError, match=f"row 4 of column 'x': {said}"):
        dataset(path=path, inputs="x", labels="y")


def _table(**columns):
    return datasets.Dataset.from_dict(columns)


def test_columns_of_numbers_stand_side_by_side(tmp_path: Path) -> None:
    rows = _table(a=[1, 2, 3, 4], b=[0.5, 1.5, 2.5, 3.5], y=["no", "yes", "no", "yes"])
    path = _saved(tmp_path, train=rows, test=rows.select([3, 0]))
    train, test = dataset(path=path, inputs=["a", "b"], labels="y")
    assert train.classes == ("no", "yes")
    assert _all(train).tolist() == [[1, 0.5], [2, 1.5], [3, 2.5], [4, 3.5]]
    assert _all(test).tolist() == [[4, 3.5], [1, 0.5]]
    assert test.labels.tolist() == [1, 0]


@pytest.mark.parametrize("lazily", [False, True])
def test_arrays_of_one_shape_are_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    features = datasets.Features(
        {"x": datasets.Array3D((3, 4, 5), "uint8"), "y": datasets.Value("float32")}
    )
    values = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), np.uint8)
    rows = datasets.Dataset.from_dict({"x": list(values), "y": np.arange(6.0)}, features=features)
    path = _saved(tmp_path, train=rows, test=rows)
    if lazily:
        monkeypatch.setattr(decoding, "_MOST_BYTES", 0)
    train = dataset(path=path, inputs="x", labels="y").train
    assert isinstance(train, DatasetSource) == lazily
    assert torch.equal(_all(train), torch.from_numpy(values) / 255)
    assert train.classes is None
    assert train.labels.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]


def test_lists_of_numbers_are_rows_of_a_table(tmp_path: Path) -> None:
    rows = _table(x=[[1.0, 2.0], [3.0, 4.0]], y=[0, 2])
    train = dataset(path=_saved(tmp_path, train=rows, test=rows), inputs="x", labels="y").train
    assert _all(train).tolist() == [[1, 2], [3, 4]]
    assert train.classes == ("0", "1", "2")


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    rows = _table(x=[1.0, 2.0, 3.0])
    train = dataset(path=_saved(tmp_path, train=rows, test=rows), inputs="x").train
    assert train.labels is None
    assert _all(train).tolist() == [[1], [2], [3]]


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_a_file_is_split_by_seed(tmp_path: Path, kind: str) -> None:
    rows = _table(x=[float(i) for i in range(20)], y=["a", "b"] * 10)
    path = str(tmp_path / f"table.{kind}")
    getattr(rows, f"to_{kind}")(path)
    train, test = dataset(path=path, inputs="x", labels="y")
    assert (len(train), test.labels.bincount().tolist()) == (16, [2, 2])
    assert sorted(_all(train).flatten().tolist() + _all(test).flatten().tolist()) == [
        float(i) for i in range(20)
    ]
    other = dataset(path=path, inputs="x", labels="y", seed=1).test
    assert not torch.equal(_all(other), _all(test))


def test_a_folder_of_files_has_its_splits_by_name(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("test", 4)):
        _table(x=list(range(count)), y=[0, 1] * (count // 2)).to_parquet(
            str(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet")
        )
    train, test = dataset(path=str(tmp_path / "set"), inputs="x", labels="y")
    assert (len(train), len(test)) == (6, 4)


ROWS = {
    "x": [1.0, 2.0],
    "y": [0, 1],
    "word": ["a", "b"],
    "gap": [1.0, None],
    "ragged": [[1], [1, 2]],
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": "z"}, "no column 'z'; its columns are x, y, word, gap, ragged"),
        ({"inputs": "x", "labels": "why"}, "no column 'why'; its columns are x, y"),
        ({"inputs": "word"}, "column 'word' holds string, and inputs are images or numbers"),
        ({"inputs": "gap"}, "row 1 of column 'gap' has no value"),
        ({"inputs": "x", "labels": "gap"}, "train: row 1 of column 'gap' has no value"),
        ({"inputs": "ragged"}, r"row 1 of column 'ragged' has the shape \[2\] and row 0 \[1\]"),
        ({"inputs": ["x", "ragged"]}, "'ragged' .*several columns need one number each"),
        ({"inputs": "x", "labels": "ragged"}, r"row 1 of column 'ragged' has the shape \[2\]"),
    ],
)
def test_a_wrong_column_is_named(tmp_path: Path, options: dict, said: str) -> None:
    rows = _table(**ROWS)
    path = _saved(tmp_path, train=rows, test=rows)
    with pytest.raises(DataError, match=said):
        dataset(path=path, **options)


def test_a_class_that_only_the_test_rows_have_is_named(tmp_path: Path) -> None:
    path = _saved(
        tmp_path, train=_table(x=[1, 2], y=["a", "b"]), test=_table(x=[1, 2], y=["a", "c"])
    )
    with pytest.raises(DataError, match="test: class 'c' of row 1 of column 'y'"):
        dataset(path=path, inputs="x", labels="y")


def test_class_names_must_agree_between_the_splits(tmp_path: Path) -> None:
    train = _photos(0)
    test = _photos(0).cast_column("kind", datasets.ClassLabel(names=["ape", "owl"]))
    for part, rows in (("train", train), ("test", test)):
        rows.to_parquet(str(tmp_path / f"{part}.parquet"))
    path = str(tmp_path / "set")
    (tmp_path / "set").mkdir()
    datasets.DatasetDict(train=train).save_to_disk(path)
    test.save_to_disk(str(tmp_path / "set" / "test"))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="other names"):
        dataset(path=path, inputs="photo", labels="kind")


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split train, but eval"):
        dataset(path=_saved(tmp_path, eval=_table(x=[1.0])), inputs="x")
    for path in ("csv", "../nothing", "a/b/c", "https://x.y/z.csv"):
        with pytest.raises(DataError, match="no file or folder"):
            dataset(path=path, inputs="x")
    with pytest.raises(DataError, match="nobody/nothing cannot be loaded"):
        dataset(path="nobody/nothing", inputs="x")
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"known are \.parquet"):
        dataset(path=str(tmp_path / "x.pkl"), inputs="x")


def test_a_script_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be loaded"):
        dataset(path=str(folder), inputs="x")
    assert not (tmp_path / "ran").exists()


def test_size_is_for_images(tmp_path: Path) -> None:
    rows = _table(x=[1.0, 2.0])
    with pytest.raises(UsageError, match="size is for images, and 'x' is a column of float64"):
        dataset(path=_saved(tmp_path, train=rows, test=rows), inputs="x", size=8)


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'pip install "attar\[datasets\]"'):
        dataset(path="x.csv", inputs="x")


def test_a_recipe_names_one_column_or_several(tmp_path: Path) -> None:
    from attar.recipes import parse, rooms
    from attar.recipes.resolve import Resolver

    path = str(tmp_path / "table.csv")
    _table(a=[1, 2, 3, 4] * 5, b=[0.5] * 20, y=["n", "y"] * 10).to_csv(path)
    for written, width in (("a", 1), ("[a, b]", 2)):
        text = f"{{name: dataset, path: {path!r}, inputs: {written}, labels: y}}"
        document = parse(text, "recipe")
        train, _ = Resolver(document, rooms()).choice(document.value, "readers", ())()
        assert train.shape == (width,)
