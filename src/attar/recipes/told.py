"""What a run says of itself: its data, its surroundings, what is odd about its plan."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

import attar
from attar.recipes.job import Job
from attar.recipes.recipe import Loaded
from attar.recipes.teachers import lost_by
from attar.runtime import Ranks, resolve_device


def described(job: Job) -> str:
    """The data and how many rows each part has, in words."""
    train = f"{len(job.train):,} train"
    if job.recipe.labels is not None:
        train += f", {len(job.parts.labelled):,} of them labelled"
    held = f"{len(job.validation):,} validation, {len(job.test):,} test"
    return f"{job.called_data}: {train}, {held}"


def warn(plans: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say which terms outweigh the others."""
    for warning in (w for stage in plans["stages"] if (w := stage["lopsided"])):
        say(f"warning    {warning}")


def environment(
    loaded: Loaded, job: Job, ranks: Ranks, made: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What else a reader needs to repeat the run; *made* is how the student came from a teacher."""
    told = {f"plugin {name}": digest for name, digest in loaded.plugins.items()}
    if job.members and (lost := lost_by(job.teacher)):
        told["not told"] = "; ".join(lost)
    if made:
        told["student made from the teacher"] = made["made"]["told"].replace("\n", "; ")
    if job.weights is not None:
        told["teachers' weights"] = ", ".join(f"{weight:.6f}" for weight in job.weights)
    return {
        "attar": attar.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "device": str(resolve_device(job.recipe.device)),
        "ranks": str(ranks.world),
        **told,
    }
