"""csv: a golden table, and every error with its file and line."""

from __future__ import annotations

import csv as standard
from pathlib import Path

import pytest
import torch

from attar.data import csv
from attar.runtime import DataError, UsageError

TRAIN = """\
age,colour,size,kind
30,red,1.5,cat
,green,2.5,dog

50,red,,cat
40,,3.5,dog
"""
TEST = """\
size,age,kind,colour
9,10,dog,blue
,20,cat,red
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def _all(source) -> dict[str, torch.Tensor]:
    return source.rows(torch.arange(len(source)))


def _both(write, train: str, test: str, **options):
    return csv(train=write("train.csv", train), test=write("test.csv", test), **options)


def test_golden_table(write) -> None:
    train, test = _both(write, TRAIN, TEST, target="kind")
    # age, colour = "" | green | red, size; empty numbers are the training means 40 and 2.5.
    assert _all(train)["inputs"].tolist() == [
        [30, 0, 0, 1, 1.5],
        [40, 0, 1, 0, 2.5],
        [50, 0, 0, 1, 2.5],
        [40, 1, 0, 0, 3.5],
    ]
    # Columns are found by name; blue was never seen in training.
    assert _all(test)["inputs"].tolist() == [[10, 0, 0, 0, 9], [20, 0, 0, 1, 2.5]]
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert test.labels.tolist() == [1, 0]
    assert (train.name, test.name) == ("train.csv train", "test.csv test")


def test_regression(write) -> None:
    train, test = _both(write, "x,y\n1,2.5\n2,-1e3\n", "x,y\n3,4\n", target="y", regression=True)
    assert train.labels.tolist() == [[2.5], [-1000.0]]
    assert test.labels.tolist() == [[4.0]]
    assert (train.classes, train.outputs) == (None, 1)


def test_no_target_and_a_target_that_only_the_test_has(write) -> None:
    train, test = _both(write, "x\n1\n2\n", "x,y\n1,b\n2,a\n", target="y")
    assert train.labels is None
    assert train.classes == test.classes == ("a", "b")
    assert test.labels.tolist() == [1, 0]
    train, test = _both(write, "x\n1\n2\n", "x\n3\n")
    assert (train.labels, test.labels, train.classes) == (None, None, None)
    train, test = _both(write, "x\n1\n", "x,y\n1,2\n", target="y", regression=True)
    assert (train.labels, test.labels.tolist()) == (None, [[2.0]])


def test_one_file_is_split_by_class_before_its_columns_are_read(write) -> None:
    rows = [f"{i},{'ab'[i % 2]},u{i}" for i in range(20)]
    path = write("all.csv", "x,y,word\n" + "\n".join(rows))
    train, test = csv(train=path, target="y", test_fraction=0.3)
    assert train.labels.bincount().tolist() == [7, 7]
    assert test.labels.bincount().tolist() == [3, 3]
    seen = torch.cat([_all(part)["inputs"][:, 0] for part in (train, test)])
    assert torch.equal(seen.sort().values, torch.arange(20.0))
    # Every word is its own category: those of the test part are unknown to the training part.
    assert train.shape == (15,)
    assert _all(train)["inputs"][:, 1:].sum() == 14
    assert _all(test)["inputs"][:, 1:].sum() == 0
    again = csv(train=path, target="y", test_fraction=0.3)
    other = csv(train=path, target="y", test_fraction=0.3, seed=1)
    assert again.test.fingerprint() == test.fingerprint() != other.test.fingerprint()
    assert len(csv(train=path).test) == 4
    assert len(csv(train=write("n.csv", "x,y\n1,2\n3,4\n5,6\n"), target="y", regression=True)[1])


def test_a_class_of_one_row_stays_in_training(write) -> None:
    path = write("all.csv", "x,y\n" + "1,a\n" * 10 + "2,b\n")
    train, test = csv(train=path, target="y", test_fraction=0.5)
    assert train.classes == ("a", "b")
    assert train.labels.bincount().tolist()[1] == 1
    assert test.labels.max() == 0


def test_classes_that_are_numbers_are_sorted_as_numbers(write) -> None:
    path = write("all.csv", "x,y\n" + "".join(f"{i},{i % 12 - 1}\n" for i in range(48)))
    assert csv(train=path, target="y").train.classes == tuple(str(i) for i in range(-1, 11))
    path = write("mixed.csv", "x,y\n" + "1,10\n1,9\n1,b\n" * 4)
    assert csv(train=path, target="y").train.classes == ("10", "9", "b")


def test_quotes_marks_and_invisible_characters(write) -> None:
    text = '\ufeffx,"the, kind"\r\n1," a\x1b[31mb "\r\n2,"two\nlines"\r\n'
    train, _ = _both(write, text, text, target="the, kind")
    assert train.classes == ("a[31mb", "twolines")
    assert train.shape == (1,)


def test_a_long_cell_is_refused_and_the_limit_of_the_csv_module_is_put_back(write) -> None:
    standard.field_size_limit(200_000)
    try:
        with pytest.raises(DataError, match=r"a\.csv:2: field larger than field limit \(131072\)"):
            csv(train=write("a.csv", "x,y\n" + "1" * 140_000 + ",a\n"), target="y")
        assert standard.field_size_limit() == 200_000
    finally:
        standard.field_size_limit(131_072)


ONE_FILE = {
    "ragged": ("x,y\n1,a\n\n1,a,3\n", r"all\.csv:4: 3 cells, but the header has 2"),
    "short": ('x,y\n"1\n",a\n1\n', r"all\.csv:4: 1 cells"),
    "empty": ("", r"all\.csv: the file is empty"),
    "blank": ("\n\n", r"all\.csv: the file is empty"),
    "no rows": ("x,y\n", r"all\.csv: a header and no rows"),
    "unknown target": ("x,yy\n1,a\n", r"all\.csv: no column 'y' for target; did you mean 'yy'\?"),
    "only a target": ("y\na\nb\na\nb\na\nb\n", "no column besides the target 'y'"),
    "nameless": (",y\n1,a\n", r"all\.csv:1: column 1 has no name"),
    "same names": ("\nx,y,x\n1,a,2\n", r"all\.csv:2: two columns are called 'x'"),
    "empty target": ("x,y\n" + "1,a\n" * 6 + "1,\n1,\n", r"all\.csv:[89]: the target 'y' is empty"),
    "one class": ("x,y\n" + "1,a\n" * 6, "target 'y' is 'a' in every row"),
    "open quote": ('x,y\n1,a\n1,"a\n2,b\n', r"all\.csv:3: unexpected end of data; check the quo"),
    "after quote": ('x,y\n1,"a"b\n', r"all\.csv:2: .* check the quotes"),
    "latin-1": (b"x,y\n1,\xe9\n", r"all\.csv: not UTF-8 text at line 1 or soon after"),
    "empty column": ("x,z,y\n" + "1,,a\n1,,b\n" * 5, "column 'z' is empty in all training rows"),
    "missing mark": (
        "x,y\n" + "NA,a\n" + "1,a\n2,b\n" * 2 + "NA,b\n" * 5,
        r"all\.csv:\d+: 'NA' in column 'x' of numbers is no finite number; leave",
    ),
    "not a number": ("x,y\n" + "nan,a\n1,b\n" * 5, r"all\.csv:\d+: 'nan' in column 'x'"),
}


@pytest.mark.parametrize("case", ONE_FILE)
def test_faults_of_one_file(write, case: str) -> None:
    text, message = ONE_FILE[case]
    path = write("all.csv", text)
    with pytest.raises(DataError, match=message) as error:
        csv(train=path, target="y", test_fraction=0.3)
    assert str(error.value).startswith(path)


TWO_FILES = {
    "word in numbers": ("x,y\n1,a\n2,b\n", "x,y\n\n3,a\nfour,b\n", r"test\.csv:4: 'four' in col"),
    "unknown class": (
        "x,y\n1,cat\n2,dog\n",
        "x,y\n3,dog\n4,cta\n",
        r"test\.csv:3: class 'cta'.*'cat'",
    ),
    "target missing in test": ("x,y\n1,a\n2,b\n", "x\n3\n", r"test\.csv: no column 'y' for target"),
    "target nowhere": ("x,z\n1,a\n2,b\n", "x,z\n3,a\n", r"test\.csv: no column 'y'"),
    "missing column": ("x,w,y\n1,1,a\n2,1,b\n", "x,y\n3,a\n", r"train\.csv: column 'w' is not in"),
    "extra column": ("x,y\n1,a\n2,b\n", "x,xx,y\n3,1,a\n", r"column 'xx' .*did you mean 'x'\?"),
    "empty target": ("x,y\n1,a\n2,b\n", "x,y\n3,\n", r"test\.csv:2: the target 'y' is empty"),
}


@pytest.mark.parametrize("case", TWO_FILES)
def test_faults_between_two_files(write, case: str) -> None:
    train, test, message = TWO_FILES[case]
    with pytest.raises(DataError, match=message):
        _both(write, train, test, target="y")


@pytest.mark.parametrize("value", ["word", "nan", "inf", "1e39", "1_000"])
def test_a_regression_target_must_be_a_number(write, value: str) -> None:
    with pytest.raises(DataError, match=rf"test\.csv:3: '{value}' in column 'y' is not a finite"):
        _both(write, "x,y\n1,2\n", f"x,y\n1,2\n3,{value}\n", target="y", regression=True)


def test_a_text_column_as_a_regression_target_is_said_of_the_column(write) -> None:
    text = "x,y\n1,no\n2,yes\n3,no\n4,5\n"
    with pytest.raises(DataError, match=r"target 'y' holds text such as '\w+', '\w+', and regr"):
        csv(train=write("a.csv", text), target="y", regression=True)


def test_regression_needs_a_target(write) -> None:
    with pytest.raises(UsageError, match="regression needs a target"):
        csv(train=write("a.csv", "x\n1\n"), regression=True)


def test_too_many_classes_and_categories(write) -> None:
    many = "x,y\n" + "".join(f"1,{i}\n" for i in range(1_001))
    with pytest.raises(DataError, match=r"1,001 classes .*regression: true"):
        _both(write, many, many, target="y")
    assert _both(write, many, many, target="y", regression=True).train.outputs == 1
    words = "x,y\n7,a\n" + "".join(f"w{i},{'ab'[i % 2]}\n" for i in range(1_000))
    with pytest.raises(
        DataError, match=r"train\.csv:3: 'w0' makes 'x' a column of categories, .*1,001"
    ):
        _both(write, words, words, target="y")
    exact = "x,y\n" + "".join(f"1,{i}\n" for i in range(1_000))
    assert _both(write, exact, exact, target="y").train.outputs == 1_000


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read .*check the path"):
            csv(train=str(path))
