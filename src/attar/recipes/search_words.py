"""A search in words. The terminal and the page say exactly the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attar.evaluation import Verdict
from attar.evaluation.cells import scaled, size
from attar.evaluation.numbers import count, is_share, percent, show, title
from attar.evaluation.wording import amount
from attar.recipes.recipe import Goal
from attar.recipes.search_space import Space
from attar.recipes.search_trials import Trial, tried_once
from attar.reporting.svg import unit

FORMAT = "attar-search/1"
COLUMNS = ("trial", "size", "time", "multiply-adds")


def space(found: Space, trials: int) -> str:
    """How large a space is, and how much of it is tried."""
    paths = ", ".join(found.axes)
    if found.size is not None and trials >= found.size:
        return f"{paths}: {count(found.size, 'student')}, each is tried once"
    of = "" if found.size is None else f" of {found.size:,}"
    return f"{paths}: {count(trials, 'trial')}{of}"


def trial(metric: str, found: Trial, goal: bool) -> str:
    """One trial in a line."""
    values = values_of(found)
    if found.same_as is not None:
        return f"as trial {found.same_as}: {values}"
    if not found.finished:
        score = show(metric, found.score, digits=2)
        return f"{found.why}{f' at {title(metric)} {score}' if score else ''}: {values}"
    assert found.cost is not None
    met = (", meets the goal" if found.met else ", misses the goal") if goal else ""
    return (
        f"{title(metric)} {show(metric, found.score, digits=2)}, {size(found.cost['bytes'])}, "
        f"{amount('latency_ms', found.cost['latency_ms'])}{met}: {values}"
    )


def values_of(found: Trial) -> str:
    """The values of a trial for people: rounded, under the ends of their paths."""
    names = short(list(found.chosen))
    values = found.chosen.values()
    return ", ".join(f"{name} {_value(value)}" for name, value in zip(names, values, strict=True))


def short(paths: Sequence[str]) -> list[str]:
    """The end of each path that says which of them it is.

    >>> short(["student.widths.0", "stages.0.optimizer.lr", "stages.1.optimizer.lr"])
    ['widths.0', '0.optimizer.lr', '1.optimizer.lr']
    """
    return [_short(path, [other for other in paths if other != path]) for path in paths]


def _short(path: str, others: Sequence[str]) -> str:
    words = path.split(".")
    for start in range(len(words) - 1, -1, -1):
        end = ".".join(words[start:])
        unique = not any(f".{other}".endswith(f".{end}") for other in others)
        if unique and not (words[start].isdigit() and start == len(words) - 1):
            return end
    return path


def _value(value: Any) -> str:
    """A value as people write it.

    >>> _value({"name": "shrink", "width": 0.14583}), _value([8, "mlp"]), _value(None)
    ('shrink width 0.1458', '[8, mlp]', 'null')
    """
    if isinstance(value, Mapping):
        named = [str(value["name"])] if "name" in value else []
        others = [f"{key} {_value(each)}" for key, each in value.items() if key != "name"]
        return " ".join([*named, *others])
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def stopped(epoch: int, epochs: int) -> str:
    """That a trial was stopped."""
    return f"stopped after epoch {epoch} of {epochs}"


def elsewhere(busy: int) -> str:
    """That others still work."""
    return (
        f"{count(busy, 'trial')} under way elsewhere; the machine that ends the last one judges "
        "the winner, and so does this command with --resume once they are done"
    )


def unlike(metric: str, then: float, now: float) -> str:
    """That a training was not repeated to the bit."""
    return (
        f"the winner, trained again, has {title(metric)} {show(metric, now, digits=2)} on the "
        f"validation rows and had {show(metric, then, digits=2)} as a trial: training is not the "
        "same to the bit on this device"
    )


def headline(metric: str, trials: Sequence[Trial]) -> str:
    """All trials in a line."""
    once = tried_once(trials)
    told = [f"{len(found)} {word}" for word, found in _by_state(once) if found]
    if again := len(trials) - len(once):
        told.append(f"{again} of the same values again")
    done = [each for each in trials if each.finished]
    line = f"{count(len(trials), 'trial')}: {', '.join(told)}" if trials else "No trial is done yet"
    if not done:
        return line
    scores = [each.score for each in done if each.score is not None]
    sizes = [each.cost["bytes"] for each in done if each.cost]
    span = _span([show(metric, end(scores)) for end in (min, max)])
    bytes_ = _span([size(min(sizes)), size(max(sizes))])
    return f"{line}; {title(metric)} {span} on validation, size {bytes_}"


def _by_state(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    states = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}
    return [(word, [t for t in trials if t.state == state]) for state, word in states.items()]


def _span(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def goal_line(
    goal: Goal | None,
    trials: Sequence[Trial],
    winner: Trial | None,
    closest: Trial | None,
    verdict: Verdict | None,
) -> str | None:
    """Which student is the smallest that meets the goal; None without a goal, or too early."""
    if goal is None:
        return None
    wanted = _wanted(goal)
    if winner is not None:
        line = (
            f"SMALLEST of {len(tried_once(trials))} that {wanted} on the validation examples: "
            f"{_said(winner)}"
        )
        end = "" if verdict is None else f". On the test examples: {verdict.goal_line}"
        return line + end
    if closest is not None:
        return (
            f"MISSED, none of {len(tried_once(trials))} {wanted} on the validation examples; "
            f"closest is {_said(closest)}"
        )
    return None


def _wanted(goal: Goal) -> str:
    within = [amount(name, most) for name, most in goal.limits.items()]
    if "macs" in goal.limits:
        within[-1] += " multiply-adds"
    return f"keeps {percent(goal.retain)}{' within ' + ', '.join(within) if within else ''}"


def _said(found: Trial) -> str:
    assert found.cost is not None
    cost = found.cost
    told = [
        f"{show('retention', found.kept)} kept",
        size(cost["bytes"]),
        amount("latency_ms", cost["latency_ms"]),
        f"{scaled(cost['macs'])} multiply-adds",
    ]
    return f"trial {found.number} ({', '.join(told)}; {values_of(found)})"


def notes(goal: Goal | None, trials: Sequence[Trial], validation: int, cut: int) -> list[str]:
    """What a reader must know before trusting the numbers."""
    best = "" if goal is not None else "; without a goal, the best on them won, whatever its size"
    lines = [
        f"The numbers of the trials are of {count(validation, 'validation example')}, by which the "
        f"winner was chosen{best}. There its own number is too good, the more so the more trials "
        "there are. The test examples were asked about the winner alone."
    ]
    if goal is not None and round(validation * (1 - goal.retain)) < 3:
        lines.append(
            f"So few validation examples cannot tell a loss of {percent(1 - goal.retain)}: which "
            "of two close students is good enough is then left to chance."
        )
    lines.append(
        "Each student was trained once, with one seed, and timed when it was done: what else the "
        "machine did then is in its time."
    )
    if cut:
        lines.append(f"{count(cut, 'trial')} cut off on the way, and done again under new numbers.")
    return lines


def facts(
    task: Any, trials: Sequence[Trial], winner: Trial | None, closest: Trial | None
) -> dict[str, Any]:
    """The table of the trials as text, and how to read the metric."""
    return {
        "metric": task.metric,
        "percent": is_share(task.metric),
        "higher_is_better": task.higher_is_better,
        "table": {
            "columns": [*COLUMNS, title(task.metric), "kept"],
            "values": short(list(trials[0].chosen)) if trials else [],
            "rows": [_row(task.metric, each, winner, closest) for each in trials],
        },
    }


def _row(metric: str, found: Trial, winner: Trial | None, closest: Trial | None) -> dict[str, Any]:
    cost = found.cost or {}
    named = {"winner": winner, "closest": closest}
    marks = [word for word, one in named.items() if one is not None and found.number == one.number]
    if found.same_as is not None:
        marks.append(f"as trial {found.same_as}")
    return {
        "number": found.number,
        "state": found.state,
        "mark": ", ".join(marks),
        "met": found.met,
        "cells": [
            size(cost["bytes"]) if cost else "",
            amount("latency_ms", cost["latency_ms"]) if cost else "",
            unit(float(f"{cost['macs']:.3g}"), "").strip() if cost else "",
            show(metric, found.score),
            show("retention", found.kept),
        ],
        "values": [_value(value) for value in found.chosen.values()],
        "why": found.why or "",
    }
