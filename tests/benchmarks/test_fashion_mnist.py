"""The Fashion-MNIST benchmark runs, goes on where it was, and judges what it shows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import attar

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fashion_mnist")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of four idx files: noise with a bright column that tells the class."""
    folder = tmp_path_factory.mktemp("idx")
    draws = np.random.default_rng(0)
    for prefix, count in (("train", 600), ("t10k", 200)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = draws.integers(0, 120, (count, 28, 28), np.uint8)
        pixels[np.arange(count), :, labels] = 255
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())
    return str(folder)


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "fashion_mnist.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def _record(row: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {"row": row, "seed": seed, "accuracy": accuracy}


def test_a_quick_run_fills_both_tables_and_no_file_of_results(tmp_path: Path, images: str) -> None:
    numbers, results = tmp_path / "numbers.json", tmp_path / "results.json"
    done = _run(
        "--quick",
        *("--rows", "teacher,baseline,kd,few-labels,few-own", "--seeds", "0,1"),
        *("--data", images, "--results", str(results), "--json", str(numbers)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(numbers.read_text())["rows"]
    assert {(row["row"], row["seed"]) for row in rows} == {
        *(("teacher", 0), ("own-teacher", 0)),
        *((row, seed) for row in ("baseline", "kd", "few-labels", "few-own") for seed in (0, 1)),
    }
    assert "beyond labels alone" in done.stdout
    assert "beyond 2,000 labels alone" in done.stdout
    assert not results.exists()


def test_goals_without_their_rows_are_missed(bench: ModuleType) -> None:
    assert [goal.met for goal in bench.judge([], strict=True)] == [False] * 3
    assert bench.judge([], strict=False) == []


def test_rows_that_are_missing_are_named(bench: ModuleType) -> None:
    options = Namespace(rows=["teacher", "kd"], seeds=[0, 1])
    rows = [_record("teacher", 0, 0.9), _record("kd", 1, 0.9)]
    assert bench.missing(options, rows) == "still missing: kd of seed 0"


def test_an_unknown_row_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", "--rows", "baseline,kdd"])
    with pytest.raises(SystemExit):
        bench.flags()
    assert "there is no row kdd" in capsys.readouterr().err


def test_what_is_in_the_file_is_not_trained_again(
    bench: ModuleType, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> Any:
        results = bench.Results(tmp_path / "results.json")
        return bench.Bench(bench.QUICK, results, tmp_path, images)

    first = opened()
    first.choose("baseline")
    first.row("baseline", 0)
    again, trained = opened(), []
    monkeypatch.setattr(again, "trained", lambda row, seed, _: trained.append((row, seed)))
    again.choose("baseline")
    again.row("baseline", 0)
    assert not trained
    again.row("baseline", 1)
    assert trained == [("baseline", 1)]


def test_rows_of_settings_that_are_no_longer_chosen_are_not_shown(
    bench: ModuleType, tmp_path: Path, images: str
) -> None:
    made = bench.Bench(bench.QUICK, bench.Results(None), tmp_path, images)
    for choice, settings in made.grid("baseline"):
        accuracy = 0.9 if choice["rate"] == 0.4 else 0.1
        record = _record("baseline", 0, accuracy) | {"settings": settings.to_json()}
        made.results.add("choices", record)
        final = made.settings("baseline", bench.QUICK.epochs + 1, choice).to_json()
        made.results.add("rows", _record("baseline", 1, accuracy) | {"settings": final})
        final = made.settings("baseline", bench.QUICK.epochs, choice).to_json()
        made.results.add("rows", _record("baseline", 0, accuracy) | {"settings": final})
    assert [row["settings"]["rate"] for row in bench.current(made)] == [0.4]


def test_each_view_of_an_image_gets_its_own_answer(bench: ModuleType) -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 1, 4, 4)
    images[:, :, 0] = 0  # an edge that looks the same in the mirror
    source = attar.data.TensorSource(images, torch.arange(6) % 3, classes=3)
    logits = torch.rand(2, 6, 3)
    batch = source.rows(torch.tensor([4, 1, 5]))
    batch["inputs"][1] = batch["inputs"][1].flip(-1)
    told = bench.Answers(source, logits)(batch)["output:logits"]
    assert torch.equal(told, torch.stack([logits[0, 4], logits[1, 1], logits[0, 5]]))


def test_a_few_labels_have_as_many_steps_as_all(
    bench: ModuleType, tmp_path: Path, images: str
) -> None:
    made = bench.Bench(bench.QUICK, bench.Results(None), tmp_path, images)
    epochs = made.settings("few-labels", 10, {"rate": 0.1}).epochs
    steps, wanted = epochs * -(-len(made.few) // 32), 10 * -(-len(made.rest) // 32)
    assert abs(steps - wanted) <= 1


def test_a_row_is_compared_with_the_same_seed(bench: ModuleType) -> None:
    rows = [_record("baseline", seed, 0.5 + seed / 10) for seed in (2, 0, 1)]
    rows += [_record("kd", seed, 0.51 + seed / 10) for seed in (0, 2)]
    assert bench.gains(rows, "kd", "baseline") == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("worst", "met"),
    [(0.84, [True, True, True]), (0.79, [True, True, False]), (0.5, [True, False, False])],
)
def test_one_seed_that_loses_misses_the_goal(
    bench: ModuleType, worst: float, met: list[bool]
) -> None:
    rows = [_record("teacher", 0, 0.93), _record("baseline", 0, 0.91)]
    rows += [_record("few-labels", seed, 0.8) for seed in (0, 1, 2)]
    rows += [_record("few-given", seed, value) for seed, value in enumerate((0.9, 0.9, worst))]
    assert [goal.met for goal in bench.judge(rows, strict=True)] == met
