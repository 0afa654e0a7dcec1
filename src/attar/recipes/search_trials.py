"""The trials of a search: what is known of each, which of them win, and how one is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attar.evaluation.cost import Cost
from attar.evaluation.verdict import limits_of
from attar.evaluation.verdicts import SAME, undominated
from attar.recipes.arms import Arm, Desk, train_arm
from attar.recipes.preflight import check_job
from attar.recipes.recipe import Goal, Loaded
from attar.recipes.run import measured
from attar.runtime import DivergedError, PreflightError, Run, UsageError
from attar.training.plan import Plan

State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One student that was tried.

    Attributes:
        number: its place among the trials.
        chosen: the values of the space, by path.
        state: finished, stopped early by the pruner, or failed.
        score: the metric on the validation rows; of one that was stopped, the last.
        kept: the share of the teacher's metric on them; None without a teacher that has one.
        cost: parameters, macs, bytes of the weights on disk, latency_ms; None of an unfinished one.
        misses: how far it is from each part of the goal, as a share; at most 0 where it is met.
        why: why it is not finished.
        same_as: the number of the trial of the same values, of which these numbers are.
    """

    number: int
    chosen: dict[str, Any]
    state: State
    score: float | None = None
    kept: float | None = None
    cost: dict[str, float] | None = None
    misses: dict[str, float] | None = None
    why: str | None = None
    same_as: int | None = None

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.state == "finished"

    @property
    def met(self) -> bool:
        """Whether it meets every part of the goal, on the validation rows."""
        return self.finished and all(miss <= 0 for miss in (self.misses or {}).values())

    @property
    def missed(self) -> float:
        """How far it is from the goal in all."""
        return sum(max(0.0, miss) for miss in (self.misses or {}).values())

    def to_json(self) -> dict[str, Any]:
        """This trial as JSON values."""
        return asdict(self)


class Watched(Run):
    """The run folder of a trial; each validation is told to *watch*, which may raise to stop it."""

    def __init__(self, folder: Path, watch: Callable[[float], None], metric: str) -> None:
        super().__init__(folder)
        self._watch = watch
        self._metric = metric

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, and tell of a validation."""
        super().log(record)
        if record.get("split") == "validation":
            self._watch(float(record[self._metric]))


class Unfit(Exception):
    """A student that cannot be made or trained; the search goes on without it."""


def tried(
    desk: Desk, loaded: Loaded, folder: Path, aim: float | None, watch: Callable[[float], None]
) -> dict[str, Any]:
    """Train one student and measure it on the validation rows.

    Args:
        desk: of the search; its job holds the teacher, and validation rows in place of the test's.
        aim: the teacher's metric on them.
        watch: is told the metric after each epoch.

    Returns:
        ``score``, ``kept``, ``cost`` and ``misses`` of a ``Trial``.

    Raises:
        Unfit: the recipe does not fit together, or its training diverged.
    """
    job = replace(desk.job, recipe=loaded.recipe)
    try:
        check_job(job)
    except (PreflightError, UsageError) as error:
        raise Unfit(str(error)) from error
    with Watched(folder, watch, job.task.metric) as run:
        run.write("recipe.json", loaded.full)
        inner = replace(desk, job=job, run=run, resume=False, say=lambda line: None)
        try:
            student = train_arm(inner, Arm(), "distilled", 0, job.student(0))
        except DivergedError as error:
            raise Unfit(str(error)) from error
        finally:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        inner.save(student, "student", task=job.task.describe(), data=loaded.full.get("data"))
        score = float(job.task.primary(inner.rows(student)))
        cost = measured(inner, {"student": student}, {"student": folder / "student"})["student"]
    kept = share(aim, score, job.task.higher_is_better)
    return {
        "score": score,
        "kept": kept,
        "cost": told_cost(cost),
        "misses": misses(loaded.recipe.goal, kept, cost),
    }


def told_cost(cost: Cost) -> dict[str, float]:
    """What a trial tells of a cost."""
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bytes": cost.bytes,
        "latency_ms": cost.latency["1"]["p50_ms"],
    }


def share(teacher: float | None, student: float, higher_is_better: bool) -> float | None:
    """How much of the teacher's metric a student keeps; None where there is no ratio."""
    if teacher is None:
        return None
    above, below = (student, teacher) if higher_is_better else (teacher, student)
    return above / below if below > 0 else None


def misses(goal: Goal | None, kept: float | None, cost: Cost) -> dict[str, float]:
    """How far a student is from each part of the goal, as a share of it; at most 0 where met."""
    if goal is None:
        return {}
    found = {"retain": 1.0 if kept is None else 1 - kept / goal.retain}
    limits = limits_of(goal.limits, cost)
    return found | {limit.name: limit.value / limit.most - 1 for limit in limits}


def epochs_of(loaded: Loaded) -> int:
    """How many epochs a recipe's stages have in all."""
    default = Plan.__dataclass_fields__["epochs"].default
    stages = [s.keywords if isinstance(s, partial) else {} for s in loaded.recipe.trainings]
    return sum(options.get("epochs", default) for options in stages)


def tried_once(trials: Sequence[Trial]) -> list[Trial]:
    """Without those that were as an earlier one."""
    return [trial for trial in trials if trial.same_as is None]


def winner_of(
    trials: Sequence[Trial], *, goal: bool, higher_is_better: bool = True
) -> Trial | None:
    """The smallest student that meets the goal; without one, the best.

    Of equals the better, the smaller and the earlier; None where there is none.
    """
    sign = -1 if higher_is_better else 1

    def order(trial: Trial) -> tuple[float, ...]:
        size, quality = _bytes(trial), sign * (trial.score or 0.0)
        return (size, quality, trial.number) if goal else (quality, size, trial.number)

    return min((trial for trial in trials if trial.met), key=order, default=None)


def closest_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished student that misses the goal by least."""
    return min(
        (trial for trial in trials if trial.finished),
        key=lambda trial: (trial.missed, _bytes(trial), trial.number),
        default=None,
    )


def _bytes(trial: Trial) -> float:
    assert trial.cost is not None
    return trial.cost["bytes"]


def fronts_of(trials: Sequence[Trial], *, higher_is_better: bool) -> dict[str, list[int]]:
    """The numbers of those that no other beats in both, by axis: size, latency."""
    sign = 1 if higher_is_better else -1
    own = [trial for trial in trials if trial.finished and trial.same_as is None]
    found = {}
    for axis, (key, slack) in {"size": ("bytes", 1.0), "latency": ("latency_ms", SAME)}.items():
        points = [(sign * (t.score or 0.0), _cost(t)[key]) for t in own]
        found[axis] = [own[place].number for place in undominated(points, slack)]
    return found


def _cost(trial: Trial) -> Mapping[str, float]:
    assert trial.cost is not None
    return trial.cost
