"""Several students of one teacher: what each came to, and which of them is the smallest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from attar.evaluation.cells import Cell, cell, clean, scaled, size
from attar.evaluation.cost import Cost
from attar.evaluation.intervals import Estimate
from attar.evaluation.numbers import (
    between,
    count,
    digits_for,
    is_share,
    percent,
    show,
    signed,
    times,
    title,
)
from attar.evaluation.verdict import ModelReport, Verdict, limits_of

FORMAT = "attar-verdicts/1"
AXES = ("size", "latency")
SAME = 1.05  # times that are no further apart cannot be told from each other


@dataclass(frozen=True)
class Verdicts(Sequence[Verdict]):
    """The verdicts of several students, in the order of the recipe.

    Attributes:
        names: what each student is called: its family, and the options that differ.
        verdicts: what each came to, on the test split.
        kept: the share of the teacher's metric that each keeps on the validation split; None
            where no goal asks for it.
        costs: what each costs, all timed in turns.
        teacher: what the teacher costs, timed with them; None where it has no weights.
    """

    names: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    kept: tuple[float | None, ...]
    costs: tuple[Cost, ...]
    teacher: Cost | None = None

    def __len__(self) -> int:
        return len(self.verdicts)

    @overload
    def __getitem__(self, place: int) -> Verdict: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Verdict]: ...
    def __getitem__(self, place: int | slice) -> Verdict | Sequence[Verdict]:
        return self.verdicts[place]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    @property
    def smallest(self) -> int | None:
        """The place of the smallest student that meets the goal on the validation split.

        By the bytes of its weights. None without a goal, and where no student meets it.
        """
        goal = self.verdicts[0].goal
        if goal is None:
            return None
        meeting = [
            i
            for i, kept in enumerate(self.kept)
            if kept is not None and kept >= goal.retain and self._affordable(i)
        ]
        return min(meeting, key=lambda i: self.costs[i].bytes, default=None)

    def _affordable(self, place: int) -> bool:
        """Whether a student costs no more than the goal allows."""
        goal = self.verdicts[0].goal
        asked = {limit.name: limit.most for limit in goal.limits} if goal else {}
        return all(limit.met for limit in limits_of(asked, self.costs[place]))

    @property
    def met(self) -> bool | None:
        """Whether that student meets the goal on the test split too; None without a goal."""
        if self.verdicts[0].goal is None:
            return None
        goal = None if self.smallest is None else self.verdicts[self.smallest].goal
        return goal is not None and goal.met

    def front(self, axis: str) -> list[int]:
        """The places of those that no other student beats in both: its metric and its cost.

        Args:
            axis: "size" (bytes of the weights) or "latency" (median time of one example, of which
                5 % more or less are the same).
        """
        sign = 1 if self.verdicts[0].higher_is_better else -1
        slack = SAME if axis == "latency" else 1.0
        points = [
            (sign * primary(verdict), cost_of(cost, axis))
            for verdict, cost in zip(self.verdicts, self.costs, strict=True)
        ]
        return undominated(points, slack)

    @property
    def headline(self) -> str:
        """All of them in one line."""
        first = self.verdicts[0]
        outcomes = [verdict.outcome for verdict in self.verdicts]
        told = [f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)]
        values = [primary(verdict) for verdict in self.verdicts]
        digits = digits_for(first.examples)
        span = _span([show(first.metric, end(values), digits=digits) for end in (min, max)])
        sizes = _span([size(end(cost.bytes for cost in self.costs)) for end in (min, max)])
        against = "" if first.against is None else f"; against {_against(first)}: {', '.join(told)}"
        return f"{count(len(self), 'student')}: {title(first.metric)} {span}, size {sizes}{against}"

    @property
    def goal_line(self) -> str | None:
        """The smallest student that meets the goal, in one line; None without a goal."""
        goal = self.verdicts[0].goal
        if goal is None:
            return None
        wanted = percent(goal.retain)
        if self.smallest is None:
            known = [(kept, i) for i, kept in enumerate(self.kept) if kept is not None]
            if not known:
                return f"MISSED, no student has a ratio to the teacher; goal {wanted}"
            kept, place = max(known)
            near = f"{self.names[place]} comes nearest with {show('retention', kept)}"
            if goal.limits and kept >= goal.retain:
                near = f"{self.names[place]} keeps most, {show('retention', kept)}"
            within = " at the cost that the goal allows" if goal.limits else ""
            return f"MISSED, no student keeps {wanted} on the validation examples{within}; {near}"
        kept_there = show("retention", self.kept[self.smallest])
        name, verdict = self.names[self.smallest], self.verdicts[self.smallest]
        return (
            f"SMALLEST that keeps {wanted} on the validation examples: {name} ({kept_there}). "
            f"On the test examples: {verdict.goal_line}"
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know before choosing among them."""
        first = self.verdicts[0]
        examples = count(first.examples, "test example")
        chosen = "; the smallest that meets the goal was chosen by validation"
        lines = [
            f"The numbers are of {examples}. Nothing was chosen by them"
            f"{'' if first.goal is None else chosen}. Who picks a student by them has chosen on "
            "the test split, and the number of the one picked is too good, the more so the more "
            "students there are: measure it on other examples."
        ]
        if first.against is not None and len(self) > 1:
            lines.append(
                f"Each student is compared with {_own(first)} at p below 0.05, without a "
                f"correction for {count(len(self), 'comparison')}."
            )
        told = [verdict.to_json()["notes"] for verdict in self.verdicts]
        return lines + [line for line in told[0] if all(line in other for other in told)]

    def __str__(self) -> str:
        return "\n".join(line for line in (self.headline, self.goal_line) if line)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, each verdict whole; no NaN."""
        first, told = self.verdicts[0], [verdict.to_json() for verdict in self.verdicts]
        goal = None
        if first.goal is not None:
            goal = {"retain": first.goal.retain, "smallest": self.smallest, "met": self.met}
        methods = [each["method"] for each in told]
        return {
            "format": FORMAT,
            "headline": self.headline,
            "goal_line": self.goal_line,
            "notes": self.notes,
            "method": [line for line in methods[0] if all(line in other for other in methods)],
            "metric": first.metric,
            "percent": is_share(first.metric),
            "higher_is_better": first.higher_is_better,
            "examples": first.examples,
            "seeds": first.seeds,
            "goal": goal,
            "front": {axis: self.front(axis) for axis in AXES},
            "table": table(self),
            "teacher": self.teacher and self.teacher.to_json(),
            "students": [
                {
                    "name": name,
                    "folder": f"student-{i}",
                    "kept_on_validation": self.kept[i],
                    "cost": self.costs[i].to_json(),
                    "verdict": told[i],
                }
                for i, name in enumerate(self.names)
            ],
        }


def primary(verdict: Verdict) -> float:
    """The student's primary metric."""
    return verdict.models["distilled"].primary.value


def cost_of(cost: Cost, axis: str) -> float:
    """The bytes of the weights ("size"), or the median time of one example in ms ("latency")."""
    return float(cost.bytes if axis == "size" else cost.latency["1"]["p50_ms"])


def undominated(points: Sequence[tuple[float, float]], slack: float = 1.0) -> list[int]:
    """The places of those that no other beats in both: a quality, more is better, and a cost.

    Args:
        slack: costs that are no more than so many times each other are the same.
    """
    return [
        place
        for place, (own, price) in enumerate(points)
        if not any(
            (other > own and cost <= price * slack) or (other == own and cost * slack < price)
            for other, cost in points
        )
    ]


def _span(ends: Sequence[str]) -> str:
    """Two values as one range, a common unit told once."""
    (low, unit), (high, same) = ((*end.split(), "")[:2] for end in ends)
    if ends[0] == ends[1]:
        return ends[0]
    return f"{low} to {high} {same}".strip() if unit == same else f"{ends[0]} to {ends[1]}"


def _against(verdict: Verdict) -> str:
    return "their baselines" if verdict.against == "baseline" else "what they were before"


def _own(verdict: Verdict) -> str:
    return "its own baseline" if verdict.against == "baseline" else "what it was before"


def table(found: Verdicts) -> dict[str, Any]:
    """A row for the teacher and for each student, as text: what the terminal and the page show."""
    first = found[0]
    heads = ["student", "size", "time for 1, ms", title(first.metric)]
    if first.against is not None:
        heads.append("against baseline" if first.against == "baseline" else "against before")
    teacher = first.models.get("teacher")
    if teacher is not None:
        heads.append("kept")
    rows = [] if teacher is None else [_row(found, None, teacher)]
    rows += [_row(found, i, verdict.models["distilled"]) for i, verdict in enumerate(found)]
    return {"columns": heads, "rows": rows}


def _row(found: Verdicts, place: int | None, model: ModelReport) -> dict[str, Any]:
    """One model; the teacher where there is no place."""
    verdict = found[place or 0]
    metric, examples = verdict.metric, verdict.examples
    cost = found.teacher if place is None else found.costs[place]
    name = "teacher" if place is None else found.names[place]
    mark = "smallest by validation" if place is not None and place == found.smallest else ""
    cells = [cell(clean(name), mark), *_costs(cost, None if place is None else found.teacher)]
    cells.append(_estimate(metric, model.primary, examples))
    if verdict.against is not None:
        cells.append(cell() if place is None else _difference(verdict))
    if "teacher" in verdict.models:
        cells.append(_estimate("retention", model.retention, examples))
    counts = []
    if cost is not None:
        counts = [f"{cost.parameters:,} parameters", f"{scaled(cost.macs)} multiply-adds"]
    told = {"place": place, "cells": cells, "counts": counts, "outcome": "", "tone": ""}
    if place is None or verdict.against is None:
        return told
    return told | {"outcome": verdict.outcome, "tone": _tone(verdict)}


def _costs(cost: Cost | None, teacher: Cost | None) -> list[Cell]:
    """Size and time, and how many times less than the teacher's."""
    if cost is None:
        return [cell(), cell()]
    texts = [size(cost.bytes), f"{cost_of(cost, 'latency'):.3g}"]
    if teacher is None:
        return [cell(text) for text in texts]
    ratios = [cost_of(teacher, axis) / max(cost_of(cost, axis), 1e-9) for axis in AXES]
    words = (("smaller", "larger"), ("faster", "slower"))
    return [cell(t, times(r, *w)) for t, r, w in zip(texts, ratios, words, strict=True)]


def _estimate(metric: str, found: Estimate | None, examples: int) -> Cell:
    if found is None:
        return cell()
    value = show(metric, found.value, digits=digits_for(examples))
    return cell(value, between(metric, found.low, found.high, examples))


def _difference(verdict: Verdict) -> Cell:
    found = verdict.difference
    if found is None:
        return cell()
    interval = between(verdict.metric, found.low, found.high, verdict.examples)
    return cell(signed(verdict.metric, found.value, verdict.examples), interval)


def _tone(verdict: Verdict) -> str:
    return {"better": "good", "worse": "bad"}.get(verdict.outcome, "")


def named(bases: Sequence[str], options: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What several students are called: the family of each, and those of its options that differ.

    >>> named(["mlp", "mlp", "vit"], [{"widths": (8,), "lr": 1}, {"widths": (9,), "lr": 1}, {}])
    ('mlp widths [8]', 'mlp widths [9]', 'vit')
    >>> named(["Net", "Net"], [{}, {}])
    ('Net 0', 'Net 1')
    """
    names = []
    for base, own in zip(bases, options, strict=True):
        alike = [other for name, other in zip(bases, options, strict=True) if name == base]
        differ = [
            f"{key} {_written(value)}"
            for key, value in own.items()
            if any(repr(other.get(key)) != repr(value) for other in alike)
        ]
        names.append(f"{base} {', '.join(differ)}".strip())
    return tuple(
        f"{name} {place}" if names.count(name) > 1 else name for place, name in enumerate(names)
    )


def _written(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
