"""What the command prints for people."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from attar.recipes import SUPPLIED, rooms
from attar.recipes.resolve import shown
from attar.runtime import UsageError, suggest

console = Console(highlight=False, soft_wrap=False)


def print_verdict(verdict: Any, *, whole: bool) -> None:
    """The table and the line a person came for."""
    from attar.evaluation import table

    if whole:
        console.print(table(verdict))
    console.print(verdict.headline, style="bold", soft_wrap=True)
    if verdict.goal_line is not None:
        console.print(verdict.goal_line, soft_wrap=True)


def print_plan(plan: dict[str, Any]) -> None:
    """What a run would do, as `attar check` found it."""
    data = plan["data"]
    console.print(
        f"data       {data['name']}: {data['train']:,} train, {data['validation']:,} validation, "
        f"{data['test']:,} test; inputs {data['shape']}, {data['width']} outputs"
    )
    for role in ("teacher", "student"):
        size = plan[role]
        console.print(
            f"{role:<11}{size['model']}: {size['parameters']:,} parameters, "
            f"{_count(size['macs'])} multiply-adds an example"
        )
    ratio = plan["teacher"]["parameters"] / max(plan["student"]["parameters"], 1)
    console.print(f"ratio      the student is {ratio:.1f} times smaller")
    for index, stage in enumerate(plan["stages"]):
        console.print(
            f"stage {index}    {stage['steps']:,} steps of {stage['batch_size']} over "
            f"{stage['examples']:,} examples, x {plan['seeds']} seeds; trains "
            f"{stage['trained_parameters']:,} parameters, of them "
            f"{stage['projector_parameters']:,} in projectors; a checkpoint takes at most "
            f"{_bytes(stage['checkpoint_bytes'])}"
        )
        if stage["terms"]:
            console.print(_terms(stage["terms"]))
    console.print("checked: every stage ran on one batch. Nothing was trained.")


def _terms(terms: list[dict[str, Any]]) -> Table:
    table = Table(
        "term", "student", "teacher", "projector", "first value", box=None, padding=(0, 2)
    )
    for term in terms:
        table.add_row(
            term["name"],
            f"{term['student']} {term['student_shape']}",
            f"{term['teacher']} {term['teacher_shape']}" if term["teacher"] else "labels",
            term["projector"] or "",
            f"{term['value']:.4g}",
        )
    return table


def describe_rooms(room: str | None, plugins: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each member of a room (of all of them): its first line, and the options a recipe writes."""
    found = rooms(plugins)
    if room is not None and room not in found:
        raise UsageError(f"there is no room '{room}'; {suggest(room, found)}")
    chosen = [room] if room else sorted(found)
    return {
        name: {shown(key): _member(member, name) for key, member in sorted(found[name].items())}
        for name in chosen
    }


def _member(member: Any, room: str) -> dict[str, Any]:
    lines = (inspect.getdoc(member) or "").splitlines()
    parameters = inspect.signature(member).parameters.values()
    options = {
        p.name: "required" if p.default is p.empty else _default(p.default)
        for p in parameters
        if p.name not in SUPPLIED[room] and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return {"about": lines[0] if lines else "", "options": options}


def _default(value: Any) -> str:
    return getattr(value, "__name__", None) or str(getattr(value, "keywords", None) or value)


def print_rooms(described: dict[str, dict[str, Any]], *, whole: bool) -> None:
    """One line a member; with its options where one room was asked for."""
    for room, members in described.items():
        console.print(room, style="bold")
        if room == "optimizers" and not whole:
            members = {k: v for k, v in members.items() if k in ("sgd", "adamw")}
        for name, member in members.items():
            console.print(f"  {name:<24}{member['about']}")
            if whole:
                for option, default in member["options"].items():
                    console.print(f"      {option}: {default}", style="dim")
    if not whole:
        console.print("attar list ROOM shows the options; any torch.optim optimizer goes by name")


def _count(number: int) -> str:
    for size, word in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return str(number)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
