"""Where lines and dots go in the page's drawings. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 400
ROLES = ("teacher", "baseline", "start", "distilled")
LEFT, RIGHT = 44, 12  # margins of the curves; the left one holds the numbers
TOP, BOTTOM, HEIGHT = 10, 34, 220
ROW, DOTS_MARGIN = 40, 16

Points = dict[tuple[str, int], dict[tuple[int, int], float]]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between *low* and *high*.

    >>> ticks(0.87, 0.98)
    [0.88, 0.9, 0.92, 0.94, 0.96, 0.98]
    """
    rough = (high - low) / about
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def label(value: float, percent: bool) -> str:
    """A number on an axis."""
    return f"{100 * value:.6g} %" if percent else f"{value:.6g}"


def role(name: str) -> str:
    """The drawing style of a model."""
    return name if name in ROLES else "other"


def dots(verdict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The primary metric of each model as a dot on its interval; None for a single model."""
    columns = verdict["table"]["columns"]
    found = [(column, verdict["models"][column["key"]]["primary"]) for column in columns]
    shown = [(c, p) for c, p in found if None not in (p["low"], p["value"], p["high"])]
    if len(shown) < 2:
        return None
    low = min(p["low"] for _, p in shown)
    high = max(p["high"] for _, p in shown)
    low, high = _padded(low, high, verdict["percent"])

    def place(value: float) -> float:
        inner = WIDTH - 2 * DOTS_MARGIN
        return round(DOTS_MARGIN + inner * (value - low) / (high - low), 1)

    lines = [
        {
            "title": column["title"],
            "role": role(column["key"]),
            "y": ROW * index + 30,
            **{end: place(primary[end]) for end in ("low", "value", "high")},
        }
        for index, (column, primary) in enumerate(shown)
    ]
    bottom = ROW * len(shown) + 12
    marks = [
        {"x": place(tick), "label": label(tick, verdict["percent"])} for tick in ticks(low, high, 5)
    ]
    return {"width": WIDTH, "height": bottom + 22, "bottom": bottom, "lines": lines, "ticks": marks}


def _padded(low: float, high: float, percent: bool) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    if percent:
        return max(0.0, low - room), min(1.0, high + room)
    return low - room, high + room


def by_arm(records: Iterable[Mapping[str, Any]], metric: str) -> Points:
    """The metric on validation by (arm, seed) and (stage, epoch); a repeated epoch counts last."""
    found: Points = {}
    for record in records:
        value, arm = record.get(metric), record.get("arm")
        seed, stage, epoch = record.get("seed", 0), record.get("stage", 0), record.get("epoch")
        if not (isinstance(seed, int) and isinstance(stage, int) and isinstance(epoch, int)):
            continue
        if isinstance(arm, str) and isinstance(value, int | float):
            found.setdefault((arm, seed), {})[(stage, epoch)] = float(value)
    return {key: points for key, points in found.items() if len(points) > 1}


def curves(points: Points, percent: bool) -> dict[str, Any] | None:
    """The metric over epochs, a line for each arm and seed; None when there is none."""
    if not points:
        return None
    values = [value for line in points.values() for value in line.values()]
    low, high = _padded(min(values), max(values), percent)
    longest = max(map(len, points.values()))

    def across(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (longest - 1), 1)

    def down(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    lines = []
    for (arm, _), line in points.items():
        path = " ".join(f"{across(i)},{down(line[key])}" for i, key in enumerate(sorted(line), 1))
        lines.append({"role": role(arm), "points": path})
    epochs = [epoch for epoch in ticks(1, longest, 5) if epoch == int(epoch)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "lines": lines,
        "arms": [{"title": arm, "role": role(arm)} for arm in dict.fromkeys(a for a, _ in points)],
        "across": [{"x": across(epoch), "label": f"{epoch:g}"} for epoch in epochs],
        "down": [{"y": down(tick), "label": label(tick, percent)} for tick in ticks(low, high)],
    }
