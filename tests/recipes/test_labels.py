"""Few labels, many rows: who learns from which, in how many steps, and where it is told."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.cli.tables import print_plan
from attar.data import Source, Splits, ThreeSplits
from attar.recipes import Recipe, TeacherPlan, check, load_recipe, run
from attar.recipes.job import prepare
from attar.recipes.parts import Repeated, Unlabelled
from attar.runtime import DataError, PreflightError

SOFT = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
TEACHES = partial(attar.distill, terms=[SOFT], label_weight=0, epochs=2, batch_size=16)
ROWS, FEW, HELD = 160, 30, 9


def few(splits: Splits, **changes: Any) -> Recipe:
    """30 of the 160 points have labels, 9 of the 30 validate."""
    known: dict[str, Any] = {
        "task": attar.tasks.TabularClassification,
        "data": splits,
        "teacher": TeacherPlan(
            model=partial(attar.models.mlp, widths=(16,)),
            train=partial(attar.train, epochs=30, batch_size=8),
        ),
        "student": partial(attar.models.mlp, widths=(4,)),
        "stages": [TEACHES],
        "labels": FEW,
        "validation": HELD / FEW,
    }
    return Recipe(**known | changes)


Told = list[dict[str, Any]]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What each training was given, in order, with its name, and the steps it planned."""
    told: Told = []
    module = importlib.import_module("attar.recipes.arms")
    real = module.fit

    def fit(student: Any, teacher: Any, data: Source, *rest: Any, **options: Any) -> Any:
        done = real(student, teacher, data, *rest, **options)
        name = options["label"].split()[0]
        told.append({"arm": name, "data": data, "steps": done.plan.steps, **options})
        return done

    monkeypatch.setattr(module, "fit", fit)
    return told


def points(source: Source, epochs: int = 2) -> set[tuple[float, ...]]:
    """Every different row that so many epochs of a source give."""
    batches = (b for e in range(epochs) for b in source.epoch(e, batch_size=16, seed=0))
    return {tuple(row) for batch in batches for row in batch["inputs"].tolist()}


def test_the_labels_of_the_few_are_all_that_teacher_and_baseline_have(
    blobs: Splits, tmp_path: Path, fits: Told
) -> None:
    run(few(blobs), folder=tmp_path / "run")
    given = {told["arm"]: told for told in fits}
    assert list(given) == ["teacher", "baseline", "distilled"]
    seen = {arm: points(told["data"]) for arm, told in given.items()}
    held = points(given["distilled"]["validation"])
    assert len(held) == HELD
    assert seen["teacher"] == seen["baseline"]
    assert len(seen["teacher"]) == FEW - HELD
    assert seen["teacher"] < seen["distilled"]
    assert len(seen["distilled"]) == ROWS - HELD
    assert not held & seen["distilled"]
    batch = next(given["distilled"]["data"].epoch(0, batch_size=16, seed=0))
    assert "labels" not in batch
    assert given["distilled"]["data"].labels is None


def test_baseline_and_student_take_the_same_steps(
    blobs: Splits, tmp_path: Path, fits: Told
) -> None:
    run(few(blobs, seeds=2), folder=tmp_path / "run")
    steps = {told["arm"]: told["steps"] for told in fits}
    assert steps["baseline"] == steps["distilled"] == 2 * -(-(ROWS - HELD) // 16)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = {line["arm"]: line["step"] for line in lines if line["split"] == "validation"}
    assert last["baseline"] == last["distilled"] == steps["distilled"]


def test_the_few_have_the_same_share_of_each_class_and_depend_on_the_seed(blobs: Splits) -> None:
    def drawn(seed: int) -> list[list[float]]:
        parts = prepare(few(blobs, seed=seed)).parts
        labels = torch.cat([parts.labelled.labels, parts.validation.labels])
        assert labels.bincount().tolist() == [10, 10, 10]
        assert parts.validation.labels.bincount().tolist() == [3, 3, 3]
        return parts.labelled.rows(torch.arange(FEW - HELD))["inputs"].tolist()

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_loaded_teacher_learns_from_nobody(blobs: Splits, tmp_path: Path, fits: Told) -> None:
    known = attar.models.build("mlp", data=blobs.train, widths=[16])
    task = attar.tasks.TabularClassification().fitted(blobs.train)
    attar.train(known, blobs.train, task, epochs=4, batch_size=16)
    verdict = run(few(blobs, teacher=known), folder=tmp_path / "run")
    assert [told["arm"] for told in fits] == ["baseline", "distilled"]
    assert set(verdict.saw) == {"baseline", "distilled"}


def test_a_validation_part_of_the_data_is_not_used(blobs: Splits) -> None:
    """Who has 30 labels has no others."""
    rows = blobs.test.rows(torch.arange(40))
    other = attar.data.TensorSource(rows["inputs"], rows["labels"], classes=blobs.test.classes)
    parts = prepare(few(ThreeSplits(blobs.train, other, blobs.test))).parts
    assert points(parts.validation) < points(blobs.train)
    assert parts.test is blobs.test


def test_a_stage_on_labels_gives_both_arms_the_few(
    blobs: Splits, tmp_path: Path, fits: Told
) -> None:
    tunes = partial(attar.train, epochs=1, batch_size=16)
    verdict = run(few(blobs, stages=[TEACHES, tunes]), folder=tmp_path / "run")
    seen = [len(points(told["data"])) for told in fits if told["arm"] != "teacher"]
    assert seen == [FEW - HELD, FEW - HELD, ROWS - HELD, FEW - HELD]
    assert (verdict.saw["distilled"].rows, verdict.saw["distilled"].labelled) == (151, 21)
    assert "21 labelled" in (tmp_path / "run/report.html").read_text()


def test_the_units_of_a_regression_come_from_the_few(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 3)
    splits = attar.data.tensors(inputs[:150], inputs[:150, :1], inputs[150:], inputs[150:, :1])
    stage = partial(attar.distill, terms=[attar.Term(attar.losses.mse)], label_weight=0)
    job = prepare(few(splits, task=attar.tasks.Regression, stages=[stage], labels=20))
    own = job.parts.labelled.labels
    assert own is not None
    assert len(own) == 14
    assert job.task.mean == pytest.approx(own.double().mean(0).tolist())


# ---------------------------------------------------------------- what is told


def test_the_verdict_and_the_report_say_what_each_arm_saw(blobs: Splits, tmp_path: Path) -> None:
    said: list[str] = []
    verdict = run(few(blobs), folder=tmp_path / "run", say=said.append)
    assert said[0] == "data       tensors: 151 train, 21 of them labelled, 9 validation, 80 test"
    assert "the baseline of 21 labels: accuracy" in verdict.headline
    told = json.loads((tmp_path / "run/verdict.json").read_text())
    assert told["saw"] == {
        "teacher": {"rows": 21, "labelled": 21},
        "baseline": {"rows": 21, "labelled": 21},
        "distilled": {"rows": 151, "labelled": 0},
    }
    (row,) = told["table"]["sections"][0]["rows"]
    cells = [(cell["text"], cell["note"]) for cell in row["cells"]]
    assert cells == [("21", "all labelled"), ("21", "all labelled"), ("151", "no labels")]
    page = (tmp_path / "run/report.html").read_text()
    assert "trained on the 21 rows that have labels" in page
    assert "151<small>no labels</small>" in page
    assert "start, data, steps" not in page


def test_the_plan_says_it_before_anything_is_trained(
    blobs: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(check(few(blobs)))
    said = capsys.readouterr().out
    for line in ("teacher 21 rows, 21 labelled", "distilled 151 rows, 0 labelled", "as many steps"):
        assert line in said


def test_where_all_see_the_same_nothing_is_said_of_it(
    blobs: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = few(blobs, labels=None)
    print_plan(check(recipe))
    assert "learn from" not in capsys.readouterr().out
    verdict = run(recipe, folder=tmp_path / "run")
    assert "the baseline: accuracy" in verdict.headline
    assert "training rows" not in json.dumps(verdict.to_json()["table"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": 160}, "labels is 160, but it must be less than the 160 training rows"),
        ({"labels": 2}, "labels is 2, but train tensors has 3 classes.*give 30 or more"),
        ({"labels": 3}, "is empty; give more rows or a larger fraction"),
        ({"stages": [partial(TEACHES, label_weight=0.1)]}, "stage 0 has label_weight 0.1"),
        ({"stages": [partial(attar.distill, terms=[SOFT])]}, "stage 0 has label_weight 0.1"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    blobs: Splits, change: dict[str, Any], says: str
) -> None:
    with pytest.raises((PreflightError, DataError), match=says):
        check(few(blobs, **change))


def test_labels_and_examples_cannot_stand_together(blobs: Splits) -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        few(blobs, examples=40)


def test_data_without_labels_have_none_to_keep(blobs: Splits) -> None:
    bare = Unlabelled(blobs.train)
    with pytest.raises(PreflightError, match="train tensors has none at all; leave labels out"):
        check(few(Splits(bare, blobs.test)))


def test_a_class_that_would_have_no_labels_is_named(blobs: Splits) -> None:
    rows = blobs.train.rows(torch.arange(ROWS))
    rare = rows["labels"].clamp(max=1)
    rare[7] = 2
    train = attar.data.TensorSource(rows["inputs"], rare, classes=("a", "b", "rare"))
    with pytest.raises(PreflightError, match="no labelled row of the class 'rare'"):
        check(few(Splits(train, blobs.test)))


def test_without_a_teacher_to_ask_the_other_rows_are_of_no_use(
    blobs: Splits, tmp_path: Path
) -> None:
    start = attar.models.build("mlp", data=blobs.train, widths=[4])
    stage = partial(attar.train, init=start, epochs=1)
    with pytest.raises(PreflightError, match="write examples: 30 instead"):
        check(few(blobs, stages=[stage]))


def test_a_file_says_it_in_one_key(write: Callable[..., Path]) -> None:
    path = write("stages:", "labels: 100\nstages:", "label_weight: 0.1", "label_weight: 0")
    plan = check(path)
    assert plan["data"]["train"] + plan["data"]["validation"] == 1078
    assert plan["saw"]["baseline"] == {"rows": 90, "labelled": 90}
    with pytest.raises(PreflightError, match="7:9: labels is 0: it must be greater"):
        load_recipe(write("stages:", "labels: 0\nstages:"))


# ---------------------------------------------------------------- fewer examples


def test_with_examples_the_teacher_is_given_all_rows(
    blobs: Splits, tmp_path: Path, fits: Told
) -> None:
    stage = partial(TEACHES, label_weight=0.1)
    recipe = few(blobs, labels=None, examples=60, stages=[stage], validation=0.1)
    verdict = run(recipe, folder=tmp_path / "run")
    rows = {told["arm"]: len(points(told["data"])) for told in fits}
    assert rows == {"teacher": 144, "baseline": 60, "distilled": 60}
    assert verdict.saw["teacher"].rows == 144
    assert "the baseline: accuracy" in verdict.headline


# ---------------------------------------------------------------- a few as many


def test_a_few_rows_are_repeated_evenly_over_the_epochs(blobs: Splits) -> None:
    rows = attar.data.Subset(blobs.train, torch.arange(7))
    source = Repeated(rows, 17)
    names = {tuple(row): i for i, row in enumerate(rows.rows(torch.arange(7))["inputs"].tolist())}
    counts = torch.zeros(7, dtype=torch.int64)
    for number in range(5):
        batches = list(source.epoch(number, batch_size=4, seed=0))
        assert [len(batch["ids"]) for batch in batches] == [4, 4, 4, 4, 1]
        for batch in batches:
            for row, label in zip(batch["inputs"].tolist(), batch["labels"].tolist(), strict=True):
                counts[names[tuple(row)]] += 1
                assert label == names[tuple(row)] % 3
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == 5 * 17


def test_an_epoch_of_repeats_goes_on_where_it_was_left(blobs: Splits) -> None:
    source = Repeated(attar.data.Subset(blobs.train, torch.arange(7)), 17)
    whole = list(source.epoch(3, batch_size=4, seed=1))
    rest = list(source.epoch(3, batch_size=4, seed=1, start=2))
    assert [b["inputs"].tolist() for b in rest] == [b["inputs"].tolist() for b in whole[2:]]
