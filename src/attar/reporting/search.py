"""The figure of a search: the trials by metric, size and time, and those that none beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from attar.reporting.figures import BOTTOM, LEFT, MARGIN, TOP, frame
from attar.reporting.many import FAR, TALL, TITLES, UNITS, Figure
from attar.reporting.placing import Box, Spot, placed, stairs
from attar.reporting.svg import (
    LETTER,
    WIDTH,
    Axis,
    canvas,
    line,
    padded,
    shown,
    tag,
    text,
    unit,
)

FORMAT = "attar-search/1"
NEAR = 2.0  # times the dearest trial: a limit that is further off is not drawn
COSTS = {"size": "bytes", "latency": "latency_ms"}


class Point(NamedTuple):
    """A trial in the plane; the teacher has no number."""

    number: int | None
    cost: float
    score: float


class Plane(NamedTuple):
    """One panel: its points, the numbers of those on its front, and its axes."""

    points: list[Point]
    front: list[Point]
    winner: int | None
    across: Axis
    down: Axis

    def place(self, point: Point) -> tuple[float, float]:
        """Where a point lies; at the edge, where it is outside of the frame."""
        score = min(max(point.score, self.down.low), self.down.high)
        return self.across(point.cost), self.down(score)

    def outside(self, point: Point) -> bool:
        """Whether a point is too bad to be in the frame."""
        return not self.down.low <= point.score <= self.down.high


def drawing(search: Mapping[str, Any]) -> Figure:
    """The metric against size and against time; nothing before two trials are finished."""
    several = {axis: _points(search, key) for axis, key in COSTS.items()}
    if sum(point.number is not None for point in several["size"]) < 2:
        return Figure([], "")
    down = _down(search, several["size"])
    planes = {axis: _plane(search, axis, points, down) for axis, points in several.items()}
    panels = [_panel(search, axis, plane) for axis, plane in planes.items()]
    return Figure(panels, _caption(search, planes["size"]))


def _points(search: Mapping[str, Any], key: str) -> list[Point]:
    found = [
        Point(trial["number"], float(trial["cost"][key]), trial["score"])
        for trial in search["trials"]
        if trial["state"] == "finished" and trial["same_as"] is None and trial["cost"][key] > 0
    ]
    if (teacher := search["teacher"]) is not None and teacher["cost"][key] > 0:
        found.append(Point(None, float(teacher["cost"][key]), teacher["score"]))
    return found


def _down(search: Mapping[str, Any], points: Sequence[Point]) -> Axis:
    """The vertical axis, of which a few that are far worse than the others do not set the scale."""
    sign = 1 if search["higher_is_better"] else -1
    values = sorted(sign * point.score for point in points)
    quarter, middle = values[len(values) // 4], values[len(values) // 2]
    worst = middle - FAR / 2 * max(middle - quarter, values[-1] - middle, 0.01 * abs(middle))
    inside = [sign * value for value in values if value >= worst]
    if search["goal"] is not None and sign * search["goal"]["score"] >= worst:
        inside.append(search["goal"]["score"])
    return Axis(*padded(min(inside), max(inside), search["percent"]), TALL - BOTTOM, TOP)


def _plane(search: Mapping[str, Any], axis: str, points: list[Point], down: Axis) -> Plane:
    costs = [point.cost for point in points]
    limit = (search["goal"] or {}).get(axis)
    if limit and min(costs) / NEAR < limit < max(costs) * NEAR:  # else it would squeeze the dots
        costs.append(limit)
    room = max((max(costs) / min(costs)) ** 0.1, 1.2)
    across = Axis(min(costs) / room, max(costs) * room, LEFT, WIDTH - MARGIN, log=True)
    front = [point for point in points if point.number in search["front"][axis]]
    winner = None if search["winner"] is None else search["winner"]["number"]
    return Plane(points, sorted(front, key=lambda point: point.cost), winner, across, down)


def _panel(search: Mapping[str, Any], axis: str, plane: Plane) -> str:
    percent, what = search["percent"], TITLES[axis]
    parts = frame(plane.across, plane.down, percent, UNITS[axis], f"{what}, logarithmic", TALL)
    parts += _goal(search, axis, plane)
    steps = stairs(map(plane.place, plane.front))
    if len(steps) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        parts.append(tag("polyline", points=path, class_="ideal curve"))
    for point in sorted(plane.points, key=lambda p: (p in plane.front, p.number == plane.winner)):
        parts += _mark(point, plane)
    for spot, style in _labels(plane, steps):
        if spot.foot:
            parts.append(line(*spot.anchor, *spot.foot, f"thin stroke {style}"))
        parts.append(text(spot.words, spot.box.left, spot.box.bottom - 2, f"name fill {style}"))
    values = ", ".join(
        f"trial {p.number} {_value(p.score, percent)} at {unit(p.cost, UNITS[axis])}"
        for p in plane.front
    )
    said = f"{shown(search['metric'])} against {what}; on the front: {values}"
    return canvas(f"search-{axis}", said, TALL, *parts)


def _goal(search: Mapping[str, Any], axis: str, plane: Plane) -> list[str]:
    """What the goal asks for, as lines across the panel."""
    goal = search["goal"]
    if goal is None:
        return []
    parts = []
    if plane.down.low <= goal["score"] <= plane.down.high:
        y = plane.down(goal["score"])
        parts.append(line(LEFT, y, WIDTH - MARGIN, y, "thin stroke other"))
        parts.append(text("goal", LEFT + 4, y - 4, "fill other"))
    if axis in goal and plane.across.low <= goal[axis] <= plane.across.high:
        x = plane.across(goal[axis])
        parts.append(line(x, TOP, x, TALL - BOTTOM, "thin stroke other"))
    return parts


def _mark(point: Point, plane: Plane) -> list[str]:
    x, y = plane.place(point)
    if point.number is None:
        return [tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_="fill teacher")]
    if plane.outside(point):
        way = 6 if y > TALL / 2 else -6  # to where it lies
        corners = f"{x - 4:.1f},{y - way:.1f} {x + 4:.1f},{y - way:.1f} {x:.1f},{y + way / 2:.1f}"
        return [tag("polygon", points=corners, class_="ring stroke distilled")]
    if point.number == plane.winner:
        ring = tag("circle", cx=x, cy=y, r=8.5, class_="ring stroke distilled")
        return [ring, tag("circle", cx=x, cy=y, r=4.5, class_="dot fill distilled")]
    if point in plane.front:
        return [tag("circle", cx=x, cy=y, r=4.5, class_="dot fill distilled")]
    return [tag("circle", cx=x, cy=y, r=3, class_="ring stroke distilled thin")]


def _labels(plane: Plane, steps: Sequence[tuple[float, float]]) -> list[tuple[Spot, str]]:
    """Words beside the winner, the teacher and the front; as many as there is room for."""
    told = [p for p in plane.points if p.number is None or p in plane.front]
    told.sort(key=lambda p: (p.number != plane.winner, p.number is not None, p.cost))
    if plane.winner is not None and all(p.number != plane.winner for p in told):
        told = [p for p in plane.points if p.number == plane.winner] + told
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in map(plane.place, plane.points)]
    for (x, y), (next_x, next_y) in pairwise(steps):
        taken.append(Box(min(x, next_x) - 1, min(y, next_y) - 1, next_x + 1, max(y, next_y) + 1))
    field = Box(LEFT + 2, TOP - 8, WIDTH, TALL - BOTTOM + 2)
    found: list[tuple[Spot, str]] = []
    for point in told:
        word = "teacher" if point.number is None else str(point.number)
        if point.number is not None and point.number == plane.winner:
            word = f"{word}, the winner"
        place = plane.place(point)
        full = taken + [spot.box for spot, _ in found]
        spots = placed([word], [LETTER * len(word)], [place], full, field, most=60.0)
        style = "teacher" if point.number is None else "distilled"
        found += [(spot, style) for spot in spots or ()]
    return found


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _caption(search: Mapping[str, Any], plane: Plane) -> str:
    metric = shown(search["metric"]).capitalize()
    best = "Up" if search["higher_is_better"] else "Down"
    teacher = any(point.number is None for point in plane.points)
    lines = [
        f"{metric} on the validation examples, against the size of the weights and the time for "
        f"one example. {best} and to the left is better. Circles are the finished trials"
        f"{', the square is the teacher' if teacher else ''}. Filled, and with their numbers, are "
        "those that no other trial beats in both; the dashed line goes through them.",
    ]
    if plane.winner is not None:
        lines.append("The winner has a ring.")
    if search["goal"] is not None:
        lines.append("The plain lines are the goal.")
    if any(map(plane.outside, plane.points)):
        lines.append("An arrow stands for a trial that lies far outside of the frame.")
    return " ".join(lines)
