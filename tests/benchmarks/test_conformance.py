"""The conformance benchmark: attar is at its formulas, and what is not is seen."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = ("ordinary", "1e4", "absent", "bf16", "one")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("conformance")


def test_attar_is_within_its_bounds_on_every_input(bench: ModuleType) -> None:
    rows = dict(bench.measure({}, range(1)))
    assert {library for _, library in rows} == {"attar"}
    goals = list(bench.goals(rows))
    assert len(goals) == 2 * len(KINDS)
    for goal in goals:
        assert goal.met, goal


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_off_by_a_thousandth_is_seen(bench: ModuleType, kind: str) -> None:
    method = bench.METHODS["KD, T = 4"]
    value, gradient = bench.compare(method, lambda s, t: 1.001 * method.ours(s, t), kind, 0)
    assert value == pytest.approx(1e-3, rel=0.01)
    assert gradient == pytest.approx(1e-3, rel=0.01) or kind == "bf16"


def test_a_loss_of_another_temperature_misses_both_goals(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = bench.METHODS["KD, T = 1"].ours
    broken = bench.Method(bench.LOGITS, wrong, bench.METHODS["KD, T = 4"].formula, "kl_divergence")
    monkeypatch.setattr(bench, "METHODS", {"KD, T = 4": broken})
    missed = [goal for goal in bench.goals(dict(bench.measure({}, range(1)))) if not goal.met]
    assert len(missed) == 2 * len(KINDS)


def test_nan_a_refusal_and_a_missing_gradient_are_told_apart(bench: ModuleType) -> None:
    method = bench.METHODS["SP"]

    def refuses(s: Tensor, t: Tensor) -> Tensor:
        raise ValueError

    def nan(s: Tensor, t: Tensor) -> Tensor:
        return s.sum() * math.nan

    def constant(s: Tensor, t: Tensor) -> Tensor:
        return torch.tensor(0.0)

    cells = [
        bench.cell(*bench.compare(method, loss, "ordinary", 0)) for loss in (refuses, nan, constant)
    ]
    assert cells == ["refused", "nan, nan", "1e+00, none"]


def test_the_worst_of_several_draws_is_kept_and_nan_is_the_worst(bench: ModuleType) -> None:
    value, gradient = bench.worst([(1e-7, 2.0), (1e-3, math.nan), (1e-5, 3.0)])
    assert value == 1e-3
    assert math.isnan(gradient)


def test_a_class_that_is_absent_is_cut_off_and_has_no_gradient(bench: ModuleType) -> None:
    method = bench.METHODS["KD, T = 1"]
    student, teacher = bench.inputs(method, "absent", 0)
    value, gradient = bench.truth(method, student, teacher)
    cut = method.formula(student[:, :-1].double(), teacher[:, :-1].double())
    assert value == pytest.approx(float(cut), rel=1e-12)
    assert (gradient[:, -1] == 0).all()
    assert (gradient[:, :-1] != 0).any()


def test_a_library_that_is_not_there_is_told_with_its_reason(bench: ModuleType) -> None:
    import _peers

    found, absent = _peers.installed()
    assert not set(found) & set(absent)
    assert set(found) | set(absent) == set(_peers.LIBRARIES)
    assert all("Error: " in why for why in absent.values())


def test_the_table_of_the_page_has_every_method(bench: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "conformance.md").read_text(encoding="utf-8")
    for name in bench.METHODS:
        assert f"\n| {name} " in page, name
