"""What the command prints fits the terminal and says what it is of."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from attar.cli import tables
from attar.evaluation.steps import table

COST = {
    "parameters": 134_515_008,
    "macs": 414_500,
    "bytes": 146_000,
    "latency": {size: {"p50_ms": 0.0762, "p95_ms": 0.1} for size in ("1", "64")},
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 80 columns that remembers."""
    made = Console(width=80, record=True, highlight=False, no_color=True)
    monkeypatch.setattr(tables, "console", made)
    return made


def chain(metric: str, *names: str) -> dict[str, Any]:
    steps = [{"do": name, "score": 0.9 - 0.3 * n, "cost": COST} for n, name in enumerate(names)]
    return {"table": table(metric, 719, {"score": 0.976, "cost": COST}, steps)}


@pytest.mark.parametrize("metric", ["accuracy", "mean_average_precision", "rmse"])
def test_each_stage_is_one_line_of_80_columns(narrow: Console, metric: str) -> None:
    names = ["shrink", "distill", "export torch_export"]
    tables.print_chain(chain(metric, *names))
    lines = narrow.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    told = [line.split() for line in lines if line.startswith(("teacher", "1 ", "2 ", "3 "))]
    assert len(told) == 4
    assert all(line[-3:] == ["146", "kB", "0.0762"] for line in told)
    assert [line[-4] for line in told] == ["134,515,008"] * 4
    head = " ".join(lines[: -len(told)])
    assert ("points" in head) == (metric != "rmse")
    assert "points" not in "".join(lines[-len(told) :])


def test_a_file_has_one_size_in_every_table(narrow: Console) -> None:
    taken = {size: {"p50_ms": 1.0, "p95_ms": 2.0} for size in ("1", "64")}
    file = {"path": "m.pt2", "bytes": 146_000, "difference": 1e-6, "latency": taken}
    tables.print_exports([file | {"threads": 1, "examples": 256}])
    tables.print_chain(chain("accuracy", "export torch_export"))
    assert narrow.export_text().count("146 kB") == 3


def plan(teacher: int, student: int, **more: Any) -> dict[str, Any]:
    """The part of a plan that is of sizes."""
    sizes = {name: {"model": "mlp", "parameters": count, "macs": 1}
             for name, count in (("teacher", teacher), ("student", student))}  # fmt: skip
    data = dict.fromkeys(("train", "validation", "test"), 1) | {"name": "d", "shape": [1]}
    rest = {"data": data | {"width": None}, "seeds": 1, "saw": {"distilled": 0}, "stages": []}
    return sizes | rest | more


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((560, 10), "the student has 56.0 times fewer parameters"),
        ((10, 20), "the student has 2.0 times more parameters"),
        ((100, 98), None),
    ],
)
def test_the_ratio_is_of_parameters(
    narrow: Console, counts: tuple[int, int], said: str | None
) -> None:
    tables.print_plan(plan(*counts))
    told = narrow.export_text()
    assert ("ratio" in told) == (said is not None)
    assert said is None or said in told


def test_a_plans_notes_are_lines(narrow: Console) -> None:
    tables.print_plan(plan(5, 1, notes=["the first.", "the [second]."]))
    notes = [line.split(maxsplit=1) for line in narrow.export_text().splitlines()]
    told = [line[1].strip() for line in notes if line and line[0] == "note"]
    assert told == ["the first.", "the [second]."]
