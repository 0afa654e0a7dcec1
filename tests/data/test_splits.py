"""split: disjoint, complete, stratified, repeatable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data import DatasetSource, TensorSource, split, tensors
from attar.runtime import DataError, UsageError

labels_of_any_kind = st.lists(st.integers(0, 6), min_size=4, max_size=120)
fractions = st.floats(0.15, 0.85)


def _ids(source) -> torch.Tensor:
    return source.rows(torch.arange(len(source)))["inputs"][:, 0].long()


def _numbered(rows: int, labels=None, classes=None) -> TensorSource:
    return TensorSource(torch.arange(float(rows)), labels, classes=classes)


@settings(deadline=None)
@given(labels_of_any_kind, fractions, st.integers(0, 5))
def test_stratified_split(labels: list[int], fraction: float, seed: int) -> None:
    classes = torch.tensor(labels)
    source = _numbered(len(labels), classes, 7)
    sizes = classes.bincount(minlength=7)
    try:
        rest, part = split(source, fraction, seed=seed)
    except DataError:  # nothing could be spared
        assert (sizes - 1).clamp_min(0).sum() == 0 or fraction * len(labels) < 1
        return
    kept, taken = _ids(rest), _ids(part)
    assert torch.equal(torch.cat([kept, taken]).sort().values, torch.arange(len(labels)))
    assert kept.diff().gt(0).all()
    assert taken.diff().gt(0).all()
    assert torch.equal(rest.labels, classes[kept])
    assert torch.equal(part.labels, classes[taken])
    counts = part.labels.bincount(minlength=7)
    assert ((counts - fraction * sizes).abs() < 1 + 1e-9).all()
    assert (counts[sizes <= 1] == 0).all()
    assert (rest.labels.bincount(minlength=7)[sizes > 0] > 0).all()


@settings(deadline=None)
@given(st.integers(4, 200), fractions)
def test_without_classes_the_size_is_exact(rows: int, fraction: float) -> None:
    for labels in (None, torch.rand(rows)):
        rest, part = split(_numbered(rows, labels), fraction)
        assert abs(len(part) - rows * fraction) <= 0.5 + 1e-9 or len(rest) == 1
        assert len(rest) + len(part) == rows


def test_small_classes_fill_the_part_to_its_size() -> None:
    # 100 classes of 2 rows, a fifth: each class alone would round to nothing.
    _, part = split(_numbered(200, torch.arange(200) % 100, 100), 0.2)
    assert len(part) == 40
    assert part.labels.bincount().max() == 1


def test_a_split_is_a_function_of_the_seed() -> None:
    source = _numbered(100, torch.arange(100) % 3, 3)
    parts = [_ids(split(source, 0.3, seed=seed)[1]).tolist() for seed in (0, 0, 1, 2)]
    assert parts[0] == parts[1]
    assert len({tuple(part) for part in parts}) == 3
    assert _ids(split(_numbered(8), 0.5)[1]).tolist() == [0, 1, 5, 7]  # pinned: see test_draw


def test_every_row_can_be_taken() -> None:
    source = _numbered(10, torch.arange(10) % 2, 2)
    taken = torch.zeros(10)
    for seed in range(1_000):
        taken[_ids(split(source, 0.4, seed=seed)[1])] += 1
    assert (taken - 400).abs().max() < 5 * (1_000 * 0.4 * 0.6) ** 0.5


def test_parts_split_again_and_data_sets_too() -> None:
    source = DatasetSource([(float(i), i % 2) for i in range(40)], classes=2)
    rest, part = split(source, 0.5)
    first, second = split(part, 0.5)
    together = torch.cat([_ids(rest), _ids(first), _ids(second)])
    assert torch.equal(together.sort().values, torch.arange(40))
    assert first.labels.bincount().tolist() == [5, 5]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fractions_outside_are_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"must be in \(0, 1\)"):
        split(_numbered(10), fraction)


@pytest.mark.parametrize(
    ("labels", "fraction"), [(torch.arange(5), 0.4), (torch.zeros(5, dtype=torch.int64), 0.05)]
)
def test_empty_parts_are_refused(labels, fraction: float) -> None:
    with pytest.raises(DataError, match="of 5 rows is empty"):
        split(_numbered(5, labels, 5), fraction)


# tensors


def test_tensors_count_the_classes_of_both_parts() -> None:
    train, test = tensors(
        torch.rand(3, 2), torch.tensor([0, 1, 0]), torch.rand(2, 2), torch.tensor([0, 4])
    )
    assert train.classes == test.classes == ("0", "1", "2", "3", "4")
    assert tensors(
        torch.rand(1, 2), torch.tensor([0]), torch.rand(1, 2), torch.tensor([1]), classes=["a", "b"]
    ).train.classes == ("a", "b")


def test_tensors_without_training_labels() -> None:
    train, test = tensors(torch.rand(3, 2), None, torch.rand(2, 2), torch.tensor([0, 1]))
    assert train.labels is None
    assert train.outputs == test.outputs == 2
    values = tensors(torch.rand(3, 2), torch.rand(3), torch.rand(2, 2), torch.rand(2))
    assert (values.train.classes, values.test.outputs) == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3, 2), None, torch.rand(2, 3), None), r"shape \[2\] in train but \[3\]"),
        ((torch.rand(2, 2), torch.rand(2), torch.rand(2, 2), torch.rand(2, 3)), "1 columns .* 3"),
        (
            (torch.rand(2, 2), torch.tensor([0, 1]), torch.rand(2, 2), torch.rand(2)),
            "integers: convert",
        ),
        ((torch.rand(2, 2), torch.tensor([0, -1]), torch.rand(2, 2), None), "label -1 of row 1"),
    ],
)
def test_tensors_that_do_not_agree_are_refused(arguments, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tensors(*arguments)
