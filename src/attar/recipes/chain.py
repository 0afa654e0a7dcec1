"""What each stage of a recipe makes of a student, where stages change its structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attar.evaluation import Cost, Verdict
from attar.evaluation.steps import table
from attar.evaluation.verdict import ModelReport
from attar.recipes.changes import made_from
from attar.recipes.job import copied, judged
from attar.recipes.recipe import verb
from attar.tasks import Task


@dataclass
class Step:
    """What one stage made of the student.

    Attributes:
        do: the verb of the stage.
        made: of a change, its plan.
        model: a copy of the student; None once its score is known and its cost is not asked for.
        score: on the test split.
    """

    do: str
    made: dict[str, Any] | None
    model: nn.Module | None
    score: float | None = None


class Steps:
    """The steps of one student on its way through the stages.

    Args:
        start: the student before the first; a step where it was made from its teacher.
        say: is told of each change in a line.
    """

    def __init__(self, start: nn.Module, say: Callable[[str], None]) -> None:
        self.say = say
        made = made_from(start).get("made")
        self.done = [] if made is None else [Step(made["way"], made, copied(start))]

    def changed(self, stage: Any, model: nn.Module) -> None:
        """Note what a stage has changed."""
        made = made_from(model)["made"]
        self.done.append(Step(verb(stage).__name__, made, copied(model)))
        self.say(f"{verb(stage).__name__:<16}{made['told'].splitlines()[0]}")

    def trained(self, stage: Any, learner: nn.Module) -> None:
        """Note what a stage has trained."""
        self.done.append(Step(verb(stage).__name__, None, copied(judged(learner))))


def scored(steps: Sequence[Step], score: Callable[[nn.Module], float], *, keep: bool) -> None:
    """Ask each step's model about the test split; its copy is let go unless it is to be timed."""
    for step in steps:
        assert step.model is not None
        step.score = score(step.model)
        step.model = step.model if keep else None


def models_of(steps: Sequence[Step]) -> dict[str, nn.Module]:
    """The models of all steps but the last, which is the student, by the names of their costs."""
    return {f"step {n}": step.model for n, step in enumerate(steps[:-1]) if step.model is not None}


def told(
    task: Task,
    verdict: Verdict,
    seeds: Sequence[Sequence[Step]],
    costs: Mapping[str, Cost],
    exports: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The chain as JSON: each step in order, its scores and its cost, and all as a table.

    Args:
        exports: files that run by themselves are its last steps.
    """
    found: list[dict[str, Any]] = []
    for number, step in enumerate(seeds[0]):
        last = number == len(seeds[0]) - 1
        cost = costs["distilled" if last else f"step {number}"]
        made = {} if step.made is None else {"told": step.made["told"], "plan": step.made}
        scores = [s for steps in seeds if (s := steps[number].score) is not None]
        score = sum(scores) / len(scores)
        found.append({"do": step.do, "score": score, "scores": scores, "cost": cost.to_json()})
        found[-1] |= made
    found += [_file(made, found[-1]) for made in exports if made["format"] != "safetensors"]
    report = verdict.models.get("teacher")
    teacher = None if report is None else {"score": report.primary.value, "cost": _cost(report)}
    rows = table(task.metric, verdict.examples, teacher, found)
    return {"seeds": len(seeds), "teacher": teacher, "steps": found, "table": rows}


def _file(made: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """An exported file as a step; one that was not judged by itself answers as the student does."""
    lost = made.get("lost")
    score = student["score"] if lost is None else lost["file"]
    cost = student["cost"] | {"bytes": made["bytes"], "latency": made["latency"]}
    return {"do": f"export {made['format']}", "score": score, "scores": [score], "cost": cost}


def _cost(report: ModelReport) -> dict[str, Any] | None:
    return None if report.cost is None else report.cost.to_json()
