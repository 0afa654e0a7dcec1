"""The verdict as a table for the terminal."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from attar.evaluation import cells, verdicts

if TYPE_CHECKING:
    from rich.table import Table

    from attar.evaluation.verdict import Verdict
    from attar.evaluation.verdicts import Verdicts


def table(verdict: Verdict) -> Table:
    """Teacher, baseline and distilled student side by side, as a ``rich`` table of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    told = cells.table(verdict)
    made = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    made.add_column("", style="dim", no_wrap=True)
    for column in told["columns"]:
        style = "bold" if column["key"] == "distilled" else ""
        made.add_column(_text(column["title"]), justify="right", style=style)
    for section in told["sections"]:
        for row in section["rows"]:
            made.add_row(row["label"], *map(_cell, row["cells"]))
        made.add_section()
    return made


def table_of_many(found: Verdicts) -> Table:
    """A row for the teacher and each student, as a ``rich`` table of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    told = verdicts.table(found)
    made = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    made.add_column("student")
    for head in told["columns"][1:]:
        made.add_column(_text("\n".join(wrap(head, 9))), justify="right", no_wrap=True)
    for row in told["rows"]:
        name, weight, time, *others = row["cells"]
        if row["outcome"]:
            others[1] = others[1] | {"note": f"{others[1]['note']}\n{row['outcome']}"}
        made.add_row(_cell(name), weight["text"] or "-", time["text"] or "-", *map(_cell, others))
    return made


def _cell(cell: cells.Cell) -> Any:
    text = _text(cell["text"] or "-")
    if cell["note"]:
        text.append("\n" + cell["note"], style="not bold dim")
    return text


def _text(text: str) -> Any:
    # Text, not markup: a model's name may hold [brackets].
    from rich.text import Text

    return Text(text)
