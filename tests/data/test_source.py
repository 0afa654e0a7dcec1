"""Sources: what they accept, what they give, and in which order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data import Subset, TensorSource, crop, cutmix, flip, mixup
from attar.runtime import DataError, UsageError

EVERYTHING = (crop, flip, mixup, cutmix)


def _images(rows: int = 50, classes: int = 3) -> TensorSource:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (rows, 1, 6, 5), generator=generator, dtype=torch.uint8)
    return TensorSource(inputs, torch.arange(rows) % classes, classes=classes)


def _joined(batches) -> dict[str, torch.Tensor]:
    parts = list(batches)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _by_id(batches) -> dict[str, torch.Tensor]:
    joined = _joined(batches)
    order = joined["ids"].argsort()
    return {key: value[order] for key, value in joined.items()}


# Order and randomness


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 3))
def test_every_id_once_whatever_the_batch_size(rows: int, batch_size: int, number: int) -> None:
    source = TensorSource(torch.arange(float(rows)))
    batches = list(source.epoch(number, batch_size=batch_size, seed=1))
    assert [len(batch["ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    ids = torch.cat([batch["ids"] for batch in batches])
    assert torch.equal(ids.sort().values, torch.arange(rows))
    assert torch.equal(torch.cat([batch["inputs"] for batch in batches])[:, 0], ids.float())


def test_order_does_not_depend_on_the_batch_size() -> None:
    source = _images()
    orders = [_joined(source.epoch(2, batch_size=size, seed=5))["ids"] for size in (7, 50, 64)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_order_depends_on_seed_and_number() -> None:
    orders = [
        _joined(_images().epoch(number, batch_size=64, seed=seed))["ids"]
        for number, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_pixels_of_a_row_do_not_depend_on_its_batch() -> None:
    source = _images()
    options = {"seed": 3, "augment": EVERYTHING}
    whole = _by_id(source.epoch(1, batch_size=64, **options))
    for size in (1, 7):
        other = _by_id(source.epoch(1, batch_size=size, **options))
        for key, value in whole.items():
            assert torch.equal(value, other[key]), (key, size)


@pytest.mark.parametrize("change", [{"number": 1}, {"seed": 1}], ids=str)
@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda f: f.__name__)
def test_another_view_or_seed_gives_other_pixels(augmentation, change) -> None:
    call = {"number": 0, "seed": 0, "batch_size": 64, "augment": (augmentation,)}
    first, second = (_by_id(_images().epoch(**{**call, **part})) for part in ({}, change))
    differ = (first["inputs"] != second["inputs"]).flatten(1).any(1)
    assert differ.float().mean() > 0.3


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy())
    first = _joined(_images().epoch(0, batch_size=9, seed=0, augment=EVERYTHING))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.manual_seed(1)
    second = _joined(_images().epoch(0, batch_size=9, seed=0, augment=EVERYTHING))
    assert torch.equal(first["inputs"], second["inputs"])


@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_start_drops_batches(start: int) -> None:
    call = {"batch_size": 7, "seed": 0, "augment": EVERYTHING}
    all_batches = list(_images().epoch(0, **call))
    resumed = list(_images().epoch(0, **call, start=start))
    assert len(all_batches) == 8
    assert len(resumed) == 8 - start
    for left, right in zip(all_batches[start:], resumed, strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_start_reads_no_skipped_row() -> None:
    class Counting(TensorSource):
        read = 0

        def rows(self, ids):
            self.read += len(ids)
            return super().rows(ids)

    source = Counting(torch.rand(40, 3))
    list(source.epoch(0, batch_size=8, seed=0, start=3))
    assert source.read == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": -1}, "number must be at least 0, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"start": -1}, "start must be at least 0"),
        ({"start": 9}, "start=9 is past the last of the 8 batches of 7"),
    ],
)
def test_epoch_refuses_at_the_call(arguments, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _images().epoch(**{"number": 0, "batch_size": 7, "seed": 0, **arguments})


def test_batches_are_in_order_and_plain() -> None:
    source = _images()
    batches = list(source.batches(16))
    assert [len(batch["ids"]) for batch in batches] == [16, 16, 16, 2]
    joined = _joined(batches)
    everything = source.rows(torch.arange(50))
    assert all(torch.equal(joined[key], everything[key]) for key in everything)


# What rows are


def test_bytes_of_images_become_floats_over_255_exactly() -> None:
    inputs = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    rows = TensorSource(inputs).rows(torch.tensor([0]))["inputs"]
    assert rows.dtype == torch.float32
    assert torch.equal(rows.flatten(), torch.arange(256) / 255)


def test_bytes_stay_bytes_in_memory() -> None:
    inputs = np.zeros((3, 4, 4), np.uint8)
    source = TensorSource(inputs)
    assert np.shares_memory(source._inputs, inputs)
    assert source.shape == (1, 4, 4)


def test_bytes_of_a_table_are_numbers() -> None:
    rows = TensorSource(torch.tensor([[0, 255]], dtype=torch.uint8)).rows(torch.tensor([0]))
    assert rows["inputs"].tolist() == [[0.0, 255.0]]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool],
    ids=str,
)
def test_every_number_becomes_float32(dtype: torch.dtype) -> None:
    inputs = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    rows = TensorSource(inputs).rows(torch.tensor([1, 0]))["inputs"]
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("given_shape", "shape"),
    [((4,), (1,)), ((4, 3), (3,)), ((4, 5, 6), (1, 5, 6)), ((4, 2, 5, 6), (2, 5, 6))],
)
def test_shape_of_one_input(given_shape, shape) -> None:
    source = TensorSource(torch.rand(given_shape))
    assert source.shape == shape
    assert source.rows(torch.tensor([2, 0]))["inputs"].shape == (2, *shape)


def test_tensors_and_arrays_give_the_same_rows() -> None:
    inputs, labels = torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32)
    ids = torch.tensor([4, 0])
    one = TensorSource(inputs, labels, classes=2).rows(ids)
    other = TensorSource(inputs.numpy(), labels.numpy(), classes=2).rows(ids)
    assert one.keys() == other.keys() == {"inputs", "labels", "ids"}
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["labels"].dtype == torch.int64


def test_read_only_arrays_do_not_warn() -> None:
    inputs, labels = np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int64)
    for array in (inputs, labels):
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = TensorSource(inputs, labels, classes=1)
        assert source.rows(torch.tensor([1]))["inputs"].sum() == 0
        assert source.labels is not None


def test_batches_are_copies() -> None:
    source = _images()
    source.rows(torch.arange(3))["labels"].fill_(9)
    source.rows(torch.arange(3))["inputs"].fill_(9)
    assert source.rows(torch.arange(3))["labels"].tolist() == [0, 1, 2]
    assert source.rows(torch.arange(3))["inputs"].max() <= 1


def test_labels_and_outputs() -> None:
    inputs = torch.rand(4, 2)
    named = TensorSource(inputs, torch.tensor([0, 1, 1, 0]), classes=["no", "yes"])
    assert (named.classes, named.outputs) == (("no", "yes"), 2)
    values = TensorSource(inputs, torch.rand(4))
    assert (values.classes, values.outputs) == (None, 1)
    assert values.labels.shape == (4, 1)
    assert values.rows(torch.tensor([1]))["labels"].shape == (1, 1)
    assert TensorSource(inputs, torch.rand(4, 3, dtype=torch.float64)).outputs == 3
    unlabelled = TensorSource(inputs)
    assert (unlabelled.labels, unlabelled.outputs) == (None, None)
    assert unlabelled.rows(torch.tensor([0])).keys() == {"inputs", "ids"}
    assert TensorSource(inputs, classes=5).outputs == 5
    assert TensorSource(inputs, torch.tensor([0, 1, 1, 0])).outputs is None


def test_empty_ids_give_an_empty_batch() -> None:
    batch = _images().rows(torch.empty(0, dtype=torch.int64))
    assert batch["inputs"].shape == (0, 1, 6, 5)
    assert batch["labels"].shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 50]), "there is no row 50; ids go from 0 to 49"),
        (torch.tensor([3, -1]), "there is no row -1"),
        (torch.ones(50, dtype=torch.bool), "ids must be int64"),
        (torch.tensor([[0]]), "ids must be int64"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Subset(s, torch.arange(50))])
def test_wrong_ids_are_refused(wrap, ids, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wrap(_images()).rows(ids)


# What is refused


@pytest.mark.parametrize(
    ("inputs", "labels", "classes", "message"),
    [
        (torch.empty(0, 3), None, None, "empty data set"),
        (torch.empty(3, 0), None, None, "empty data set"),
        (torch.tensor(1.0), None, None, "empty data set"),
        ([[1.0]], None, None, "tensor or a numpy array, not list"),
        (np.array([["a"]]), None, None, "must hold numbers"),
        (torch.ones(2, 1, dtype=torch.complex64), None, None, "must hold numbers"),
        (torch.rand(3, 2), torch.zeros(2, dtype=torch.int64), 2, "3 inputs but 2 labels"),
        (torch.rand(3, 2), torch.tensor(1), 2, "3 inputs but 1 labels"),
        (torch.rand(3, 2), torch.tensor([0, 2, 5]), 2, "label 2 of row 1 .*0 to 1"),
        (torch.rand(3, 2), torch.tensor([0, 1, -1]), 2, "label -1 of row 2"),
        (torch.rand(3, 2), torch.tensor([0, 1, -7]), None, "label -7 of row 2 .*0 and up"),
        (torch.rand(3, 2), torch.tensor([0.0, 1, 1]), 2, r"labels\.long\(\)"),
        (torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64), None, r"labels\.argmax\(1\)"),
        (torch.rand(3, 2), torch.rand(3, 2, 2), None, r"must be \[N\] or \[N, K\]"),
        (torch.rand(3, 2), torch.tensor([0, 1, float("nan")]), None, "labels of row 2 are not"),
        (torch.tensor([[0.0], [float("nan")]]), None, None, "inputs of row 1 are not all finite"),
        (torch.tensor([[0.0], [0], [float("-inf")]]), None, None, "inputs of row 2 are not"),
        (torch.tensor([[0.0], [1e300]], dtype=torch.float64), None, None, "inputs of row 1"),
        (torch.rand(2, 2), None, ["a", "a"], "class name 'a' stands twice"),
        (torch.rand(2, 2), None, "ab", "list of names or their number"),
        (torch.rand(2, 2), None, 0, "list of names or their number"),
        (torch.rand(2, 2), None, [1, 2], "list of names or their number"),
    ],
)
def test_bad_data_are_refused(inputs, labels, classes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        TensorSource(inputs, labels, classes=classes, name="mine")
    assert str(error.value).startswith("mine")


# Statistics and fingerprint


def test_statistics_of_images_and_columns() -> None:
    inputs = torch.rand(300, 2, 4, 5) * torch.tensor([1.0, 7.0]).reshape(1, 2, 1, 1)
    mean, std = TensorSource(inputs).statistics()
    assert mean == pytest.approx(inputs.double().mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(
        inputs.double().std((0, 2, 3), correction=0).tolist(), rel=1e-12, abs=0
    )
    table = torch.randn(300, 3)
    mean, std = TensorSource(table).statistics()
    assert mean == pytest.approx(table.double().mean(0).tolist(), rel=1e-9)
    assert std == pytest.approx(table.double().std(0, correction=0).tolist(), rel=1e-9)


def test_statistics_survive_large_means_and_constants() -> None:
    wide = torch.tensor([[16_777_216.0, 0.1], [16_777_218.0, 0.1], [16_777_220.0, 0.1]])
    mean, std = TensorSource(wide).statistics()
    assert mean == [16_777_218.0, pytest.approx(0.1)]
    assert std == [pytest.approx((8 / 3) ** 0.5, rel=1e-12), 1.0]


def test_statistics_of_large_sources_read_at_most_10_000_rows() -> None:
    class Counting(TensorSource):
        read = 0

        def rows(self, ids):
            self.read += len(ids)
            return super().rows(ids)

    source = Counting(torch.arange(25_000.0))
    mean, _ = source.statistics()
    assert 5_000 < source.read <= 10_000
    assert mean[0] == pytest.approx(12_500, rel=1e-3)


def test_fingerprint_sees_content_and_not_the_container() -> None:
    inputs, labels = torch.rand(20, 3), torch.arange(20) % 2

    def mark(x=inputs, y=labels, classes=2, name="a"):
        return TensorSource(x, y, classes=classes, name=name).fingerprint()

    assert mark() == mark(name="b") == mark(x=inputs.clone().numpy())
    part = Subset(TensorSource(inputs, labels, classes=2), torch.arange(20))
    assert mark() == part.fingerprint()
    changed = inputs.clone()
    changed[7, 1] += 1e-6
    others = {
        mark(x=changed),
        mark(y=1 - labels),
        mark(y=None),
        mark(y=labels.float(), classes=None),
        mark(classes=3),
        mark(classes=["x", "y"]),
        mark(x=inputs[:19], y=labels[:19]),
        mark(x=inputs.reshape(20, 1, 1, 3)),
        mark(x=inputs.flip(0)),
    }
    assert len(others | {mark()}) == 10


def test_fingerprint_of_a_large_source_reads_1024_rows_over_its_whole_length() -> None:
    inputs = torch.zeros(4096, 1)
    before = TensorSource(inputs).fingerprint()
    inputs[4092] = 1  # on the stride of 4
    assert TensorSource(inputs).fingerprint() != before


def test_fingerprint_sees_a_row_more_beside_the_sample() -> None:
    # 2,047 and 2,048 rows have the same 1,024 on the stride of 2.
    marks = {TensorSource(torch.zeros(rows, 1)).fingerprint() for rows in (2_047, 2_048)}
    assert len(marks) == 2


# Subsets


def test_a_subset_renumbers_its_rows() -> None:
    source = _images()
    part = Subset(source, torch.tensor([7, 3, 11]))
    batch = part.rows(torch.tensor([2, 0]))
    assert batch["ids"].tolist() == [2, 0]
    assert torch.equal(batch["inputs"], source.rows(torch.tensor([11, 7]))["inputs"])
    assert torch.equal(part.labels, source.labels[[7, 3, 11]])
    assert (len(part), part.shape, part.classes) == (3, source.shape, source.classes)
    assert torch.equal(_by_id(part.epoch(0, batch_size=2, seed=0))["labels"], part.labels)


def test_a_subset_keeps_its_rows_when_the_ids_change() -> None:
    ids = torch.tensor([7, 3])
    part = Subset(_images(), ids)
    before = part.fingerprint()
    ids.fill_(0)
    assert part.fingerprint() == before


def test_a_subset_mixes_only_with_its_own_rows() -> None:
    source = TensorSource(torch.tensor([[0.0], [1.0], [100.0]]))
    part = Subset(source, torch.tensor([0, 1]))
    for number in range(20):
        batch = _joined(part.epoch(number, batch_size=2, seed=0, augment=(mixup,)))
        assert batch["inputs"].max() <= 1


@pytest.mark.parametrize(
    ("ids", "message"), [([], "at least one row"), ([50], "there is no row 50"), ([-1], "row -1")]
)
def test_impossible_subsets_are_refused(ids, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Subset(_images(), torch.tensor(ids, dtype=torch.int64))
