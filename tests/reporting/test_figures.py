"""Dots and lines lie where the numbers say."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from attar.reporting import figures, lines, svg

Made = Callable[..., dict[str, Any]]


def parts(drawing: svg.Drawing | None, tag: str, style: str = "") -> list[dict[str, str]]:
    """The attributes of the elements of this tag and of these classes."""
    assert drawing is not None
    root = ElementTree.fromstring(f"<all>{drawing.svg}</all>")
    wanted = set(style.split())
    return [e.attrib for e in root.iter(tag) if wanted <= set(e.get("class", "").split())]


def words(drawing: svg.Drawing | None) -> list[str]:
    assert drawing is not None
    root = ElementTree.fromstring(f"<all>{drawing.svg}</all>")
    return [element.text or "" for element in root.iter("text")]


def points(element: dict[str, str]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in element["points"].split())]


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
    assert svg.ticks(low, high) == expected


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    axis = svg.Axis(1, 1000, 0, 300, log=True)
    assert [axis(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])
    assert all(1 <= tick <= 1000 for tick in axis.ticks())


@pytest.mark.parametrize("wanted", [[5.0] * 6, [99.0, 98.0, 97.0], [-50.0, 0.0, 400.0]])
def test_labels_keep_apart_in_their_order_and_inside(wanted: list[float]) -> None:
    placed = svg.apart(wanted, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= svg.LINE - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= 0
    assert ordered[-1] <= 100
    assert sorted(range(len(wanted)), key=lambda i: (wanted[i], placed[i])) == sorted(
        range(len(wanted)), key=placed.__getitem__
    )


def test_models_lie_in_proportion(verdict: Made) -> None:
    drawing = figures.models(verdict())
    x = [float(dot["cx"]) for dot in parts(drawing, "circle", "dot")]
    assert (x[2] - x[1]) / (x[0] - x[1]) == pytest.approx(15 / 18, abs=0.005)
    for dot, whisker in zip(x, parts(drawing, "line", "whisker"), strict=True):
        assert 0 <= float(whisker["x1"]) <= dot <= float(whisker["x2"]) <= svg.WIDTH


def test_a_better_model_lies_higher_and_a_smaller_one_to_the_left(verdict: Made) -> None:
    told = verdict()
    told["models"]["teacher"]["cost"]["bytes"] = 4_000_000
    told["models"]["distilled"]["cost"]["bytes"] = 40_000
    drawing = figures.against_cost(told, "size")
    teacher, baseline, distilled = (
        (float(dot["cx"]), float(dot["cy"])) for dot in parts(drawing, "circle", "dot")
    )
    assert baseline[0] < distilled[0] < teacher[0]
    assert teacher[1] < distilled[1] < baseline[1]
    # 4 kB, 40 kB, 4 MB: one power of ten, then two
    steps = (teacher[0] - distilled[0]) / (distilled[0] - baseline[0])
    assert steps == pytest.approx(2, abs=0.05)
    assert "4 MB" in drawing.svg


def test_equal_costs_stand_beside_each_other(verdict: Made) -> None:
    drawing = figures.against_cost(verdict(), "latency")
    places = {dot["cx"] for dot in parts(drawing, "circle", "dot")}
    assert len(places) == 3
    assert drawing.caption.endswith("Dots of (nearly) equal latency are moved apart.")


def test_dots_that_are_apart_are_where_they_belong(verdict: Made) -> None:
    told = verdict()
    for name, size in (("teacher", 4_000_000), ("distilled", 40_000)):
        told["models"][name]["cost"]["bytes"] = size
    assert "moved" not in figures.against_cost(told, "size").caption


def test_a_cost_that_was_not_measured_is_not_drawn(verdict: Made) -> None:
    assert figures.against_cost(verdict(costs=None), "size") is None


def learnt(*values: list[float], arm: str = "distilled", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seeds": 2, "points": [list(value) for value in values]} | more


def test_a_curve_goes_through_its_means_and_its_band_through_the_ends(verdict: Made) -> None:
    line = learnt([1, 0.6, 0.5, 0.7], [2, 0.8, 0.75, 0.85], [3, 0.9, 0.9, 0.9], term="kl")
    drawing = lines.loss({"loss": [line]})
    curve, band = parts(drawing, "polyline"), parts(drawing, "polygon")
    (x, y), ends = zip(*points(curve[0]), strict=True), points(band[0])
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.1)
    assert (y[0] - y[1]) / (y[1] - y[2]) == pytest.approx(2, abs=0.05)
    assert [place[0] for place in ends] == [*x, *reversed(x)]
    assert ends[0][1] < y[0] < ends[-1][1]
    assert ends[0][1] + ends[-1][1] == pytest.approx(2 * y[0], abs=0.2)


def test_one_seed_has_no_band() -> None:
    line = learnt([1, 0.6, 0.6, 0.6], [2, 0.8, 0.8, 0.8], term="kl") | {"seeds": 1}
    drawing = lines.loss({"loss": [line]})
    assert not parts(drawing, "polygon")
    assert "band" not in drawing.caption


def test_the_end_of_training_fills_the_frame(verdict: Made) -> None:
    """A first epoch at chance does not press the rest into one stroke, and is said to be cut."""
    values = [0.1, 0.5, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96]
    line = learnt(*([epoch, v, v, v] for epoch, v in enumerate(values, 1)))
    drawing = lines.validation({"validation": [line]}, verdict())
    curve = points(parts(drawing, "polyline")[0])
    assert curve[0][1] > lines.HEIGHT
    assert curve[3][1] - curve[-1][1] > 0.8 * (lines.HEIGHT - lines.BOTTOM - lines.TOP)
    assert "outside the frame" in drawing.caption


def test_flat_lines_are_drawn_and_nothing_is_not(verdict: Made) -> None:
    flat = learnt([1, 0, 0, 0], [2, 0, 0, 0], arm="a", term="kl")
    assert parts(lines.loss({"loss": [flat]}), "polyline")
    assert parts(lines.validation({"validation": [flat]}, verdict()), "polyline")
    for empty in ([], [learnt([1, 0.5, 0.5, 0.5], [2, None, None, None], term="kl")]):
        assert lines.loss({"loss": empty}) is None
        assert lines.validation({"validation": empty}, verdict()) is None


def changed(name: str, before: float, after: float) -> dict[str, Any]:
    told = {"name": name, "before": before, "after": after, "teacher": 0.9}
    return told | {"change": after - before, "low": 0.0, "high": 0.0}


def test_a_class_goes_from_ring_to_dot(verdict: Made) -> None:
    rows = [changed("won", 0.5, 0.9), changed("lost", 0.7, 0.6)]
    drawing = figures.classes(
        {"classes": {"against": "baseline", "of": 2, "rows": rows}}, verdict()
    )
    rings, dots = (parts(drawing, "circle", kind) for kind in ("ring", "dot"))
    gains = [float(d["cx"]) - float(r["cx"]) for r, d in zip(rings, dots, strict=True)]
    assert gains[0] / gains[1] == pytest.approx(-4, abs=0.1)
    assert {"+40.0", "-10.0"} <= set(words(drawing))


def test_calibration_lies_on_the_diagonal_where_it_is_perfect(verdict: Made) -> None:
    bins = [{"confidence": c, "accuracy": c, "share": 0.5} for c in (0.2, 0.9)]
    bins.append({"confidence": 0.9, "accuracy": 0.5, "share": 0.01})
    drawing = figures.calibration({"calibration": {"teacher": bins}}, verdict())
    ideal = parts(drawing, "line", "ideal")[0]
    start, end = (float(ideal["x1"]), float(ideal["y1"])), (float(ideal["x2"]), float(ideal["y2"]))
    first, second, low = (
        (float(d["cx"]), float(d["cy"]), float(d["r"])) for d in parts(drawing, "circle", "dot")
    )
    for x, y, _ in (first, second):
        across = (x - start[0]) / (end[0] - start[0])
        assert (y - start[1]) / (end[1] - start[1]) == pytest.approx(across, abs=0.01)
    assert low[1] > second[1], "what is too sure lies below"
    assert low[2] < second[2]
    error = verdict()["models"]["teacher"]["scores"]["calibration_error"]
    assert f"error {100 * error:.1f} %" in words(drawing)


def test_every_label_stays_inside_its_drawing(verdict: Made, figured: Made, tmp_path: Path) -> None:
    names = ("a class of a very long name indeed", "x")
    drawn = figures.drawings(verdict(classes=names), figured(tmp_path, names, term="t" * 80))
    assert None not in drawn.values()
    for drawing in drawn.values():
        width = svg.WIDTH if "calibration" not in drawing.svg else figures.SQUARE
        root = ElementTree.fromstring(f"<all>{drawing.svg}</all>")
        for element in root.iter("text"):
            length = 5.5 * len(element.text or "")
            share = {"end": 1.0, "middle": 0.5}.get(element.get("text-anchor", ""), 0.0)
            left = float(element.attrib["x"]) - share * length
            assert left >= -1, element.text
            assert left + length <= width + 1, element.text


def test_each_drawing_has_a_name_a_title_and_one_caption(
    verdict: Made, figured: Made, tmp_path: Path
) -> None:
    for name, drawing in figures.drawings(verdict(), figured(tmp_path)).items():
        named = [e for e in parts(drawing, "svg") if "role" in e]
        assert named
        for element in named:
            assert element["id"].startswith(f"figure-{name}")
            assert f'id="{element["aria-labelledby"]}"' in drawing.svg
        assert drawing.title
        assert drawing.caption.endswith(".")
        assert not re.search(r"#[0-9a-f]{3,6}\b|rgb", drawing.svg), "colours are the theme's"


@pytest.mark.parametrize("words", ["<b>", '"', "'", "&amp;", "</text><script>"])
def test_words_stay_words_wherever_they_stand(words: str) -> None:
    drawn = svg.canvas(words, words, 10, svg.text(words, 0, 0, words), svg.tag("g", a_b=words))
    root = ElementTree.fromstring(drawn)
    assert [element.tag for element in root.iter()] == ["svg", "title", "text", "g"]
    title, text, group = root
    assert title.text == text.text == text.get("class") == group.get("a-b") == words
