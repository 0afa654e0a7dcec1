"""What the command prints for people."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attar.evaluation.cells import size
from attar.recipes import SUPPLIED, rooms
from attar.recipes.resolve import shown, spelt
from attar.recipes.rooms import SAID
from attar.runtime import UsageError, suggest

console = Console(highlight=False, soft_wrap=False)
POINTS = " points"


def print_verdict(verdict: Any, *, whole: bool) -> None:
    """The table and the line a person came for."""
    from attar.evaluation import table
    from attar.evaluation.wording import kind_of_student

    if whole:
        console.print(table(verdict))
    console.print(verdict.headline, style="bold", soft_wrap=True)
    if verdict.goal_line is not None:
        console.print(verdict.goal_line, soft_wrap=True)
    for line in kind_of_student(verdict) if whole else ():
        console.print(line, soft_wrap=True)


def print_verdicts(verdicts: Any, *, whole: bool) -> None:
    """The students of one teacher side by side, and the line a person came for."""
    from attar.evaluation.table import table_of_many

    if whole:
        console.print(table_of_many(verdicts))
    console.print(verdicts.headline, style="bold", soft_wrap=True)
    if verdicts.goal_line is not None:
        console.print(verdicts.goal_line, soft_wrap=True)
    if whole:
        console.print(verdicts.notes[0], soft_wrap=True)


def print_chain(chain: dict[str, Any] | None) -> None:
    """A row for each stage of a chain, in 80 columns; nothing where there is none."""
    if not chain:
        return
    made = Table(box=None, header_style="", padding=(0, 2, 0, 0))
    stage, metric, *costs = chain["table"]["columns"]
    kept = [costs.index(each) for each in ("parameters", "size", "1 example, ms")]
    in_points = any(each[1]["note"].endswith(POINTS) for each in chain["table"]["rows"])
    change = "change, points" if in_points else "change"  # in each row it would not fit
    for head in (stage, metric, change, *(costs[place] for place in kept)):
        first = head == stage
        lines = "\n".join(wrap(head, 10, break_long_words=False))
        made.add_column(Text(lines), justify="left" if first else "right", no_wrap=first)
    for name, score, *rest in chain["table"]["rows"]:
        told = score["note"].removesuffix(POINTS)
        texts = [name["text"], score["text"], told, *(rest[p]["text"] for p in kept)]
        made.add_row(*(Text(each or "-") for each in texts))
    console.print(made)


def print_exports(exports: Sequence[dict[str, Any]]) -> None:
    """A line for each exported file; nothing where there is none."""
    if not exports:
        return
    threads = f"on {exports[0]['threads']} thread{'s' * (exports[0]['threads'] > 1)}"
    made = Table(box=None, header_style="", padding=(0, 2, 0, 0))
    for title in ("exported", "size", "1 example, ms", "64 examples, ms", "difference"):
        made.add_column(title, justify="left" if title == "exported" else "right")
    for each in exports:
        taken = [each["latency"][batch] for batch in ("1", "64")]
        times = [f"{time['p50_ms']:.3g} / {time['p95_ms']:.3g}" for time in taken]
        made.add_row(each["path"], size(each["bytes"]), *times, f"{each['difference']:.1g}")
    console.print(made)
    console.print(
        f"times: median / 95 % of passes, {threads}; difference: the largest of any output to "
        f"the model, on {exports[0]['examples']} test examples",
        soft_wrap=True,
    )


def print_plan(plan: dict[str, Any]) -> None:
    """What a run would do, as `attar check` found it."""
    for index, each in enumerate(plan.get("students", ())):
        console.print(f"student {index}: {each['name']}", style="bold", markup=False)
        _print_plan(each)
        console.print()
    if "students" not in plan:
        _print_plan(plan)
    console.print("checked: every stage ran on one batch. Nothing was trained.")


def _print_plan(plan: dict[str, Any]) -> None:
    data, seeds = plan["data"], plan["seeds"]
    lines = [
        (
            "data",
            f"{data['name']}: {data['train']:,} train, {data['validation']:,} validation, "
            f"{data['test']:,} test; inputs {data['shape']}"
            + ("" if data["width"] is None else f", {data['width']} outputs"),
        )
    ]
    for role in ("teacher", "student", "baseline"):
        if role not in plan:  # it is the student
            continue
        lines.append((role, _size(plan[role])))
        if made := plan[role].get("made"):
            lines += [("  made", line) for line in made["told"].splitlines()]
        members = plan[role].get("members", ())
        lines += [(f"  member {index}", _size(each)) for index, each in enumerate(members)]
    if "parameters" in plan["teacher"]:
        last = plan.get("result", plan["student"])
        lines += _ratio(plan["teacher"]["parameters"], last["parameters"], "result" in plan)
    lines += _learned(plan["saw"])
    for index, stage in enumerate(plan["stages"]):
        lines += _changes(stage)
        lines.append((f"stage {index}", _stage(stage, seeds)))
        if "assistant" in stage:
            lines.append(("  assistant", _size(stage["assistant"])))
        lines += [_term(term, stage["gradients"]) for term in stage["terms"]]
        lines += _labels(stage["gradients"])
        if stage["lopsided"]:
            lines.append(("  warning", stage["lopsided"]))
    lines += _changes(plan)
    if "export" in plan:
        made = plan["export"]
        formats = f"{', '.join(made['formats'])}; tried on the untrained student"
        lines.append((made["folder"], formats))
    if "search" in plan:
        lines.append(("search", f"{plan['search']['told']}; each value was tried"))
    lines += [("note", note) for note in plan.get("notes", ())]
    _print_rows(lines, 11)
    _print_proposals(plan["stages"])


def _ratio(teacher: int, student: int, changed: bool) -> list[tuple[str, str]]:
    """How many parameters fewer, where they are fewer: a student in fewer bits has as many."""
    ratio = teacher / max(student, 1)
    if 0.95 < ratio < 1.05:
        return []
    word, factor = ("fewer", ratio) if ratio > 1 else ("more", 1 / ratio)
    of = " in the end" if changed else ""
    return [("ratio", f"the student has {factor:,.1f} times {word} parameters{of}")]


def _changes(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What is done to the student's structure there, as far as an untrained one can tell."""
    return [(each["do"], each["told"].partition("\n")[0]) for each in plan.get("changes", ())]


def _size(model: dict[str, Any]) -> str:
    if "parameters" not in model:
        return str(model["model"])
    return (
        f"{model['model']}: {model['parameters']:,} parameters, "
        f"{_count(model['macs'])} multiply-adds an example"
    )


def _print_proposals(stages: Sequence[dict[str, Any]]) -> None:
    """The terms of pairing: auto as lines of a recipe, never folded, to be taken over."""
    found = [
        (index, one["lines"]) for index, stage in enumerate(stages) for one in stage["proposals"]
    ]
    for index, lines in found:
        console.print(f"\nproposed for stage {index}, to write instead of pairing: auto:")
        for line in lines:
            console.print(f"      {line}", soft_wrap=True, markup=False)
    if found:
        console.print(
            "The CKA is of the nets as they are now. A run proposes anew when the stage begins, "
            "after what is trained before it; written lines stay.\n",
            soft_wrap=True,
        )


def _learned(saw: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """The rows of each arm, where they are not the same for all."""
    if all(seen == saw["distilled"] for seen in saw.values()):
        return []
    told = [
        f"{name} {seen['rows']:,} rows, {seen['labelled']:,} labelled" for name, seen in saw.items()
    ]
    if saw.get("baseline", saw["distilled"]) != saw["distilled"]:
        told.append("the baseline sees its rows over and over, to as many steps")
    return [("learn from", "\n".join(told))]


def _stage(stage: dict[str, Any], seeds: int) -> str:
    adapters = stage["projector_parameters"]
    inside = f", {adapters:,} of them in projectors," if adapters else ""
    return (
        f"{stage['steps']:,} steps of {stage['batch_size']} over {stage['examples']:,} examples, "
        f"{seeds} seed{'s' * (seeds > 1)}; trains {stage['trained_parameters']:,} parameters"
        f"{inside} with at most {size(stage['checkpoint_bytes'])} of state"
    )


def _labels(gradients: dict[str, float]) -> list[tuple[str, str]]:
    if "labels" not in gradients or len(gradients) < 2:
        return []
    return [("  labels", f"weighted gradient {gradients['labels']:.3g}")]


def _term(term: dict[str, Any], gradients: dict[str, float]) -> tuple[str, str]:
    teacher = f"{term['teacher']} {term['teacher_shape']}" if term["teacher"] else "labels"
    lines = [
        f"{term['name']}, {term['value']:.4g} on the first batch, weighted gradient "
        f"{gradients.get(term['name'], 0):.3g}",
        f"student {term['student']} {term['student_shape']}, teacher {teacher}",
    ]
    if term["projector"]:
        lines.append(f"projector {term['projector']}")
    if term["teacher_projector"]:
        lines.append(f"on the teacher's side {term['teacher_projector']}")
    if "grad:" in term["student"]:
        lines.append(
            "costs a backward pass of the teacher and one of the student in each step, and the "
            "student's is differentiated again: a step takes about three times as long"
        )
    return "  term", "\n".join(lines)


def _print_rows(lines: Sequence[tuple[str, str]], width: int) -> None:
    """Two columns; what is too long goes on below its own column."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(min_width=width, no_wrap=True)
    grid.add_column()
    for label, text in lines:
        grid.add_row(Text(label), Text(text))
    console.print(grid)


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
    said = SAID.get(member.__name__, {}) if room == "stages" else {}
    options = {
        p.name: "required" if p.default is p.empty else _default(p.default)
        for p in parameters
        if p.name not in SUPPLIED[room] and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    } | {name: "false" if hint is bool else "null" for name, hint in said.items()}
    return {"about": lines[0] if lines else "", "options": options}


def _default(value: Any) -> str:
    """A default as a recipe writes it."""
    known, written = spelt(value)
    return json.dumps(written).replace('"', "") if known else str(value)


def print_rooms(described: dict[str, dict[str, Any]], *, whole: bool) -> None:
    """One line a member; with its options where one room was asked for."""
    for room, members in described.items():
        console.print(room, style="bold")
        if room == "optimizers" and not whole:
            members = {k: v for k, v in members.items() if k in ("sgd", "adamw")}
        lines = []
        for name, member in members.items():
            about = [member["about"].replace("`", "")]
            if whole:
                about += [f"{option}: {value}" for option, value in member["options"].items()]
            lines.append((f"  {name}", "\n".join(about)))
        _print_rows(lines, 24)
    if not whole:
        console.print("attar list ROOM shows the options; any torch.optim optimizer goes by name")


def _count(number: int) -> str:
    for unit, word in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {word}"
    return str(number)
