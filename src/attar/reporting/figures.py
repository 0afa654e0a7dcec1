"""The figures of the finished models: quality, cost, classes and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attar.reporting import lines
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
    ticks,
    unit,
)

MARGIN, ROW = 20, 40
HEIGHT, TOP, BOTTOM, LEFT = 220, 14, 38, 46
CLASS_ROW = 20
NEAR = 30  # dots this close have their names on one side
SQUARE = 180  # a reliability diagram, three of which stand side by side
EMPTY: dict[str, Any] = {
    "validation": [],
    "loss": [],
    "classes": None,
    "calibration": {},
    "disagreements": None,
}


def drawings(verdict: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Drawing | None]:
    """Every figure by its name; None where this run has no numbers for it."""
    return {
        "models": models(verdict),
        "size": against_cost(verdict, "size"),
        "latency": against_cost(verdict, "latency"),
        "validation": lines.validation(figures, verdict),
        "loss": lines.loss(figures),
        "classes": classes(figures, verdict),
        "calibration": calibration(figures, verdict),
    }


class Model(NamedTuple):
    """A model as a drawing knows it, with the ends of its interval."""

    key: str
    title: str
    low: float
    value: float
    high: float


def _models(verdict: Mapping[str, Any]) -> list[Model]:
    found = []
    for column in verdict["table"]["columns"]:
        primary = verdict["models"][column["key"]]["primary"]
        ends = [primary[end] for end in ("low", "value", "high")]
        if None not in ends:
            found.append(Model(column["key"], column["title"], *ends))
    return found


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _better(verdict: Mapping[str, Any]) -> str:
    return "" if verdict["higher_is_better"] else " Lower is better."


def models(verdict: Mapping[str, Any]) -> Drawing | None:
    """The primary metric of each model as a dot on its interval; None for a single model."""
    found, percent = _models(verdict), verdict["percent"]
    if len(found) < 2:
        return None
    ends = padded(min(m.low for m in found), max(m.high for m in found), percent)
    across = Axis(*ends, MARGIN, WIDTH - MARGIN)
    bottom = ROW * len(found) + 12
    parts = []
    for tick in across.ticks(5):
        parts.append(line(across(tick), 14, across(tick), bottom, "grid"))
        parts.append(text(label(tick, percent), across(tick), bottom + 16, anchor="middle"))
    for index, model in enumerate(found):
        y, style = ROW * index + 30.0, role(model.key)
        parts += [
            text(clip(model.title, 40), 0, y - 14, "name"),
            text(_value(model.value, percent), WIDTH, y - 14, "name", "end"),
            line(across(model.low), y, across(model.high), y, f"whisker stroke {style}"),
            tag("circle", cx=across(model.value), cy=y, r=5, class_=f"dot fill {style}"),
        ]
    metric = shown(verdict["metric"])
    values = ", ".join(f"{m.title} {_value(m.value, percent)}" for m in found)
    caption = (
        f"{metric.capitalize()} on the test examples. The dot is what was measured; the line is "
        f"where the truth lies with 95 % confidence.{_better(verdict)}"
    )
    said = f"{metric} of each model: {values}"
    return Drawing("The models side by side", caption, canvas("models", said, bottom + 22, *parts))


def against_cost(verdict: Mapping[str, Any], key: str) -> Drawing | None:
    """The primary metric over the size (bytes) or the latency (ms for one example)."""
    costs = {
        m.key: _cost(verdict["models"][m.key]["cost"], key)
        for m in _models(verdict)
        if verdict["models"][m.key]["cost"] is not None
    }
    found = [m for m in _models(verdict) if (costs.get(m.key) or 0) > 0]
    if len(found) < 2:
        return None
    percent, name = verdict["percent"], "B" if key == "size" else "ms"
    low, high = (end(costs[m.key] for m in found) for end in (min, max))
    log = high / low > 5
    room = (high / low) ** 0.12 if log else 1.0
    ends = (low / room, high * room) if log else padded(low, high, share=0.25)
    across = Axis(*ends, LEFT, WIDTH - MARGIN, log=log)
    ends = padded(min(m.low for m in found), max(m.high for m in found), percent)
    down = Axis(*ends, HEIGHT - BOTTOM, TOP)
    what = "size of the weights" if key == "size" else "time for one example"
    parts = frame(across, down, percent, name, what + (", logarithmic" if log else ""))
    places = _places([across(costs[m.key]) for m in found])
    parts += _spots(found, places, down)
    metric = shown(verdict["metric"])
    best = "Up" if verdict["higher_is_better"] else "Down"
    caption = f"{metric.capitalize()} with its 95 % interval against {what}. {best} and to the left"
    values = ", ".join(
        f"{m.title} {_value(m.value, percent)} at {unit(costs[m.key], name)}" for m in found
    )
    title = "Quality against size" if key == "size" else "Quality against latency"
    drawn = canvas(key, f"{metric} against {what}: {values}", HEIGHT, *parts)
    moved = any(x != across(costs[m.key]) for m, x in zip(found, places, strict=True))
    aside = f" Dots of (nearly) equal {key} are moved apart." if moved else ""
    return Drawing(title, f"{caption} is better.{aside}", drawn)


def _cost(cost: Mapping[str, Any], key: str) -> float:
    return float(cost["bytes"] if key == "size" else cost["latency"]["1"]["p50_ms"])


def frame(
    across: Axis, down: Axis, percent: bool, name: str, what: str, height: float = HEIGHT
) -> list[str]:
    """The grid, the ticks and the words of a drawing of a metric against a cost."""
    parts = []
    for tick in down.ticks():
        parts.append(line(LEFT, down(tick), WIDTH - MARGIN, down(tick), "grid"))
        parts.append(text(label(tick, percent), LEFT - 6, down(tick) + 4, anchor="end"))
    end = 0.0
    for tick in across.ticks():
        x, words = across(tick), unit(tick, name)
        half = LETTER * len(words) / 2
        if x - half < end + LETTER or x + half > WIDTH:  # no room beside the one before
            continue
        end = x + half
        parts.append(line(x, height - BOTTOM, x, height - BOTTOM + 4, "grid"))
        parts.append(text(words, x, height - BOTTOM + 16, anchor="middle"))
    return [*parts, text(what, WIDTH - MARGIN, height - 6, anchor="end")]


def _places(wanted: Sequence[float]) -> list[float]:
    """Where dots stand across: what would hide another is moved to the right of it."""
    places: list[float] = []
    for x in wanted:
        while any(abs(x - other) < 9 for other in places):
            x += 9
        places.append(x)
    return places


def _spots(found: Sequence[Model], places: Sequence[float], down: Axis) -> list[str]:
    """A dot on its interval for each model, its name beside it."""
    heights = apart([down(m.value) + 4 for m in found], TOP + 6, HEIGHT - BOTTOM)
    marks, labels = [], []
    names = [clip(model.title, 22) for model in found]
    room = 9 + LETTER * max(map(len, names))
    for model, name, x, y in zip(found, names, places, heights, strict=True):
        style = role(model.key)
        near = [place for place in places if abs(place - x) < NEAR]
        leftward = max(near) + room > WIDTH
        where, anchor = (min(near) - 9, "end") if leftward else (max(near) + 9, "start")
        marks += [
            line(x, down(model.low), x, down(model.high), f"whisker stroke {style}"),
            tag("circle", cx=x, cy=down(model.value), r=5, class_=f"dot fill {style}"),
        ]
        labels.append(text(name, where, y, f"name fill {style}", anchor))
    return marks + labels  # a name may lie on the interval of another model


def classes(figures: Mapping[str, Any], verdict: Mapping[str, Any]) -> Drawing | None:
    """What distillation changed in each class: from the baseline's dot to the student's."""
    told = figures["classes"]
    if not told or not told["rows"]:
        return None
    rows, percent = told["rows"], verdict["percent"]
    names = [clip(row["name"], 16) for row in rows]
    left = 16 + LETTER * max(map(len, names))
    values = [row[end] for row in rows for end in ("before", "after", "teacher")]
    known = [value for value in values if value is not None]
    across = Axis(*padded(min(known), max(known), percent), left, WIDTH - 62)
    bottom = 24 + CLASS_ROW * len(rows)
    parts = []
    for tick in across.ticks(4):
        parts.append(line(across(tick), 20, across(tick), bottom, "grid"))
        parts.append(text(label(tick, percent), across(tick), bottom + 16, anchor="middle"))
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        parts += _class_row(row, name, 34.0 + CLASS_ROW * index, across, percent)
    parts.append(text("change", WIDTH, 12, anchor="end"))
    metric, against = shown(verdict["metric"]), shown(told["against"])
    some = len(rows) < told["of"]
    which = f"the {len(rows)} of {told['of']:,} classes that changed most" if some else "each class"
    caption = (
        f"{metric.capitalize()} of {which}, from the {against} (ring) to the distilled student "
        f"(dot){'; the small stroke is the teacher' if rows[0]['teacher'] is not None else ''}. "
        "Classes that gained most come first."
    )
    caption = caption.replace("the before distillation", "the student before distillation")
    said = f"{metric} of {which}, {against} and distilled; the numbers are in the table"
    drawn = canvas("classes", said, bottom + 22, *parts)
    return Drawing("What changed for each class", caption, drawn)


def _class_row(
    row: Mapping[str, Any], name: str, y: float, across: Axis, percent: bool
) -> list[str]:
    before, after, change = across(row["before"]), across(row["after"]), row["change"]
    gain = f"{100 * change:+.1f}" if percent else f"{change:+.3g}"
    parts = [
        text(name, 0, y + 4, "name"),
        line(before, y, after, y, "change"),
        tag("circle", cx=before, cy=y, r=4.5, class_="ring stroke baseline"),
        tag("circle", cx=after, cy=y, r=4.5, class_="dot fill distilled"),
        text(gain if change else "0", WIDTH, y + 4, "name", "end"),
    ]
    if row["teacher"] is not None:
        place = across(row["teacher"])
        parts.insert(1, line(place, y - 7, place, y + 7, "whisker stroke teacher"))
    return parts


def calibration(figures: Mapping[str, Any], verdict: Mapping[str, Any]) -> Drawing | None:
    """A reliability diagram of each model: how often it is right when it is that sure."""
    squares = [
        _square(index, name, bins, verdict["models"].get(name) or {})
        for index, (name, bins) in enumerate(figures["calibration"].items())
        if bins
    ]
    if not squares:
        return None
    caption = (
        "How often an answer is right (upward) against how sure the model was of it (to the "
        "right), both in percent; a larger dot stands for more answers. On the dashed line, the "
        "model is as sure as it should be; below it, too sure."
    )
    return Drawing("How far its confidence can be trusted", caption, "".join(squares))


def _square(
    index: int, name: str, bins: Sequence[Mapping[str, float]], model: Mapping[str, Any]
) -> str:
    left, right, top, bottom = 26.0, SQUARE - 10.0, 26.0, SQUARE - 8.0
    across, down = Axis(0, 1, left, right), Axis(0, 1, bottom, top)
    error = (model.get("scores") or {}).get("calibration_error")
    parts = [text(clip(shown(name), 18), 0, 12, f"name fill {role(name)}")]
    if error is not None:
        parts.append(text(f"error {100 * error:.1f} %", SQUARE - 8, 12, anchor="end"))
    for tick in ticks(0, 1, 2):
        parts.append(line(left, down(tick), right, down(tick), "grid"))
        parts.append(text(f"{100 * tick:g}", left - 5, down(tick) + 4, anchor="end"))
        parts.append(text(f"{100 * tick:g}", across(tick), bottom + 14, anchor="middle"))
    parts.append(line(left, bottom, right, top, "ideal"))
    places = [(across(b["confidence"]), down(b["accuracy"]), b["share"]) for b in bins]
    ideal = [down((x - left) / (right - left)) for x, _, _ in places]
    parts += [
        line(x, y, x, goal, f"thin stroke {role(name)}")
        for (x, y, _), goal in zip(places, ideal, strict=True)
    ]
    parts += [
        tag("circle", cx=x, cy=y, r=2 + 6 * share**0.5, class_=f"dot fill {role(name)}")
        for x, y, share in places
    ]
    said = f"reliability of {shown(name)}" + (
        "" if error is None else f": calibration error {100 * error:.1f} %"
    )
    return canvas(f"calibration-{index}", said, SQUARE + 10, *parts, width=SQUARE)
