"""A chain of stages as a table: what each made of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attar.evaluation.cells import Cell, cell, clean, scaled, size
from attar.evaluation.numbers import digits_for, show, signed, title

COLUMNS = ("parameters", "multiply-adds", "size", "1 example, ms", "64 examples, ms")


def table(
    metric: str,
    examples: int,
    teacher: Mapping[str, Any] | None,
    steps: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Titles, and a row of cells for the teacher and for each step.

    Args:
        metric: what each is judged by, and on how many *examples*.
        teacher: its ``score`` and ``cost``; None where it has none.
        steps: ``do``, ``score``, ``cost`` and, of a change, what was ``told`` of it.
    """
    rows, before = [], None
    if teacher is not None:
        rows.append([cell("teacher"), *_cells(metric, examples, teacher, None)])
        before = teacher["score"]
    for number, step in enumerate(steps, 1):
        told = clean(step.get("told", "").partition("\n")[0])
        rows.append([cell(f"{number} {step['do']}", told), *_cells(metric, examples, step, before)])
        before = step["score"]
    return {"columns": ["stage", title(metric), *COLUMNS], "rows": rows}


def _cells(metric: str, examples: int, step: Mapping[str, Any], before: float | None) -> list[Cell]:
    cost = step["cost"]
    score = show(metric, step["score"], digits=digits_for(examples))
    change = "" if before is None else signed(metric, step["score"] - before, examples)
    if cost is None:
        return [cell(score, change), *[cell() for _ in COLUMNS]]
    times = (f"{cost['latency'][batch]['p50_ms']:#.3g}".rstrip(".") for batch in ("1", "64"))
    return [
        cell(score, change),
        cell(f"{cost['parameters']:,}"),
        cell(scaled(cost["macs"])),
        cell(size(cost["bytes"])),
        *map(cell, times),
    ]
