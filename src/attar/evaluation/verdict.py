"""The verdict: is the distilled student better than the baseline, and what does it cost?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attar.evaluation import cells, wording
from attar.evaluation.cost import Cost
from attar.evaluation.intervals import ALPHA, Difference, Estimate
from attar.evaluation.numbers import is_share

FORMAT = "attar-verdict/1"
Outcome = Literal["better", "no difference", "worse", "not compared"]


@dataclass(frozen=True)
class Seen:
    """What a model learned from.

    Attributes:
        rows: how many.
        labelled: how many of them with their labels.
    """

    rows: int
    labelled: int


@dataclass(frozen=True)
class ModelReport:
    """What is known of one model.

    Attributes:
        primary: the primary metric with its interval; the mean over seeds.
        seeds: the primary metric of each seed.
        scores: every metric, mean over seeds.
        agreement: how much the answers are the teacher's; None for the teacher itself.
        retention: metric / teacher's metric (inverted when lower is better).
        gap_closed: ``(model - baseline) / (teacher - baseline)``; None when the teacher is not
            above the baseline, and for both of them.
        per_class: the primary metric of each class.
        cost: what it costs; ratios: how many times less than the teacher.
        seconds: training time of one run.
    """

    primary: Estimate
    seeds: tuple[float, ...]
    scores: dict[str, float]
    agreement: dict[str, float] | None = None
    retention: Estimate | None = None
    gap_closed: float | None = None
    per_class: dict[str, float] | None = None
    cost: Cost | None = None
    ratios: dict[str, float] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Limit:
    """The most that the student may cost in one respect.

    Attributes:
        name: ``latency_ms`` (median of one example), ``size_mb`` (weights on disk) or ``macs``.
        most: what was asked for, in that unit.
        value: what the student costs.
    """

    name: str
    most: float
    value: float

    @property
    def met(self) -> bool:
        """Whether the student costs no more."""
        return self.value <= self.most


def limits_of(asked: Mapping[str, float], cost: Cost) -> tuple[Limit, ...]:
    """What a model costs beside the most that was asked for, by name."""
    values = {
        "latency_ms": cost.latency["1"]["p50_ms"],
        "size_mb": cost.bytes / 1e6,
        "macs": float(cost.macs),
    }
    return tuple(Limit(name, most, values[name]) for name, most in asked.items())


@dataclass(frozen=True)
class Goal:
    """Whether the student keeps the share of the teacher's metric that was asked for.

    Attributes:
        retain: the share asked for.
        retention: the share kept, with its interval.
        met: by the point estimate, and within all limits.
        sure: the lower end of the interval says so too.
        enough_examples: the test set can tell a loss of ``1 - retain`` at all: the interval is
            not wider than that, and at least 3 examples are expected in it (the rule of three).
        limits: the most that the student may cost, and what it does.
    """

    retain: float
    retention: Estimate | None
    met: bool
    sure: bool
    enough_examples: bool
    limits: tuple[Limit, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the share is kept, by the point estimate, whatever the student costs."""
        return self.retention is not None and self.retention.value >= self.retain


@dataclass(frozen=True)
class Verdict:
    """What came of a distillation, for people (``headline``) and for programs (``to_json``).

    Attributes:
        metric: the primary metric, which the verdict is about.
        outcome: "better", "no difference" or "worse" than *against* at alpha = 0.05.
        against: "baseline"; "start" when there is none; None when there is neither.
        difference: distilled minus *against*, paired, with interval and p value.
        models: a report by role (teacher, baseline, start, distilled) or, for others, by name.
        last: the primary metric of the last epoch's weights, where the best were judged.
        floor: the primary metric of the best constant answer.
        teacher_share: the share of the distillation's time that was spent asking the teacher.
        labels: the examples of each class in the test set.
        called: what the judged student is called: "distilled", or "transferred" where it inherits
            weights and asks no teacher.
        taught_by: what taught the student, in words, where it was no fixed model.
        reuses_head: the student ends in its teacher's classifier, behind a projector.
        saw: the rows that each model learned from, by role, where a run knows them.
    """

    metric: str
    higher_is_better: bool
    examples: int
    seeds: int
    outcome: Outcome
    against: Literal["baseline", "start"] | None
    difference: Difference | None
    models: dict[str, ModelReport]
    goal: Goal | None = None
    last: Estimate | None = None
    floor: float | None = None
    teacher_share: float | None = None
    resamples: int = 1000
    labels: tuple[int, ...] | None = field(default=None, repr=False)
    called: str = "distilled"
    taught_by: str | None = None
    reuses_head: bool = False
    saw: Mapping[str, Seen] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return wording.headline(self)

    @property
    def goal_line(self) -> str | None:
        """The goal in one line; None without a goal."""
        return None if self.goal is None else wording.goal_line(self.goal, self)

    def __str__(self) -> str:
        return "\n".join(line for line in (self.headline, self.goal_line) if line)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, the words included; no NaN: what has no value is None."""
        return _json(
            {
                "format": FORMAT,
                "headline": self.headline,
                "goal_line": self.goal_line,
                "summary": wording.summary(self),
                "highlights": wording.highlights(self),
                "notes": wording.notes(self),
                "method": wording.method(self),
                "outcome": self.outcome,
                "against": self.against,
                "called": self.called,
                "taught_by": self.taught_by,
                "reuses_head": self.reuses_head,
                "saw": {name: asdict(seen) for name, seen in self.saw.items()},
                "metric": self.metric,
                "percent": is_share(self.metric),
                "higher_is_better": self.higher_is_better,
                "examples": self.examples,
                "seeds": self.seeds,
                "alpha": ALPHA,
                "resamples": self.resamples,
                "floor": self.floor,
                "difference": _difference(self.difference),
                "goal": _goal(self.goal),
                "last": None if self.last is None else asdict(self.last),
                "teacher_share": self.teacher_share,
                "models": {name: asdict(model) for name, model in self.models.items()},
                "table": cells.table(self),
                "class_table": cells.class_table(self),
            }
        )


def _difference(found: Difference | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _goal(goal: Goal | None) -> dict[str, Any] | None:
    if goal is None:
        return None
    found = goal.retention
    return asdict(goal) | {
        "retention": found and found.value,
        "interval": found and [found.low, found.high],
        "limits": [asdict(limit) | {"met": limit.met} for limit in goal.limits],
    }


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
