"""The last stage of a recipe: the student as files that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attar.data import Source
from attar.evaluation import Verdict
from attar.exporting import Artefact, check_export, export
from attar.exporting.card import described
from attar.exporting.export import MOST
from attar.recipes.rooms import SUPPLIED
from attar.reporting.redaction import redacted
from attar.runtime import PreflightError

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
    check_export(student, example=examples(job.test, 2), formats=formats)
    return {"formats": list(formats), "folder": FOLDER, "examples": min(MOST, len(job.test))}


def examples(source: Source, most: int = MOST) -> Tensor:
    """The first inputs of *source*, which files are checked on.

    Raises:
        PreflightError: its examples are not one tensor.
    """
    batch = source.rows(torch.arange(min(most, len(source))))
    if "inputs" not in batch:
        raise PreflightError(
            f"{source.name}: its batches hold {', '.join(sorted(batch))}, but only a model that "
            "reads one tensor, 'inputs', can be exported; leave the export stage out"
        )
    return batch["inputs"]


def export_student(
    job: Job, student: nn.Module, run: Path, *, name: str, data: str, seed: int, verdict: Verdict
) -> list[Artefact]:
    """Write *student* into the run's ``export/``, whole or not at all, with its card.

    Args:
        name: of the recipe.
        data, seed: what it was trained on, in words, and the seed that validation liked best.
    """
    which = f" (seed {seed})" if job.recipe.seeds > 1 else ""
    told = {"name": f"{name} student{which}", "teacher": described(job.teacher), "data": data}
    made = export(
        student,
        run / FOLDER,
        example=examples(job.test),
        task=job.task,
        card={**redacted(told), "verdict": verdict},
        **(job.recipe.exporting or {}),
    )
    return list(made.values())


def summary(made: Sequence[Artefact]) -> str:
    """What was made and seen, in a line."""
    return (
        f"{', '.join(each.format for each in made)}: within "
        f"{max(each.difference for each in made):.1g} of the student on {made[0].examples} "
        "test examples"
    )
