"""The figure of several students: what the quality of each costs, in size and in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from attar.reporting.figures import BOTTOM, HEIGHT, LEFT, MARGIN, TOP, frame
from attar.reporting.placing import Box, Spot, placed, stairs
from attar.reporting.svg import (
    LETTER,
    WIDTH,
    Axis,
    canvas,
    clip,
    line,
    padded,
    shown,
    tag,
    text,
    unit,
)

FORMAT = "attar-verdicts/1"
TITLES = {"size": "size of the weights", "latency": "median time for one example"}
UNITS = {"size": "B", "latency": "ms"}
LETTERS = 22  # of a name in the drawing
NEAR = 28.0  # further away from its dot, a name is not seen to be of it
TALL = HEIGHT + 60
FAR = 8  # times the spread of the better half: what is further down is outside of the frame
ORDER = ("baseline", "teacher", "student")  # of drawing: what is judged lies on top


class Point(NamedTuple):
    """A model in the plane: what it costs, how good it is, and between which ends.

    ``number`` is that of the student, its own or the one it is the baseline of.
    """

    kind: str
    number: int
    name: str
    cost: float
    low: float
    value: float
    high: float


class Plane(NamedTuple):
    """A panel's points, those of the front, and its two axes."""

    points: list[Point]
    front: list[Point]
    across: Axis
    down: Axis

    def place(self, point: Point) -> tuple[float, float]:
        """Where a point lies; at the edge, where it is outside of the frame."""
        return self.across(point.cost), self.height(point.value)

    def height(self, value: float) -> float:
        """Where a value lies on the vertical axis."""
        return self.down(min(max(value, self.down.low), self.down.high))

    def outside(self, point: Point) -> bool:
        """Whether a point is too bad to be in the frame."""
        return not self.down.low <= point.value <= self.down.high


class Figure(NamedTuple):
    """Two panels of one vertical axis, and what they show."""

    panels: list[str]
    caption: str


def drawing(verdict: Mapping[str, Any]) -> Figure:
    """The metric against size and against latency: teacher, students, baselines and the front."""
    several = {axis: _points(verdict, axis) for axis in UNITS}
    if not all(several.values()):
        return Figure([], "")
    down = _down(verdict, [point for points in several.values() for point in points])
    planes = {
        axis: Plane(points, _front(verdict, axis, points), _across(points), down)
        for axis, points in several.items()
    }
    # The same words in both panels: names where there is room for all, else their numbers.
    spots = {axis: _labels(verdict, plane) for axis, plane in planes.items()}
    named = all(each is not None for each in spots.values())
    if not named:
        spots = {axis: _labels(verdict, plane, numbers=True) for axis, plane in planes.items()}
    panels = [_panel(verdict, axis, plane, spots[axis] or []) for axis, plane in planes.items()]
    return Figure(panels, _caption(verdict, planes["size"], named))


def _points(verdict: Mapping[str, Any], axis: str) -> list[Point]:
    """The teacher, then student and baseline of each verdict, as far as their cost is known."""
    found = []
    for number, student in enumerate(verdict["students"]):
        models = student["verdict"]["models"]
        own, base = student["cost"], (models.get("baseline") or {}).get("cost")
        if base and base["parameters"] == own["parameters"]:
            base = own  # the same model, which was timed in turns with the others
        roles = [("student", "distilled", own), ("baseline", "baseline", base)]
        if not number:
            roles.insert(0, ("teacher", "teacher", verdict["teacher"]))
        for kind, key, cost in roles:
            if not models.get(key) or not cost:
                continue
            ends = [models[key]["primary"][end] for end in ("low", "value", "high")]
            price = cost["bytes"] if axis == "size" else cost["latency"]["1"]["p50_ms"]
            if None not in ends and price > 0:
                name = "teacher" if kind == "teacher" else student["name"]
                found.append(Point(kind, number, name, float(price), *ends))
    return found


def _down(verdict: Mapping[str, Any], points: Sequence[Point]) -> Axis:
    """The vertical axis, of which a few that are far worse than the others do not set the scale."""
    sign = 1 if verdict["higher_is_better"] else -1
    values = sorted(sign * point.value for point in points)
    quarter, middle = values[len(values) // 4], values[len(values) // 2]
    spread = max(middle - quarter, values[-1] - middle, 0.01 * abs(middle))
    worst = middle - FAR * spread
    inside = [point for point in points if sign * point.value >= worst]
    ends = [e for p in inside for e in (p.value, *(p[4::2] if p.kind != "baseline" else ()))]
    low, high = padded(min(ends), max(ends), verdict["percent"])
    return Axis(low, high, TALL - BOTTOM, TOP)


def _front(verdict: Mapping[str, Any], axis: str, points: Sequence[Point]) -> list[Point]:
    front = verdict["front"][axis]
    own = [point for point in points if point.kind == "student" and point.number in front]
    return sorted(own, key=lambda point: point.cost)


def _across(points: Sequence[Point]) -> Axis:
    low, high = (end(point.cost for point in points) for end in (min, max))
    room = max((high / low) ** 0.1, 1.2)
    return Axis(low / room, high * room, LEFT, WIDTH - MARGIN, log=True)


def _labels(
    verdict: Mapping[str, Any], plane: Plane, *, numbers: bool = False
) -> list[Spot] | None:
    """Where the words of teacher and students stand; None where there is no room for them."""
    told = [point for point in plane.points if point.kind != "baseline"]
    words = []
    for point in told:
        word = str(point.number) if numbers and point.kind == "student" else point.name
        outside = f": {_value(point.value, verdict['percent'])}" if plane.outside(point) else ""
        words.append(clip(word, LETTERS) + outside)
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in map(plane.place, plane.points)]
    steps = stairs(map(plane.place, plane.front))
    for (x, y), (next_x, next_y) in pairwise(steps):
        taken.append(Box(min(x, next_x) - 1, min(y, next_y) - 1, next_x + 1, max(y, next_y) + 1))
    field = Box(LEFT + 2, TOP - 8, WIDTH, TALL - BOTTOM + 2)
    widths = [LETTER * len(word) for word in words]
    anchors = [plane.place(point) for point in told]
    return placed(words, widths, anchors, taken, field, most=None if numbers else NEAR)


def _panel(verdict: Mapping[str, Any], axis: str, plane: Plane, spots: Sequence[Spot]) -> str:
    percent, what = verdict["percent"], TITLES[axis]
    parts = frame(plane.across, plane.down, percent, UNITS[axis], f"{what}, logarithmic", TALL)
    if len(steps := stairs(map(plane.place, plane.front))) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        parts.append(tag("polyline", points=path, class_="ideal curve"))
    told = [point for point in plane.points if point.kind != "baseline"]
    for point, spot in zip(told, spots, strict=False):
        style = "teacher" if point.kind == "teacher" else "distilled"
        if spot.foot:
            parts.append(line(*spot.anchor, *spot.foot, f"thin stroke {style}"))
    for point in sorted(plane.points, key=lambda p: ORDER.index(p.kind)):
        parts += _mark(point, plane)
    for point, spot in zip(told, spots, strict=False):
        style = "teacher" if point.kind == "teacher" else "distilled"
        parts.append(text(spot.words, spot.box.left, spot.box.bottom - 2, f"name fill {style}"))
    values = ", ".join(
        f"{p.name} {_value(p.value, percent)} at {unit(p.cost, UNITS[axis])}" for p in told
    )
    said = f"{shown(verdict['metric'])} against {what}: {values}"
    return canvas(f"many-{axis}", said, TALL, *parts)


def _mark(point: Point, plane: Plane) -> list[str]:
    x, y = plane.place(point)
    style = {"student": "distilled"}.get(point.kind, point.kind)
    if plane.outside(point):
        way = 6 if y > TALL / 2 else -6  # to where it lies
        corners = f"{x - 5:.1f},{y - way:.1f} {x + 5:.1f},{y - way:.1f} {x:.1f},{y + way / 2:.1f}"
        filled = "ring stroke baseline" if point.kind == "baseline" else f"dot fill {style}"
        return [tag("polygon", points=corners, class_=filled)]
    if point.kind == "baseline":
        return [tag("circle", cx=x, cy=y, r=4, class_="ring stroke baseline")]
    ends = plane.height(point.low), plane.height(point.high)
    parts = [line(x, ends[0], x, ends[1], f"thin stroke {style}")]
    if point.kind == "teacher":
        box = tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_="fill teacher")
        return [*parts, box]
    return [*parts, tag("circle", cx=x, cy=y, r=4.5, class_="dot fill distilled")]


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _caption(verdict: Mapping[str, Any], plane: Plane, named: bool) -> str:
    kinds = {point.kind for point in plane.points}
    metric = shown(verdict["metric"]).capitalize()
    best = "Up" if verdict["higher_is_better"] else "Down"
    marks = ["Dots are the distilled students" + ("" if named else " with their numbers")]
    if "baseline" in kinds:
        marks.append("rings the same on labels alone")
    if "teacher" in kinds:
        marks.append("the square is the teacher")
    lines = [
        f"{metric} on the test examples with its 95 % interval, against the size of the weights "
        f"and the time for one example. {best} and to the left is better.",
        f"{', '.join(marks)}.",
    ]
    if any(len(front) > 1 for front in verdict["front"].values()):
        lines.append("The dashed line goes through those that no other student beats in both.")
    if any(map(plane.outside, plane.points)):
        lines.append("An arrow stands for one that lies far outside of the frame.")
    return " ".join(lines)
