"""The last stage of a recipe: the student as files that others read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attar.compression.common import spread as everywhere
from attar.data import Source
from attar.evaluation import Verdict
from attar.evaluation.numbers import show, title
from attar.evaluation.wording import amount
from attar.exporting import Artefact, Lost, check_export, export
from attar.exporting.card import described
from attar.exporting.tokens import INPUTS, MOST
from attar.models import read_extra
from attar.recipes.rooms import SUPPLIED
from attar.reporting.page import read_verdict
from attar.reporting.redaction import redacted
from attar.runtime import DataError, PreflightError, read_json

if TYPE_CHECKING:
    from attar.recipes.job import Job

FOLDER = "export"  # in the run


def check_stage(job: Job, student: nn.Module) -> dict[str, Any]:
    """Try what the export stage needs on the untrained *student*; its plan as JSON.

    Raises:
        PreflightError: an option that the run supplies.
        UsageError: a format, a library or a module that cannot be exported.
    """
    options = job.recipe.exporting or {}
    if taken := options.keys() & SUPPLIED["stages"]:
        raise PreflightError(f"'{min(taken)}' is the recipe's own and cannot stand in a stage")
    formats = options.get("formats", ("safetensors",))
    check_export(
        student,
        example=examples(job.test, 2),
        formats=formats,
        task=job.task,
        skip=options.get("skip", ()),
        drop=options.get("drop"),
    )
    return {"formats": list(formats), "folder": FOLDER, "examples": min(MOST, len(job.test))}


def examples(source: Source, most: int = MOST, *, spread: bool = False) -> dict[str, Tensor]:
    """The first inputs of *source*, which files are checked on; of texts what is real of them too.

    Args:
        spread: take them from all over *source*, whose rows may be in the order of their classes.

    Raises:
        PreflightError: its examples are not one tensor.
    """
    count = min(most, len(source))
    batch = source.rows(everywhere(count, source) if spread else torch.arange(count))
    if "inputs" not in batch:
        raise PreflightError(
            f"{source.name}: its batches hold {', '.join(sorted(batch))}, but only a model that "
            "reads one tensor, 'inputs', can be exported; leave the export stage out"
        )
    return {name: batch[name] for name in INPUTS if name in batch}


def told(job: Job, *, name: str, data: str, seed: int) -> dict[str, str]:
    """What a card tells of the student but for its verdict; kept with the saved student too.

    Args:
        name: of the recipe.
        data, seed: what it was trained on, in words, and the seed that validation liked best.
    """
    teacher = "; and ".join(described(member.model) for member in job.members)
    teacher = teacher or job.moving or ""
    which = f" (seed {seed})" if job.recipe.seeds > 1 else ""
    card = {"name": f"{name} student{which}", "teacher": teacher, "data": data}
    return {field: redacted(text) for field, text in card.items()}


def told_of(model: Path) -> dict[str, Any]:
    """What a card tells of the student that a run saved in *model*, with the run's verdict.

    Raises:
        DataError: the run's verdict cannot be read.
    """
    card = read_extra(model).get("card")
    path = model.resolve().parent / "verdict.json"
    if not isinstance(card, dict) or not path.is_file():
        return card if isinstance(card, dict) else {}
    verdict = read_verdict(path)
    if lost := {"headline", "goal_line", "table"} - verdict.keys():
        raise DataError(f"{path}: has no '{min(lost)}', so the card cannot tell it; move it away")
    return card | {"verdict": verdict}


def export_student(
    job: Job, student: nn.Module, run: Path, *, card: dict[str, str], verdict: Verdict
) -> list[Artefact]:
    """Write *student* into the run's ``export/``, whole or not at all, with its card."""
    whole: Any = {**card, "verdict": verdict}
    options = job.recipe.exporting or {}
    made = export(
        student,
        run / FOLDER,
        example=examples(job.test),
        task=job.task,
        card=whole,
        **_rounding(job),
        **options,
    )
    return list(made.values())


def _rounding(job: Job) -> dict[str, Any]:
    """What a file of whole numbers is made and judged by, where the recipe asks for one."""
    options = job.recipe.exporting or {}
    if "onnx_int8" not in options.get("formats", ()):
        return {}
    given: dict[str, Any] = {"calibration": examples(job.train, spread=True)}
    judged = options.get("drop") is not None or "attention" not in given["calibration"]
    return given | {"test": job.test} if judged else given


def missed(exports: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of *exports*, as ``verdict.json`` holds them, lost more than it may."""
    return any((each.get("lost") or {}).get("missed") for each in exports)


def missed_in(runs: Iterable[Path]) -> bool:
    """Whether a file that one of these runs exported lost more than it may."""
    return any(missed(read_json(run / "verdict.json")["exports"]) for run in runs)


def notes(limits: Mapping[str, float], made: Iterable[Mapping[str, Any]]) -> list[str]:
    """How files that run without PyTorch differ from the student that is judged, a sentence each.

    Args:
        limits: the goal's, by name.
        made: exports as ``verdict.json`` holds them.
    """
    return [_unlike(limits, each) for each in made if each["format"] != "safetensors"]


def _unlike(limits: Mapping[str, float], made: Mapping[str, Any]) -> str:
    cost = {"size_mb": made["bytes"] / 1e6, "latency_ms": made["latency"]["1"]["p50_ms"]}
    weight, time = (amount(name, value) for name, value in cost.items())
    line = (
        f"{made['path']} has {weight} and takes {time} for one example; the goal and the table are "
        "about the student in PyTorch."
    )
    over = [amount(name, limits[name]) for name in cost if cost[name] > limits.get(name, math.inf)]
    return f"{line} This file misses the goal of {' and '.join(over)}." if over else line


def summary(made: Sequence[Artefact]) -> str:
    """What was made and seen, in a line."""
    exact = [each for each in made if each.agreement is None and each.lost is None]
    parts = [_near(each) for each in made if each not in exact]
    if exact:
        names = ", ".join(each.format for each in exact)
        largest = max(each.difference for each in exact)
        parts.insert(0, f"{names}: within {largest:.1g} of the student")
    losses = [_lost(each.format, each.lost) for each in made if each.lost is not None]
    return "; ".join([f"{', '.join(parts)} on {made[0].examples} test examples", *losses])


def _near(made: Artefact) -> str:
    same = show("agreement", made.agreement)
    return f"{made.format}: within {made.difference:.1g}" + (
        f", {same} the same answer" if same else ""
    )


def _lost(name: str, found: Lost) -> str:
    ours, theirs = (show(found.metric, each, digits=2) for each in (found.file, found.module))
    line = f"{name}: {title(found.metric)} {ours}, the student's {theirs}"
    if found.budget is None:
        return line
    how = "more than" if found.missed else "within"
    return f"{line}, {how} the {found.budget:g} it may lose"
