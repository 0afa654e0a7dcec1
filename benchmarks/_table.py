"""What every benchmark shares: its flags, its goals, its table."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A claim that holds when *value* is at most *limit*."""

    claim: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        word = "met   " if self.met else "MISSED"
        return f"{word} {self.claim}: {self.value:.3g}, at most {self.limit:.3g}"


def flags(description: str) -> argparse.Namespace:
    """Read the flags that every benchmark has."""
    return parser_of(description).parse_args()


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser of the flags that every benchmark has, which may be given more."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="as little as shows that it runs")
    return parser


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on; a package that is not installed is None."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {line(cells)} |" for cells in [columns, rule, *rows])


def finish(
    options: argparse.Namespace, report: dict[str, Any], goals: Sequence[Goal], tables: str
) -> int:
    """Write the report, print goals and tables; returns the exit status."""
    if options.json:
        facts = [asdict(goal) | {"met": goal.met} for goal in goals]
        options.json.write_text(json.dumps(report | {"goals": facts}, indent=1) + "\n")
    print(*goals, sep="\n", end="\n\n")
    print(tables)
    return int(options.check and not all(goal.met for goal in goals))
