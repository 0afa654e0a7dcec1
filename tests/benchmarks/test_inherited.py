"""The benchmark of inherited starts: equal steps, rates by validation, and what is read off."""

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


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("inherited")


@pytest.fixture
def pair(bench: ModuleType, tmp_path: Path, images: str) -> Any:
    """The small pair of images."""
    return bench.ImagePair(bench.QUICK, tmp_path, images, quick=True)


def test_a_quick_run_prints_its_table_and_keeps_no_file(tmp_path: Path, images: str) -> None:
    numbers = tmp_path / "numbers.json"
    kept = BENCHMARKS / "results" / "inherited.json"
    before = kept.read_bytes() if kept.exists() else None
    command = [sys.executable, str(BENCHMARKS / "inherited.py"), "--quick", "--pairs", "images"]
    command += ["--seeds", "0", "--data", images, "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(numbers.read_text())["rows"]
    ways = ("random", "spaced", "importance")
    told = {(row["row"], row["steps"]) for row in rows}
    assert told == {(f"images, {way}", steps) for way in ways for steps in (0, 1, 2)}
    assert "spaced needs" in done.stdout
    assert (kept.read_bytes() if kept.exists() else None) == before


def test_steps_between_two_lengths_are_read_off_their_logarithm(bench: ModuleType) -> None:
    points = {0: 10.0, 100: 50.0, 400: 90.0}
    assert bench.needed(points, 70.0) == pytest.approx(200)
    assert bench.needed(points, 20.0) == pytest.approx(25)
    assert bench.needed(points, 90.0) == pytest.approx(400)
    assert bench.needed(points, 5.0) == 0
    assert bench.needed(points, 91.0) is None


def test_the_table_tells_the_steps_saved_for_the_mean_and_each_seed(bench: ModuleType) -> None:
    scores = {
        "random": {0: (10, 10), 100: (50, 60), 400: (80, 95)},
        "spaced": {0: (10, 10), 100: (80, 60), 400: (90, 90)},
    }
    records = [
        {"row": f"images, {way}", "steps": steps, "seed": seed, "score": float(score)}
        for way, curve in scores.items()
        for steps, each in curve.items()
        for seed, score in enumerate(each)
    ]
    last = bench.show(records).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    # 87.5 is reached by the mean of 70 and 90 at 100 * 4 ** 0.875 steps.
    assert [cells[0], *cells[3:]] == ["400", "336", "0.25, more"]


def test_both_starts_are_of_one_form_and_the_random_one_is_of_its_seed(pair: Any) -> None:
    starts = {way: [pair.start(way, seed).state_dict() for seed in (0, 1)] for way in pair.ways}
    shapes = [
        {name: value.shape for name, value in state.items()}
        for states in starts.values()
        for state in states
    ]
    assert all(each == shapes[0] for each in shapes)
    heads = {way: [state["head.weight"] for state in states] for way, states in starts.items()}
    assert torch.equal(*heads["spaced"])
    assert torch.equal(*heads["importance"])
    assert not torch.equal(*heads["random"])
    theirs = pair.teacher.state_dict()["head.weight"]
    assert torch.equal(heads["spaced"][0], theirs[:, : theirs.shape[1] : 2])


def test_each_length_is_as_many_steps(
    bench: ModuleType, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench.Bench("images", pair, bench.Results(None))
    made.place, taken = tmp_path, []
    real = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda *args, **named: taken.append(1) or real(*args, **named)
    )
    for steps in (3, 18, 36):  # 18 are an epoch
        taken.clear()
        made.trained("spaced", 0, made.settings(steps, 0.1))
        assert len(taken) == steps


def test_the_rate_is_the_best_on_validation_and_no_test_row_is_read_for_it(
    bench: ModuleType, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench.Bench("images", pair, bench.Results(None))
    made.place = tmp_path
    best = {1: 0.2, 2: 0.1}  # by steps
    monkeypatch.setattr(made, "trained", lambda way, seed, settings: settings)
    monkeypatch.setattr(pair, "validated", lambda told: -abs(told.rate - best[told.steps]))
    monkeypatch.setattr(pair, "tested", lambda _: pytest.fail("the test rows were read"))
    made.choose("random")
    assert [made.rate("random", steps) for steps in (0, 1, 2, 3)] == [0.2, 0.2, 0.1, 0.1]


def test_what_is_in_the_file_is_not_trained_again(
    bench: ModuleType, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = bench.Results(tmp_path / "results.json")
    bench.Bench("images", pair, results).run([0])
    again, trained = bench.Bench("images", pair, bench.Results(results.path)), []
    monkeypatch.setattr(attar, "distill", lambda *_, **named: trained.append(named["seed"]))
    monkeypatch.setattr(pair, "tested", lambda _: 0.0)
    again.run([0])
    assert trained == []
    again.run([1])
    assert trained == [1] * 6
