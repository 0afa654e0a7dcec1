"""Dots and lines lie where the numbers say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attar.reporting import figures


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.87, 0.98, [0.88, 0.9, 0.92, 0.94, 0.96, 0.98]),
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 17.0, [0.0, 5.0, 10.0, 15.0]),
        (2.0, 2.0, [2.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert figures.ticks(low, high) == expected


def test_labels() -> None:
    assert figures.label(0.925, percent=True) == "92.5 %"
    assert figures.label(0.3, percent=False) == "0.3"


def test_dots_lie_in_proportion(verdict: Callable[..., dict[str, Any]]) -> None:
    told = verdict()
    drawn = figures.dots(told)
    assert drawn is not None
    lines = {line["role"]: line for line in drawn["lines"]}
    assert list(lines) == ["teacher", "baseline", "distilled"]
    where = {name: told["models"][name]["primary"] for name in lines}
    span = lines["teacher"]["value"] - lines["baseline"]["value"]
    assert span > 0
    share = (lines["distilled"]["value"] - lines["baseline"]["value"]) / span
    assert share == pytest.approx(15 / 18, abs=0.005)
    for name, line in lines.items():
        assert 0 <= line["low"] <= line["value"] <= line["high"] <= drawn["width"]
        assert where[name]["low"] <= where[name]["value"]


def test_curves_follow_stages_and_epochs() -> None:
    records = [
        {"arm": "distilled", "seed": 1, "stage": 1, "epoch": 0, "accuracy": 0.9},
        {"arm": "distilled", "seed": 1, "stage": 0, "epoch": 1, "accuracy": 0.1},
        {"arm": "distilled", "seed": 1, "stage": 0, "epoch": 0, "accuracy": 0.5},
        {"arm": "distilled", "seed": 1, "stage": 0, "epoch": 1, "accuracy": 0.7},  # said again
        {"arm": "teacher", "epoch": 0, "accuracy": 0.9},  # one point is no line
        {"arm": "distilled", "seed": 1, "epoch": "2", "accuracy": 0.9},
    ]
    points = figures.by_arm(records, "accuracy")
    assert points == {("distilled", 1): {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.9}}
    drawn = figures.curves(points, percent=True)
    assert drawn is not None
    pairs = [tuple(map(float, pair.split(","))) for pair in drawn["lines"][0]["points"].split()]
    across, down = zip(*pairs, strict=True)
    assert across[0] == figures.LEFT
    assert across[2] == figures.WIDTH - figures.RIGHT
    assert across[1] == pytest.approx((across[0] + across[2]) / 2, abs=0.1)
    assert down[0] > down[2], "a better epoch lies higher"
    assert down[0] - down[1] == pytest.approx(down[1] - down[2], abs=0.2)
    assert [tick["label"] for tick in drawn["across"]] == ["1", "2", "3"]


def test_a_flat_curve_is_drawn_and_nothing_is_not() -> None:
    flat = figures.curves({("a", 0): {(0, 0): 0.0, (0, 1): 0.0}}, percent=True)
    assert flat is not None
    assert flat["arms"] == [{"title": "a", "role": "other"}]
    assert figures.curves({}, percent=True) is None
