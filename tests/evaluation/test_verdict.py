"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.evaluation import Cost, compare, judge, table
from attar.runtime import DataError, UsageError

TEACHER, BASELINE = "1" * 98 + "0" * 2, "1" * 80 + "0" * 20
BETTER, WORSE = "1" * 95 + "0" * 5, "1" * 60 + "0" * 40


def price(parameters: int) -> Cost:
    taken = {"p50_ms": parameters / 100, "p95_ms": parameters / 50}
    return Cost(parameters, parameters * 10, parameters * 4, {"1": taken, "64": taken}, 1, "a chip")


def test_better(house: Any) -> None:
    found = judge(
        house.task,
        teacher=house.said(TEACHER),
        baseline=[house.said(BASELINE)],
        distilled=[house.said(BETTER)],
    )
    assert found.outcome == "better"
    assert found.headline.startswith(
        "BETTER than the baseline: accuracy 95.0 % against 80.0 %, +15.0 points ["
    )
    assert found.headline.endswith("], p < 0.001 (1 seed, 100 test examples)")
    assert found.models["distilled"].retention.value == pytest.approx(95 / 98)
    assert found.models["distilled"].gap_closed == pytest.approx(15 / 18)
    assert found.models["distilled"].agreement == {
        "agreement": pytest.approx(0.97),
        "kl": pytest.approx(house.task.agreement(house.said(BETTER), house.said(TEACHER))["kl"]),
    }
    assert found.models["teacher"].agreement is None
    assert found.models["baseline"].gap_closed is None
    assert found.floor == 1.0  # all labels are the same class
    assert found.goal is None
    assert found.goal_line is None
    assert str(found) == found.headline


def test_worse_and_no_difference(house: Any) -> None:
    for right, outcome, words in (
        (WORSE, "worse", "WORSE than the baseline: accuracy 60.0 % against 80.0 %, -20.0 points"),
        ("1" * 82 + "0" * 18, "no difference", "NO DIFFERENCE from the baseline: accuracy 82.0 %"),
        (BASELINE, "no difference", "NO DIFFERENCE from the baseline: accuracy 80.0 % against 80."),
    ):
        found = judge(house.task, baseline=[house.said(BASELINE)], distilled=[house.said(right)])
        assert found.outcome == outcome
        assert found.headline.startswith(words)
        label = found.to_json()["highlights"][0]["label"]
        assert ("could be chance" in label) == (outcome == "no difference")


def test_seeds_are_paired_and_averaged(house: Any) -> None:
    baseline = [house.said("1" * n + "0" * (200 - n)) for n in (160, 150, 170)]
    distilled = [house.said("1" * n + "0" * (200 - n)) for n in (181, 170, 190)]
    found = judge(house.task, baseline=baseline, distilled=distilled, resamples=300)
    report = found.models["distilled"]
    assert report.seeds == (0.905, 0.85, 0.95)
    assert report.primary.value == report.scores["accuracy"] == pytest.approx(541 / 600)
    assert found.difference.value == pytest.approx(61 / 600)
    assert found.difference.test == "banerjee"
    assert "(3 seeds, 200 test examples)" in found.headline
    # Seeds differ by 5 points each, but their differences by 0.3: pairing sees it.
    assert found.outcome == "better"
    shuffled = judge(house.task, baseline=baseline[::-1], distilled=distilled[1:] + distilled[:1])
    assert shuffled.difference.p > found.difference.p
    assert "training run" not in " ".join(found.to_json()["notes"])
    two = judge(house.task, baseline=baseline[:2], distilled=distilled[:2], resamples=300)
    assert two.to_json()["notes"][-1].startswith("Two training runs tell little")


def test_lower_is_better(house: Any) -> None:
    labels = torch.zeros(300, 1)
    noise = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    arms = {name: {"values": noise * size, "labels": labels} for name, size in
            {"teacher": 1.0, "baseline": 2.0, "distilled": 1.25}.items()}  # fmt: skip
    found = judge(
        house.median,
        teacher=arms["teacher"],
        baseline=[arms["baseline"]],
        distilled=[arms["distilled"]],
        retain=0.9,
        resamples=200,
    )
    assert found.outcome == "better"
    assert found.difference.value < 0
    assert found.models["distilled"].retention.value == pytest.approx(1 / 1.25)
    assert found.models["distilled"].gap_closed == pytest.approx(0.75)
    assert not found.goal.met
    assert found.headline.startswith("BETTER than the baseline: median error 0.")
    swapped = judge(
        house.median, baseline=[arms["distilled"]], distilled=[arms["baseline"]], resamples=200
    )
    assert swapped.outcome == "worse"
    assert found.models["distilled"].per_class is None
    assert found.to_json()["class_table"] is None


def test_the_goal_met_and_sure(house: Any) -> None:
    rows = house.said("1" * 990 + "0" * 10)
    found = judge(house.task, teacher=rows, distilled=[rows], retain=0.99)
    assert (found.goal.met, found.goal.sure, found.goal.enough_examples) == (True, True, True)
    assert found.goal_line == "MET, retention 100.0 % [100.0, 100.0], goal 99 %"


def test_the_goal_met_by_the_point_estimate_alone(house: Any) -> None:
    found = judge(
        house.task, teacher=house.said("1" * 99 + "0"), distilled=[house.said("0" + "1" * 99)],
        retain=0.99,
    )  # fmt: skip
    assert (found.goal.met, found.goal.sure, found.goal.enough_examples) == (True, False, False)
    assert found.goal_line.startswith("MET by the point estimate, retention 100.0 % [")
    assert found.goal_line.endswith(
        "goal 99 %; the lower end of the interval does not agree; "
        "too few test examples to tell a loss of 1 %"
    )


def test_too_few_examples_even_when_all_are_right(house: Any) -> None:
    found = judge(
        house.task, teacher=house.said("1111"), distilled=[house.said("1111")], retain=0.9
    )
    assert found.goal.met
    assert not found.goal.enough_examples


def test_the_goal_missed(house: Any) -> None:
    found = judge(
        house.task, teacher=house.said(TEACHER), distilled=[house.said(WORSE)], retain=0.75
    )
    assert (found.goal.met, found.goal.sure, found.goal.enough_examples) == (False, False, True)
    assert found.goal_line.startswith("MISSED, retention 61.2 % [")
    close = judge(
        house.task, teacher=house.said(TEACHER), distilled=[house.said(BETTER)], retain=0.98
    )
    assert "MISSED by the point estimate" in close.goal_line
    assert "the upper end of the interval does not agree" in close.goal_line
    none = judge(house.task, teacher=house.said("000"), distilled=[house.said("111")], retain=0.9)
    assert not none.goal.met
    assert none.goal_line.startswith("NOT MEASURABLE")


def costing(ms: float, size: int, macs: int) -> Cost:
    latency = {key: {"p50_ms": ms, "p95_ms": ms} for key in ("1", "64")}
    return Cost(parameters=1, macs=macs, bytes=size, latency=latency, threads=1, device="a machine")


def test_a_goal_may_limit_what_the_student_costs(house: Any) -> None:
    rows = house.said("1" * 990 + "0" * 10)
    told = {"teacher": rows, "distilled": [rows], "retain": 0.99}
    costs = {"distilled": costing(0.5, 2_000_000, 3000)}
    limits = {"latency_ms": 0.5, "size_mb": 2.0, "macs": 3000.0}
    met = judge(house.task, **told, costs=costs, limits=limits)
    assert (met.goal.met, met.goal.sure) == (True, True)
    assert met.goal_line == (
        "MET, retention 100.0 % [100.0, 100.0], goal 99 %; time for one example 0.5 ms, goal "
        "0.5 ms; size 2 MB, goal 2 MB; multiply-adds 3 thousand, goal 3 thousand"
    )
    assert met.to_json()["goal"]["limits"][1] == {
        "name": "size_mb",
        "most": 2.0,
        "value": 2.0,
        "met": True,
    }
    for name in limits:
        less = judge(house.task, **told, costs=costs, limits={**limits, name: limits[name] / 2})
        assert (less.goal.met, less.goal.sure, less.goal.kept) == (False, False, True), name
        assert less.goal_line.startswith("MISSED, retention 100.0 %")
        assert less.goal_line.count("over the goal of") == 1
    near = judge(house.task, **told, costs=costs, limits={"macs": 2999.0})
    assert near.goal_line.endswith("multiply-adds 3000, over the goal of 2999")


def test_a_limit_that_is_missed_is_no_matter_of_the_interval(house: Any) -> None:
    found = judge(
        house.task,
        teacher=house.said("1" * 99 + "0"),
        distilled=[house.said("0" + "1" * 99)],
        retain=0.99,
        costs={"distilled": costing(0.5, 2000, 3000)},
        limits={"latency_ms": 0.1},
    )
    assert found.goal_line.startswith("MISSED, retention 100.0 %")
    assert "the lower end of the interval does not agree" in found.goal_line


def test_without_a_baseline_the_start_is_the_measure(house: Any) -> None:
    start = house.said("10" * 50)
    for starts in ([start], [start] * 3):
        found = judge(
            house.task, teacher=house.said(TEACHER), start=starts,
            distilled=[house.said(BETTER)] * 3,
        )  # fmt: skip
        assert (found.against, found.outcome) == ("start", "better")
        assert "no baseline: the training data have no labels" in found.headline
        assert found.models["distilled"].gap_closed is None
    told = found.to_json()
    titles = [column["title"] for column in told["table"]["columns"]]
    assert titles == ["teacher", "before distillation", "distilled"]


def test_with_nothing_to_compare_with(house: Any) -> None:
    found = judge(house.task, distilled=[house.said(BETTER)])
    assert (found.outcome, found.against, found.difference) == ("not compared", None, None)
    assert found.headline.startswith("NOT COMPARED, there is no baseline: accuracy 95.0 % [")
    assert json.dumps(found.to_json(), allow_nan=False)


def test_a_teacher_below_the_baseline_leaves_no_gap(house: Any) -> None:
    found = judge(
        house.task, teacher=house.said(WORSE), baseline=[house.said(BASELINE)],
        distilled=[house.said(BETTER)],
    )  # fmt: skip
    assert found.models["distilled"].gap_closed is None
    notes = " ".join(found.to_json()["notes"])
    assert "teacher is not better than the baseline" in notes
    assert "teacher is no better than always giving the same answer" in notes
    assert "One training run" in notes


def test_last_epoch_costs_and_times_are_shown(house: Any) -> None:
    found = judge(
        house.task,
        teacher=house.said(TEACHER),
        baseline=[house.said(BASELINE)],
        distilled=[house.said(BETTER)],
        last=[house.said("1" * 93 + "0" * 7)],
        costs={"teacher": price(1000), "baseline": price(100), "distilled": price(100)},
        seconds={"teacher": 90.0, "distilled": 30.0},
        teacher_share=0.25,
    )
    assert found.last.value == pytest.approx(0.93)
    assert found.models["distilled"].ratios == {
        "parameters": 10.0, "macs": 10.0, "bytes": 10.0, "latency_1": 10.0, "latency_64": 10.0,
    }  # fmt: skip
    assert found.models["teacher"].ratios is None
    told = found.to_json()
    shown = {
        row["label"]: [(cell["text"], cell["note"]) for cell in row["cells"]]
        for section in told["table"]["sections"]
        for row in section["rows"]
    }
    assert shown["at the last epoch"] == [("", ""), ("", ""), ("93.0 %", "")]
    assert shown["parameters"] == [("1,000", ""), ("100", "10.0 x fewer"), ("100", "10.0 x fewer")]
    assert shown["size"][2] == ("400 B", "10.0 x smaller")
    assert "time for 1, one thread" not in shown  # it is that already
    assert shown["time for 1, in ms"][2] == ("1.00 / 2.00", "10.0 x faster")
    assert shown["training time"] == [("1 min 30 s", ""), ("", ""), ("30.0 s", "25 % in teacher")]
    assert shown["gap closed"] == [("", ""), ("", ""), ("83 %", "")]
    assert "over the seeds" not in shown
    assert any("last epoch have an accuracy of 93.0 %" in note for note in told["notes"])
    assert told["highlights"][2]["value"] == "10.0 x fewer"
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_last_epoch_as_good_as_the_best_is_not_shown_twice(house: Any) -> None:
    told = judge(
        house.task, teacher=house.said(TEACHER), baseline=[house.said(BASELINE)],
        distilled=[house.said(BETTER)], last=[house.said(BETTER)],
    ).to_json()  # fmt: skip
    labels = [row["label"] for section in told["table"]["sections"] for row in section["rows"]]
    assert labels[0] == "accuracy"
    assert "at the last epoch" not in labels


def test_the_class_table(house: Any) -> None:
    labels = torch.tensor([0, 0, 0, 1])
    found = judge(
        house.task,
        baseline=[house.said("1000", labels)],
        distilled=[house.said("1110", labels)],
    )
    told = found.to_json()["class_table"]
    assert told["caption"] == "Accuracy of each class, in percent"
    assert told["columns"] == ["class", "examples", "baseline", "distilled", "against baseline"]
    assert told["rows"] == [
        {"cells": ["no", "3", "33.3", "100.0", "+66.7"], "tone": "good"},
        {"cells": ["yes", "1", "0.0", "0.0", "0"], "tone": ""},
    ]
    absent = judge(house.task, baseline=[house.said("10")], distilled=[house.said("01")])
    told = absent.to_json()
    assert told["class_table"]["rows"][1] == {"cells": ["yes", "0", "", "", ""], "tone": ""}
    assert told["models"]["distilled"]["per_class"]["yes"] is None


def test_the_table_fits_80_columns_and_prints_names_as_they_are(house: Any) -> None:
    from rich.console import Console

    found = judge(
        house.task,
        teacher=house.said(TEACHER),
        baseline=[house.said(BASELINE)] * 2,
        distilled=[house.said(BETTER), house.said(BETTER[::-1])],
        costs=dict.fromkeys(("teacher", "baseline", "distilled"), price(123_456_789)),
        seconds={"teacher": 40_000.0, "distilled": 3000.0, "baseline": 2000.0},
        teacher_share=0.4,
    )
    console = Console(width=80, record=True, file=StringIO())
    console.print(table(found))
    text = console.export_text()
    assert "95.0 %" in text
    assert "123,456,789" in text
    assert "11 h 6 min" in text
    assert "…" not in text, "something was cut"
    assert max(map(len, text.splitlines())) <= 80
    named = judge(
        house.task, distilled=[house.said("10")], others={"[bold]\x1b[31mx": [house.said("01")]}
    )
    console.print(table(named))
    assert "[bold][31mx" in console.export_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"baseline": ["10", "11"]}, "baseline has rows of 2 seeds and distilled of 1"),
        ({"start": ["10", "11"]}, "start has rows of 2 seeds"),
        ({"retain": 0.9}, "needs the teacher's rows"),
        ({"retain": 99}, r"share in \(0, 1\]"),
        ({"limits": {"macs": 1.0}}, "give retain too"),
        ({"distilled": []}, "nothing to judge"),
        ({"others": {"last": ["10"]}}, "'last'; that name is a role"),
    ],
)
def test_what_cannot_be_judged(house: Any, more: dict[str, Any], message: str) -> None:
    def rows(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rows(item) for name, item in value.items()}
        return [house.said(each) for each in value] if isinstance(value, list) else value

    with pytest.raises(UsageError, match=message):
        judge(house.task, **({"distilled": [house.said("10")]} | rows(more)))


def test_other_examples_are_not_compared(house: Any) -> None:
    other = house.said("10", torch.tensor([1, 0]))
    with pytest.raises(DataError, match="same test examples"):
        judge(house.task, distilled=[house.said("10")], baseline=[other])


def test_compare_runs_models_of_ones_own(house: Any) -> None:
    inputs = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    source = house.listed(inputs, inputs.argmax(1))
    flipped = nn.Linear(2, 2, bias=False)
    flipped.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    models = {"big": nn.Identity(), "small": nn.Identity(), "plain": flipped, "odd": flipped}
    found = compare(
        models, source, house.task, teacher="big", baseline="plain", retain=0.5, device="cpu"
    )
    assert list(found.models) == ["teacher", "baseline", "distilled", "odd"]
    assert found.outcome == "better"
    assert found.models["distilled"].primary.value == 1.0
    assert found.models["odd"].primary.value == 0.0
    assert found.goal.met
    assert found.models["baseline"].cost.macs == 4
    quick = compare({"student": flipped}, source, house.task, measure_cost=False, device="cpu")
    assert quick.outcome == "not compared"
    assert quick.models["distilled"].cost is None


def test_compare_names_what_is_missing(house: Any) -> None:
    source = house.listed(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(UsageError, match="no model to judge"):
        compare({"teacher": nn.Identity()}, source, house.task)
    with pytest.raises(UsageError, match="did you mean 'teecher'"):
        compare(
            {"teecher": nn.Identity(), "s": nn.Identity()}, source, house.task, teacher="tescher"
        )


def test_real_digits_from_end_to_end(digits: attar.data.Splits) -> None:
    task = attar.tasks.ImageClassification().fitted(digits.train)
    batch = digits.train.rows(torch.arange(len(digits.train)))

    def trained(steps: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model(batch["inputs"]), batch).mean().backward()
            optimizer.step()
        return model

    models = {"teacher": trained(60), "baseline": trained(3), "student": trained(20)}
    found = compare(models, digits.test, task, retain=0.9, device="cpu")
    assert found.outcome == "better"
    assert found.models["distilled"].cost.macs == 640
    assert 0 < found.models["distilled"].gap_closed < 1
    assert found.models["teacher"].primary.value > 0.9
    assert len(found.to_json()["class_table"]["rows"]) == 10


def test_times_of_one_thread_have_rows_of_their_own(house: Any) -> None:
    alone = {"1": {"p50_ms": 3.0, "p95_ms": 4.0}, "64": {"p50_ms": 5.0, "p95_ms": 6.0}}
    slow = {size: {key: 2 * ms for key, ms in taken.items()} for size, taken in alone.items()}
    found = judge(
        house.task,
        teacher=house.said(TEACHER),
        distilled=[house.said(BETTER)],
        costs={
            "teacher": replace(price(1000), threads=2, one_thread=slow),
            "distilled": replace(price(100), threads=2, one_thread=alone),
        },
    )
    assert found.models["distilled"].ratios["one_thread_64"] == 2.0
    shown = {
        row["label"]: [(cell["text"], cell["note"]) for cell in row["cells"]]
        for section in found.to_json()["table"]["sections"]
        for row in section["rows"]
    }
    assert shown["time for 1, one thread"][-1] == ("3.00 / 4.00", "2.0 x faster")
    assert shown["time for 64, one thread"][-1] == ("5.00 / 6.00", "2.0 x faster")
