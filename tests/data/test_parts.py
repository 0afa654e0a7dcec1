"""The parts of many processes: joined they are the batches of one, whatever their number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attar.data import Subset, TensorSource, crop, flip, mixup
from attar.runtime import UsageError


def _images(rows: int = 23) -> TensorSource:
    inputs = torch.rand(rows, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    return TensorSource(inputs, torch.arange(rows) % 3, classes=3)


def _equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _joined(parts) -> dict[str, torch.Tensor]:
    """What one process would have, from the batches of all ranks at one step."""
    busy = [part for part in parts if "idle" not in part]
    return {key: torch.cat([part[key] for part in busy]) for key in busy[0]}


@given(
    rows=st.integers(2, 40),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 5),
    number=st.integers(0, 3),
    data=st.data(),
)
def test_joined_parts_are_the_batches_of_one_process(rows, batch_size, world, number, data) -> None:
    source = _images(rows)
    start = data.draw(st.integers(0, -(-rows // batch_size)))
    call = {"batch_size": batch_size, "seed": 1, "start": start, "augment": (crop, flip, mixup)}
    for one, every in (
        (
            source.epoch(number, **call),
            [source.epoch(number, **call, part=(rank, world)) for rank in range(world)],
        ),
        (
            source.batches(batch_size),
            [source.batches(batch_size, (rank, world)) for rank in range(world)],
        ),
    ):
        for whole, *parts in zip(one, *every, strict=True):
            assert _equal(_joined(parts), whole)
            sizes = [len(part["ids"]) for part in parts if "idle" not in part]
            assert max(sizes) - min(sizes) <= 1


def test_the_share_of_a_rank_is_a_run_of_the_batch() -> None:
    whole = next(_images().epoch(0, batch_size=7, seed=0))["ids"].tolist()
    parts = [
        next(_images().epoch(0, batch_size=7, seed=0, part=(rank, 3)))["ids"].tolist()
        for rank in range(3)
    ]
    assert parts == [whole[:2], whole[2:4], whole[4:]]


def test_a_rank_without_a_row_keeps_step_with_the_whole_batch() -> None:
    # 23 rows in batches of 7 leave 2 for the last batch: ranks 0 and 2 of 4 have none.
    source = _images()
    whole = list(source.epoch(0, batch_size=7, seed=0, augment=(mixup,)))[-1]
    parts = [
        list(source.epoch(0, batch_size=7, seed=0, augment=(mixup,), part=(rank, 4)))[-1]
        for rank in range(4)
    ]
    assert ["idle" in part for part in parts] == [True, False, True, False]
    for idle in (parts[0], parts[2]):
        mark = idle.pop("idle")
        assert (mark.shape, mark.item()) == ((), 1.0)
        assert _equal(idle, whole)
    plain = list(source.batches(22, part=(0, 4)))[-1]
    assert (plain["ids"].tolist(), plain["idle"].item()) == ([22], 1.0)


def test_one_process_sees_no_idle_batch() -> None:
    for batches in (_images().epoch(0, batch_size=7, seed=0), _images().batches(7)):
        assert all(batch.keys() == {"inputs", "labels", "ids"} for batch in batches)


def test_only_the_rows_of_the_share_are_read() -> None:
    class Counting(TensorSource):
        read = 0

        def rows(self, ids):
            self.read += len(ids)
            return super().rows(ids)

    source = Counting(torch.rand(40, 3))
    list(source.epoch(0, batch_size=8, seed=0, start=1, part=(1, 4)))
    assert source.read == 4 * 2
    list(source.batches(8, part=(3, 4)))
    assert source.read == 4 * 2 + 5 * 2


def test_parts_of_a_subset() -> None:
    part = Subset(_images(), torch.arange(5, 20))
    whole = list(part.epoch(0, batch_size=4, seed=0))
    ranks = [part.epoch(0, batch_size=4, seed=0, part=(rank, 2)) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert _equal(_joined(parts), batch)


@given(
    rows=st.integers(2, 60),
    batch_size=st.integers(1, 16),
    number=st.integers(0, 5),
    worlds=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_id_comes_once_though_the_world_changes(
    rows, batch_size, number, worlds, data
) -> None:
    source = TensorSource(torch.arange(float(rows)))
    count = -(-rows // batch_size)
    cuts = sorted(data.draw(st.integers(0, count)) for _ in worlds[1:])
    seen = []
    for world, start, end in zip(worlds, [0, *cuts], [*cuts, count], strict=True):
        for rank in range(world):
            batches = source.epoch(
                number, batch_size=batch_size, seed=7, start=start, part=(rank, world)
            )
            first = [next(batches) for _ in range(start, end)]
            seen += [id for batch in first if "idle" not in batch for id in batch["ids"].tolist()]
    assert sorted(seen) == list(range(rows))


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 45), world=st.integers(1, 3))
def test_every_start_gives_the_tail_of_the_epoch(rows, batch_size, world) -> None:
    source = TensorSource(torch.arange(float(rows)))
    call = {"batch_size": batch_size, "seed": 2, "part": (world - 1, world)}
    whole = list(source.epoch(1, **call))
    assert len(whole) == -(-rows // batch_size)
    for start in range(len(whole) + 1):
        tail = list(source.epoch(1, **call, start=start))
        assert len(tail) == len(whole) - start
        assert all(map(_equal, tail, whole[start:]))


@pytest.mark.parametrize(
    "part", [(2, 2), (-1, 2), (0, 0), (0, -1), (0.0, 1), (0,), (0, 1, 2), 1, None, "01"], ids=str
)
def test_impossible_parts_are_refused_at_the_call(part) -> None:
    message = r"part must be \(rank, world\), .* 0 <= rank < world, not "
    with pytest.raises(UsageError, match=message):
        _images().epoch(0, batch_size=7, seed=0, part=part)
    with pytest.raises(UsageError, match=message):
        _images().batches(7, part)
