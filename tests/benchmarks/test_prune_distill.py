"""The benchmark of pruning: two libraries that do one thing, five ways of equal budget."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attar

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("torch_pruning")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("prune_distill")


@pytest.fixture
def made(bench: ModuleType, tmp_path: Path, images: str) -> Any:
    """The small network and its ways."""
    return bench.Bench(bench.QUICK, bench.Results(None), tmp_path, images)


def test_a_quick_run_shows_five_ways_of_one_budget(tmp_path: Path, images: str) -> None:
    numbers = tmp_path / "numbers.json"
    kept = BENCHMARKS / "results" / "prune_distill.json"
    before = kept.read_bytes() if kept.exists() else None
    command = [sys.executable, str(BENCHMARKS / "prune_distill.py"), "--quick", "--seeds", "0"]
    done = subprocess.run(
        [*command, "--data", images, "--json", str(numbers)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in json.loads(numbers.read_text())["rows"]}
    assert rows.keys() == {"0", "1", "2", "3", "4", "5"}
    assert len({rows[way]["macs"] for way in "12345"}) == 1
    assert len({rows[way]["parameters"] for way in "12345"}) == 1
    assert rows["1"]["macs"] < 0.3 * rows["0"]["macs"]
    plans = [rows[way]["settings"] | {"rate": None} for way in "12345"]
    assert plans.count(plans[0]) == 5
    assert "beyond the first" in done.stdout
    assert (kept.read_bytes() if kept.exists() else None) == before


def test_both_libraries_keep_the_same_channels_by_magnitude_and_not_by_taylor(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.same_channels() is True
    real = made.pruned
    monkeypatch.setattr(made, "pruned", lambda way: real({"2": "4"}.get(way, way)))
    assert made.same_channels() is False


def test_the_loop_by_hand_and_attar_on_labels_come_to_the_same_weights(
    bench: ModuleType, made: Any
) -> None:
    # In float64, where what is left of the order of sums is far below what a step moves.
    images, start = made.images, made.pruned("1").double()
    rows = images.train.rows(torch.arange(96))
    source = attar.data.TensorSource(
        rows["inputs"].double(), rows["labels"], classes=images.train.classes
    )
    images.train = source
    by_hand = bench.fine_tuned(start, images, 2, 0.05, 3)
    by_attar = made.pruned("2").double()
    options = images.options(2, 0.05, 3)
    attar.train(by_attar, source, images.task, **options)
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(value.double(), by_attar.state_dict()[name].double(), atol=1e-5), name


def test_labels_and_distillation_choose_their_rates_by_validation(
    bench: ModuleType, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "keep_network", lambda: None)
    monkeypatch.setattr(made, "row", lambda way, seed: None)
    best, small = {"1": 0.02, "3": 0.1}, made.network
    asked: list[Any] = []

    def trained(way: str, seed: int, rate: float) -> Any:
        asked.append((way, seed, rate))
        return small

    def accuracy(model: Any, source: Any) -> float:
        assert source is made.images.validation
        way, _, rate = asked[-1]
        return -abs(rate - best[way])

    monkeypatch.setattr(made, "trained", trained)
    monkeypatch.setattr(made.images, "accuracy", accuracy)
    made.run(ways="12345", seeds=[0])
    assert asked == [(way, bench.CHOOSER, rate) for way in "13" for rate in bench.RATES]
    assert [made.rate(way) for way in "12345"] == [0.02, 0.02, 0.1, 0.02, 0.1]


@pytest.mark.parametrize(
    ("second", "same", "macs", "met"),
    [
        (90.2, True, 5, [True, True, True]),
        (91.0, True, 5, [False, True, True]),
        (90.2, False, 5, [True, False, True]),
        (90.2, True, 6, [True, True, False]),
    ],
)
def test_goals_see_another_accuracy_other_channels_and_another_size(
    bench: ModuleType, second: float, same: bool, macs: int, met: list[bool]
) -> None:
    rows = [
        {"row": "0", "seed": 0, "accuracy": 92.0, "macs": 20},
        {"row": "1", "seed": 0, "accuracy": 90.0, "macs": 5},
        {"row": "2", "seed": 0, "accuracy": second, "macs": macs, "same_channels": same},
    ]
    assert [goal.met for goal in bench.judge(rows)] == met
