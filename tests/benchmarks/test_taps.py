"""The benchmark of taps: what is compared hears the same, and the arithmetic is right."""

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
    return importlib.import_module("taps")


def test_both_ways_hear_sixteen_features(bench: ModuleType) -> None:
    bench.verify()


def test_a_tap_that_hears_less_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = bench.addresses()[:-1]
    monkeypatch.setattr(bench, "addresses", lambda: few)
    with pytest.raises(AssertionError):
        bench.verify()


def test_a_feature_costs_its_share_of_the_difference(bench: ModuleType) -> None:
    base = np.array([[10.0, 10.0], [100.0, 100.0]])
    row = bench.beside(base + 32.0, base)
    assert row["us_a_feature"] == 2.0


def test_every_kind_of_forward_runs(bench: ModuleType) -> None:
    laps = bench.interleave(bench.steps(), 2)
    assert set(laps) == {bench.BARE, bench.AGAIN, bench.HAND, bench.OURS, bench.PACER}
    assert all(found.shape == (2, bench.TURN - 1) for found in laps.values())
