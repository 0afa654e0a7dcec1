"""The benchmark of features: both steps have the same gradient, and another loss is seen."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = ["FitNets", "AT", "SP", "RKD-D", "PKD", "CWD", "CKA", "VkD", "ICKD", "NST"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on few images."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("features")
    monkeypatch.setattr(module, "IMAGES", 8)
    return module


def test_these_are_the_methods(bench: ModuleType) -> None:
    assert list(bench.METHODS) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_attar_and_the_loss_by_hand_give_the_same_gradient(bench: ModuleType, name: str) -> None:
    bench.verify(bench.METHODS[name])


def test_another_weight_by_hand_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = bench.METHODS["AT"]
    broken = replace(method, hand=lambda s, t: 1.01 * method.hand(s, t))
    with pytest.raises(AssertionError, match=r"gradients are .* apart"):
        bench.verify(broken)


def test_a_ratio_is_of_the_same_round(bench: ModuleType) -> None:
    slow_round = np.array([[1.0, 1.0], [10.0, 10.0], [2.0, 2.0]])
    assert bench.ratio(1.1 * slow_round, slow_round) == pytest.approx(1.1)
