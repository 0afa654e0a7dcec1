"""What each stage of a chain changed, as figures: quality, size and time, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attar.reporting.svg import (
    WIDTH,
    Axis,
    Drawing,
    canvas,
    clip,
    label,
    line,
    padded,
    shown,
    tag,
    text,
    unit,
)

ROW = 36
MARGIN = 14
Point = tuple[str, float]


def waterfall(verdict: Mapping[str, Any]) -> list[Drawing]:
    """The metric, the size and the latency after each stage; empty where there is no chain."""
    chain = verdict.get("chain")
    if not chain:
        return []
    percent, metric = verdict["percent"], shown(verdict["metric"])
    teacher = [] if chain["teacher"] is None else [{"do": "teacher"} | chain["teacher"]]
    steps = [*teacher, *chain["steps"]]
    names = [
        step["do"] if step["do"] == "teacher" else f"{number} {step['do']}"
        for number, step in enumerate(steps, 1 - len(teacher))
    ]
    scores = [step["score"] for step in steps]
    ends = padded(min(scores), max(scores), percent)
    across = Axis(*ends, MARGIN, WIDTH - MARGIN)
    up = verdict["higher_is_better"]
    better = "" if up else "; lower is better"
    drawn = [
        _panel(
            "chain-quality",
            metric.capitalize(),
            f"{metric.capitalize()} on the test examples after each stage{better}.",
            list(zip(names, scores, strict=True)),
            across,
            lambda value: f"{100 * value:.1f} %" if percent else f"{value:.4g}",
            lambda value: label(value, percent),
            up=up,
        )
    ]
    for key, name, caption, of in (
        ("size", "B", "Bytes of the weights, on a logarithmic axis.", _bytes),
        ("latency", "ms", "Median time of one example, on a logarithmic axis.", _time),
    ):
        found = [(n, of(step)) for n, step in zip(names, steps, strict=True) if step["cost"]]
        words = _unit(name)
        axis = _log_axis([value for _, value in found])
        title = "Size" if key == "size" else "Latency"
        drawn.append(_panel(f"chain-{key}", title, caption, found, axis, words, words, up=False))
    return drawn


def _bytes(step: Mapping[str, Any]) -> float:
    return float(step["cost"]["bytes"])


def _time(step: Mapping[str, Any]) -> float:
    return float(step["cost"]["latency"]["1"]["p50_ms"])


def _unit(name: str) -> Callable[[float], str]:
    return lambda value: unit(float(f"{value:.3g}"), name)


def _log_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.1)
    return Axis(low / room, high * room, MARGIN, WIDTH - MARGIN, log=True)


def _panel(
    key: str,
    title: str,
    caption: str,
    points: Sequence[Point],
    across: Axis,
    words: Callable[[float], str],
    tick_words: Callable[[float], str],
    *,
    up: bool,
) -> Drawing:
    """A row for each stage: a line from the value before it to a dot at its own."""
    bottom = ROW * len(points) + 8
    parts, end = [], 0.0
    for tick in across.ticks():
        x, said = across(tick), tick_words(tick)
        half = 3.3 * len(said)
        if x - half < end or x + half > WIDTH:
            continue
        end = x + half + 6
        parts.append(line(x, 6, x, bottom, "grid"))
        parts.append(text(said, x, bottom + 16, anchor="middle"))
    for index, (name, value) in enumerate(points):
        y, before = ROW * index + 30.0, points[max(index - 1, 0)][1]
        style = "teacher" if name == "teacher" else "distilled"
        tone = "good" if (value > before) == up else "bad"
        parts.append(text(clip(name, 30), 0, y - 12, "name"))
        parts.append(text(words(value), WIDTH, y - 12, "name", "end"))
        if value != before:
            parts.append(line(across(before), y, across(value), y, f"whisker stroke {tone}"))
        parts.append(tag("circle", cx=across(value), cy=y, r=5, class_=f"dot fill {style}"))
    told = ", ".join(f"{name} {words(value)}" for name, value in points)
    return Drawing(title, caption, canvas(key, f"{title} by stage: {told}", bottom + 22, *parts))
