"""The page of several students: all are there, no words lie on others, and it can do nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attar.evaluation import Cost, Verdicts, judge
from attar.evaluation.verdicts import named
from attar.reporting import page
from attar.reporting.many import drawing
from attar.reporting.placing import Box, placed
from attar.reporting.svg import LETTER
from attar.runtime import DataError
from attar.tasks import Regression, TabularClassification


def rows(right: int, of: int = 100) -> dict[str, Any]:
    labels = torch.arange(of) % 2
    answer = torch.where(torch.arange(of) < right, labels, 1 - labels)
    return {"logits": torch.nn.functional.one_hot(answer, 2).float() * 4, "labels": labels}


def cost(size: int, time: float) -> Cost:
    taken = {"p50_ms": time, "p95_ms": 2 * time}
    return Cost(size // 4, size, size, {"1": taken, "64": taken}, 1, "a chip")


def students(right: list[int], sizes: list[int], times: list[float], **more: Any) -> Verdicts:
    """Students of so many right answers, sizes and times; a teacher of 98."""
    costs = [cost(*each) for each in zip(sizes, times, strict=True)]
    verdicts = []
    for amount, own in zip(right, costs, strict=True):
        priced = {"teacher": cost(10**6, 9.0), "baseline": own, "distilled": own}
        arms: Any = {"teacher": rows(98), "baseline": [rows(amount - 3)]}
        arms |= {"distilled": [rows(amount)], "costs": priced, "retain": more.get("retain")}
        verdicts.append(judge(TabularClassification(classes=("no", "yes")), **arms))
    names = more.get("names") or tuple(f"net {place}" for place in range(len(right)))
    kept = more.get("kept") or (None,) * len(right)
    return Verdicts(names, tuple(verdicts), kept, tuple(costs), cost(10**6, 9.0))


def told(found: Verdicts) -> dict[str, Any]:
    return json.loads(json.dumps(found.to_json(), allow_nan=False))


def words(svg: str) -> list[tuple[str, Box]]:
    """Every word of a drawing with its box, as wide as its letters are."""
    found = []
    for attributes, said in re.findall(r"<text ([^>]*)>([^<]*)</text>", svg):
        x, y = (float(re.search(rf'{key}="([^"]*)"', attributes)[1]) for key in "xy")  # type: ignore[index]
        wide = LETTER * len(said)
        left = x - wide * (("middle" in attributes) / 2 + ("end" in attributes))
        found.append((said, Box(left, y - 8, left + wide, y + 1)))
    return found


close = st.lists(
    st.tuples(st.integers(60, 98), st.integers(2000, 2600), st.floats(0.1, 0.12)),
    min_size=1,
    max_size=16,
)


@given(points=close)
def test_no_words_lie_on_others_however_close_the_students_are(
    points: list[tuple[int, int, float]],
) -> None:
    found = told(students(*map(list, zip(*points, strict=True))))
    for svg in drawing(found).panels:
        boxes = words(svg)
        for place, (one, box) in enumerate(boxes):
            for other, there in boxes[:place]:
                assert not box.meets(there), (one, other)
            assert box.within(Box(-2, 0, 362, 282)), one


def test_the_smallest_is_of_those_that_validation_lets_through() -> None:
    case: Any = ([95, 96, 90], [3000, 2000, 1000], [1.0, 2.0, 3.0])
    found = students(*case, retain=0.9, kept=(0.95, 0.91, 0.89))
    assert (found.smallest, found.met) == (1, True)
    assert "net 1 (91.0 %)" in str(found.goal_line)
    missed = students(*case, retain=0.99, kept=(0.95, 0.999, None))
    assert (missed.smallest, missed.met) == (1, False)  # the test split has the last word
    none = students(*case, retain=0.99, kept=(0.95, 0.97, None))
    assert (none.smallest, none.met) == (None, False)
    assert "net 1 comes nearest with 97.0 %" in str(none.goal_line)


def test_the_front_holds_those_that_none_beats_in_both() -> None:
    found = students([95, 96, 90, 95], [3000, 2000, 1000, 3001], [1.0, 1.04, 3.0, 2.0])
    assert found.front("size") == [1, 2]
    assert found.front("latency") == [1]  # 4 % of a time are none


def test_names_tell_what_differs() -> None:
    options = [{"width": 4, "depth": 8}, {"width": 8, "depth": 8}, {"widths": (3,)}]
    assert named(["resnet", "resnet", "mlp"], options) == (
        "resnet width 4",
        "resnet width 8",
        "mlp",
    )


def test_one_that_failed_does_not_set_the_scale() -> None:
    found = told(students([95, 96, 94, 97, 40], [5000, 6000, 4000, 7000, 900], [1.0] * 5))
    drawn = drawing(found)
    assert "An arrow" in drawn.caption
    assert "40.0 %" in drawn.panels[0]
    assert "<polygon" in drawn.panels[0]
    assert not re.search(r">[0-6]0 %<", drawn.panels[0])  # the axis begins above


def test_the_page_of_a_tampered_file_is_refused_or_harmless(tmp_path: Path) -> None:
    hostile = ('"><script>alert(1)</script>', "<img src=x onerror=alert(1)>")
    found = told(students([95, 96], [2000, 3000], [1.0, 2.0], names=hostile))
    (tmp_path / "verdict.json").write_text(json.dumps(found))
    text = page(tmp_path).read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;img src=x" in text
    found["table"]["rows"][1]["place"] = "x/../../evil"
    (tmp_path / "verdict.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match="does not hold what a verdict of attar-verdicts/1 holds"):
        page(tmp_path)
    (tmp_path / "verdict.json").write_text(json.dumps({"format": "attar-verdicts/1"}))
    with pytest.raises(DataError, match="run the recipe again"):
        page(tmp_path)


def test_words_find_room_nearby_or_say_that_there_is_none() -> None:
    field = Box(0, 0, 100, 100)
    spots = placed(["a", "b"], [10.0, 10.0], [(50, 50), (50, 50)], [], field)
    assert spots is not None
    assert not spots[0].box.meets(spots[1].box)
    assert all(spot.box.within(field) for spot in spots)
    assert placed(["wide"], [101.0], [(50, 50)], [], field) is None
    assert placed(["a"], [10.0], [(50, 50)], [field], field, most=20) is None


def test_lower_is_better_turns_front_and_words() -> None:
    target = torch.linspace(-1, 1, 50)
    task = Regression(mean=(0.0,), std=(1.0,))

    def off(by: float) -> dict[str, Any]:
        return {"values": (target + by).unsqueeze(1), "labels": target.unsqueeze(1)}

    price = cost(1000, 1.0), cost(2000, 1.0), cost(3000, 1.0)
    verdicts = tuple(
        judge(task, teacher=off(0.1), baseline=[off(0.5)], distilled=[off(by)], costs={})
        for by in (0.4, 0.2, 0.3)
    )
    found = Verdicts(("a", "b", "c"), verdicts, (None,) * 3, price, None)
    assert found.front("size") == [0, 1]
    assert "Down and to the left is better." in drawing(told(found)).caption
