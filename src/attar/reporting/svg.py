"""Drawings as text: elements whose every part is escaped, axes, and labels that do not collide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH = 360  # what a telephone shows at full size
ROLES = ("teacher", "baseline", "start", "distilled")
LETTER = 6.6  # about the width of one at the size of labels
LINE = 13


class Drawing(NamedTuple):
    """One figure: its title, a sentence that says what is to be seen, and its SVG elements."""

    title: str
    caption: str
    svg: str


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element around *children*, which are elements; ``class_`` and ``x_y`` are ``class``, x-y.

    >>> tag("circle", cx=1.234567, class_="dot")
    '<circle cx="1.2" class="dot"/>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>"


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{round(value, 1):g}"
    return escape(str(value))


def text(words: str, x: float, y: float, class_: str | None = None, anchor: str = "start") -> str:
    """Words at a place."""
    where = None if anchor == "start" else anchor
    return tag("text", escape(words), x=float(x), y=float(y), class_=class_, text_anchor=where)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def canvas(key: str, label: str, height: float, *children: str, width: float = WIDTH) -> str:
    """The SVG element of the id ``figure-KEY``, which screen readers call *label*."""
    named = tag("title", escape(label), id=f"figure-{key}-title")
    return tag(
        "svg",
        named,
        *children,
        id=f"figure-{key}",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"figure-{key}-title",
    )


def clip(words: str, most: int) -> str:
    """The words, or their beginning.

    >>> clip("a long name", 7)
    'a long…'
    """
    return words if len(words) <= most else words[: most - 1] + "…"


def role(name: str) -> str:
    """The drawing style of a model."""
    return name if name in ROLES else "other"


def shown(name: str) -> str:
    """What a model or a metric is called in a drawing."""
    return "before distillation" if name == "start" else name.replace("_", " ")


@dataclass(frozen=True)
class Axis:
    """From values in [low, high] to places in [first, last] of the drawing."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where *value* lies."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.first + (self.last - self.first) * (value - low) / (high - low)

    def ticks(self, about: int = 4) -> list[float]:
        """Round values on the axis."""
        if self.log and self.high / self.low >= 4:
            return log_ticks(self.low, self.high, about)
        return ticks(self.low, self.high, about)


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


def log_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Powers of ten between *low* and *high*, with 2 and 5 of each where those are few.

    >>> log_ticks(0.02, 3), log_ticks(1, 1e8)
    ([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0], [1.0, 100.0, 10000.0, 1000000.0, 100000000.0])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    many = last - first > 3
    stride = max(1, round((last - first) / about)) if many else 1
    factors = (1,) if many else (1, 2, 5)
    found = (float(f"{f}e{p}") for p in range(first, last + 1, stride) for f in factors)
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def padded(
    low: float, high: float, percent: bool = False, share: float = 0.06
) -> tuple[float, float]:
    """The ends of an axis that holds [low, high] with some room; shares stay within 0 and 1."""
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    if percent:
        return max(0.0, low - room), min(1.0, high + room)
    return low - room, high + room


def label(value: float, percent: bool = False) -> str:
    """A number on an axis.

    >>> label(0.925, percent=True), label(0.3), label(1e-7)
    ('92.5 %', '0.3', '1e-07')
    """
    return f"{100 * value:.6g} %" if percent else f"{value:.6g}"


def unit(value: float, name: str) -> str:
    """A large number in thousands, millions or billions of a unit.

    >>> unit(2e5, "B"), unit(0.5, "ms"), unit(1e9, "B"), unit(1500, "ms")
    ('200 kB', '0.5 ms', '1 GB', '1.5 s')
    """
    if name == "ms" and value >= 1e3:
        return f"{value / 1e3:.4g} s"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {prefix}{name}"
    return f"{value:.4g} {name}"


def apart(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Places near the wanted ones, in the same order, at least *gap* apart, within [low, high].

    >>> apart([50.0, 50.0, 10.0], 0, 100)
    [50.0, 63.0, 10.0]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    last = low - gap
    for index in order:
        last = placed[index] = max(placed[index], last + gap)
    edge = high + gap
    for index in reversed(order):
        edge = placed[index] = min(placed[index], edge - gap)
    return placed
