"""Words beside dots: each as near to its own as it can be, on nothing that is there already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

HIGH = 12.0  # of a line of words
CLOSE = 8.0  # from the middle of a dot to its word
STEP = 5.0
# Where a word is looked for around its dot: to the right first, as one reads.
TURNS = (0, 180, 270, 90, 315, 45, 225, 135, 337.5, 22.5, 202.5, 157.5, 292.5, 67.5, 247.5, 112.5)


class Box(NamedTuple):
    """A rectangle; *top* is above *bottom*, so smaller."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have a point in common."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)

    def within(self, other: Box) -> bool:
        """Whether this one lies in the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


class Spot(NamedTuple):
    """Words, the box they fill, their dot, and where a line from the dot meets the box.

    ``foot`` is None where the words stand close enough to need no line.
    """

    words: str
    box: Box
    anchor: tuple[float, float]
    foot: tuple[float, float] | None


def placed(
    words: Sequence[str],
    widths: Sequence[float],
    anchors: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    field: Box,
    *,
    most: float | None = None,
) -> list[Spot] | None:
    """Find a place in the *field* for each of the words, around its anchor.

    Args:
        widths: of the words.
        taken: what no word may lie on, the dots among it.
        most: how far from its anchor a word may stand; anywhere in the field when left out.

    Returns:
        None where there is no such place for one of them.
    """
    full, found = list(taken), []
    furthest = most if most is not None else math.hypot(field.right, field.bottom)
    for each, width, anchor in zip(words, widths, anchors, strict=True):
        spot = _free(each, width, anchor, full, field, furthest)
        if spot is None:
            return None
        full.append(spot.box)
        found.append(spot)
    return found


def _free(
    words: str,
    width: float,
    anchor: tuple[float, float],
    full: Sequence[Box],
    field: Box,
    furthest: float,
) -> Spot | None:
    away = CLOSE
    while away <= furthest:
        for turn in TURNS:
            box = _around(anchor, width, away, turn)
            if box.within(field) and not any(box.meets(other) for other in full):
                return Spot(words, box, anchor, _foot(box, anchor) if away > CLOSE + STEP else None)
        away += STEP
    return None


def _around(anchor: tuple[float, float], width: float, away: float, turn: float) -> Box:
    """The box whose nearest point lies about *away* from the anchor, in that direction."""
    x, y = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    left = anchor[0] + away * x - width * (1 - x) / 2
    top = anchor[1] + away * y - HIGH * (1 - y) / 2
    return Box(left, top, left + width, top + HIGH)


def _foot(box: Box, anchor: tuple[float, float]) -> tuple[float, float]:
    """The point of the box nearest to the anchor."""
    return (
        min(max(anchor[0], box.left), box.right),
        min(max(anchor[1], box.top), box.bottom),
    )


def stairs(spots: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The best that is to be had at each cost: a step at each model of the front, in order."""
    corners: list[tuple[float, float]] = []
    for x, y in spots:
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return corners
