"""The benchmark of the cache: all stores give the same rows, and the arithmetic is right."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cache")


def small(bench: ModuleType) -> object:
    return bench.Problem("small", 900, {"a": ("int32", 3), "b": ("float16", 5)})


def test_every_store_is_read_and_gives_the_same_rows(bench: ModuleType) -> None:
    rows = bench.compare(small(bench), {}, 3)
    assert set(rows) == {bench.RAM, bench.AGAIN, bench.TAKE, bench.OURS, bench.SHARDS}
    assert rows[bench.RAM]["of_memory"] == 1.0


def test_a_store_that_gives_other_rows_is_refused(bench: ModuleType) -> None:
    def wrong(rows: dict[str, np.ndarray], _folder: Path) -> object:
        return lambda ids: {name: array[ids - 1] for name, array in rows.items()}

    with pytest.raises(AssertionError, match="peer"):
        bench.compare(small(bench), {"peer": wrong}, 3)


def test_the_first_batch_of_a_turn_is_not_counted(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 50.0, 100.0, 101.0, 200.0, 203.0])
    monkeypatch.setattr(bench, "perf_counter", lambda: next(clock))
    assert bench.turn(lambda ids: {}, np.zeros((3, 4))) == 2e6


def test_a_peer_is_judged_by_how_many_times_faster_we_are(bench: ModuleType) -> None:
    rows = {bench.OURS: {"of_memory": 1.2}, "LMDB": {"of_memory": 7.0}, "MDS": {"of_memory": 60.0}}
    ours, lmdb, mds = bench.judge("x", rows)
    assert (ours.value, ours.met) == (1.2, True)
    assert lmdb.met
    assert not mds.met


def test_writing_is_measured(bench: ModuleType) -> None:
    written = bench.write(16 << 20, 1)
    assert set(written) == {bench.OURS, "by hand", "SHA-256 alone"}
    assert all(seconds > 0 for seconds in written.values())
