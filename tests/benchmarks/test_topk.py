"""The benchmark of kept logits: its forms can be written, and its table is that of its file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("topk")


def test_every_recorded_row_is_of_a_form_with_those_bytes(bench: ModuleType) -> None:
    report = json.loads(bench.RESULTS.read_text())
    sizes = {form.name: form.of(report["width"]).token_bytes for form in bench.forms()}
    assert {row["form"]: row["bytes"] for row in report["rows"]} == sizes
    assert all(goal.met for goal in bench.goals(report))


def test_the_table_is_printed_without_a_run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["topk.py", "--table"])
    assert bench.main() == 0
    out = capsys.readouterr().out
    for form in bench.forms():
        assert out.count(f"| {form.name} ") == 3


def test_an_error_is_relative_to_the_exact_gradient(bench: ModuleType) -> None:
    errors = bench.Errors()
    exact = torch.tensor([2.0, 4.0]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    errors.add((torch.tensor([2.5, 3.5]), exact[1] * 1.1), exact)
    told = errors.told()
    assert told["value_error"] == pytest.approx(1 / 6)
    assert told["gradient_error"] == pytest.approx(0.1)
    assert told["step_gradient_error"] is None
