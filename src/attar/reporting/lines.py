"""Curves of training: a line for a mean over the seeds, in a band from lowest to highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attar.reporting.svg import (
    LETTER,
    WIDTH,
    Axis,
    Drawing,
    apart,
    canvas,
    clip,
    label,
    line,
    padded,
    role,
    shown,
    tag,
    text,
)

HEIGHT, TOP, BOTTOM, LEFT = 236, 10, 34, 46
MOST_LINES, MOST_LETTERS = 10, 17
EARLY = 3  # the share of the epochs that may lie outside the frame: a third
MANY_TIMES = 20  # from this ratio on a linear axis hides the small values
TERMS = 4  # the template has a colour for each

Point = tuple[float, float, float, float]


class Line(NamedTuple):
    """One curve: its name beside it, its style and its points (epoch, mean, lowest, highest)."""

    name: str
    style: str
    points: list[Point]


def validation(figures: Mapping[str, Any], verdict: Mapping[str, Any]) -> Drawing | None:
    """The metric on validation rows after each epoch, of every model that was trained."""
    lines = [
        Line(shown(one["arm"]), role(one["arm"]), _points(one)) for one in figures["validation"]
    ]
    if not (lines := [one for one in lines if len(one.points) > 1]):
        return None
    longest = max(one.points[-1][0] for one in lines)
    # Where the first epochs set the scale, the end of all lines is one stroke: leave them out.
    means = [(p[0] > longest / EARLY, p[1]) for one in lines for p in one.points]
    low, high = (end(mean for late, mean in means if late) for end in (min, max))
    low, high = padded(low, high, verdict["percent"])
    outside = any(not low <= mean <= high for _, mean in means)
    axis = Axis(low, high, HEIGHT - BOTTOM, TOP)
    metric = shown(verdict["metric"])
    higher = "Higher" if verdict["higher_is_better"] else "Lower"
    caption = (
        f"{metric.capitalize()} on validation data after each epoch{_spread(figures['validation'])}"
        f". {higher} is better.{' The first epochs lie outside the frame.' if outside else ''}"
    )
    return Drawing(
        "How the models learn",
        caption,
        _drawn("validation", f"{metric} on validation data", lines, axis, verdict["percent"]),
    )


def loss(figures: Mapping[str, Any]) -> Drawing | None:
    """Every loss term of the students over the epochs."""
    lines, number = [], 0
    for one in figures["loss"]:
        own = one["arm"] == "distilled"
        style = f"term-{number % TERMS}" if own else role(one["arm"])
        number += own
        name = shown(one["term"]) + ("" if own else f", {shown(one['arm'])}")
        lines.append(Line(name, style, _points(one)))
    lines = [one for one in lines if len(one.points) > 1][:MOST_LINES]
    if not lines:
        return None
    low = min(p[2] for one in lines for p in one.points)
    high = max(p[3] for one in lines for p in one.points)
    log = low > 0 and high / low > MANY_TIMES
    ends = (low / 1.1, high * 1.1) if log else padded(low, high)
    if low >= 0 and not log:
        ends = max(0.0, ends[0]), ends[1]
    axis = Axis(*ends, HEIGHT - BOTTOM, TOP, log=log)
    caption = (
        f"Each term of the training loss, before its weight, as a mean over each epoch"
        f"{_spread(figures['loss'])}.{' The axis is logarithmic.' if log else ''}"
    )
    return Drawing(
        "What the training loss is made of",
        caption,
        _drawn("loss", "the terms of the training loss", lines, axis, percent=False),
    )


def _points(one: Mapping[str, Any]) -> list[Point]:
    return [(p[0], p[1], p[2], p[3]) for p in one["points"] if None not in p]


def _spread(lines: Sequence[Mapping[str, Any]]) -> str:
    if max(one["seeds"] for one in lines) == 1:
        return ""
    return ": the line is the mean of the seeds, the band goes from the lowest to the highest"


def _drawn(key: str, what: str, lines: Sequence[Line], down: Axis, percent: bool) -> str:
    longest = max(one.points[-1][0] for one in lines)
    names = [clip(one.name, MOST_LETTERS) for one in lines]
    right = WIDTH - 10 - LETTER * max(map(len, names))
    across = Axis(1, longest, LEFT, right)
    frame = [*_grid(down, right, percent), *_epochs(across, right)]
    wanted = [down(one.points[-1][1]) + 4 for one in lines]
    heights = apart(wanted, TOP + 6, HEIGHT - BOTTOM)
    labels = [
        text(name, right + 6, y, f"name fill {one.style}")
        for name, y, one in zip(names, heights, lines, strict=True)
    ]
    curves = [_band(one, across, down) for one in lines] + [_curve(o, across, down) for o in lines]
    # An SVG within the SVG cuts off what lies outside of it; a clip path would need a url().
    size = f"{LEFT} {TOP - 4} {right - LEFT + 2:g} {HEIGHT - BOTTOM - TOP + 6}".split()
    box = dict(zip(("x", "y", "width", "height"), size, strict=True))
    cut = tag("svg", *curves, viewBox=" ".join(size), **box)
    ends = ", ".join(f"{one.name} ends at {_rounded(one.points[-1][1], percent)}" for one in lines)
    said = f"{what} over {longest:g} epochs: {ends}"
    return canvas(key, said, HEIGHT, *frame, cut, *labels)


def _rounded(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _grid(down: Axis, right: float, percent: bool) -> list[str]:
    parts = []
    for tick in down.ticks():
        parts.append(line(LEFT, down(tick), right, down(tick), "grid"))
        parts.append(text(label(tick, percent), LEFT - 6, down(tick) + 4, anchor="end"))
    return parts


def _epochs(across: Axis, right: float) -> list[str]:
    whole = [tick for tick in across.ticks(5) if tick == int(tick)]
    parts = [
        text(label(tick), across(tick), HEIGHT - BOTTOM + 16, anchor="middle") for tick in whole
    ]
    return [*parts, text("epoch", right, HEIGHT - 4, anchor="end")]


def _band(one: Line, across: Axis, down: Axis) -> str:
    if all(p[2] == p[3] for p in one.points):
        return ""
    top = [f"{across(p[0]):.1f},{down(p[3]):.1f}" for p in one.points]
    bottom = [f"{across(p[0]):.1f},{down(p[2]):.1f}" for p in reversed(one.points)]
    return tag("polygon", points=" ".join(top + bottom), class_=f"band fill {one.style}")


def _curve(one: Line, across: Axis, down: Axis) -> str:
    points = " ".join(f"{across(p[0]):.1f},{down(p[1]):.1f}" for p in one.points)
    return tag("polyline", points=points, class_=f"curve stroke {one.style}")
