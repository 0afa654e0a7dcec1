"""The numbers of the figures, worked out by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.data import TensorSource
from attar.evaluation import curves
from attar.runtime import DataError
from attar.tasks import ImageClassification, Regression, TabularClassification
from attar.tasks.classification import calibration_error

TASK = ImageClassification(classes=("a", "b"))


def said(*probabilities: float, labels: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Rows of two classes from the probability of the second."""
    second = torch.tensor(probabilities, dtype=torch.double)
    logits = torch.stack([1 - second, second], 1).log()
    return {"logits": logits, "labels": torch.tensor(labels or [0] * len(second))}


def checked(epoch: int, value: Any, seed: int = 0, stage: int = 0, arm: str = "x") -> Any:
    mark = {"arm": arm, "seed": seed, "stage": stage, "epoch": epoch}
    return mark | {"split": "validation", "accuracy": value}


def test_a_line_is_the_mean_between_the_lowest_and_the_highest_seed() -> None:
    records = [checked(e, v, s) for s in (0, 1) for e, v in ((0, 0.5 + 0.2 * s), (1, 0.8))]
    assert curves.validation(records, "accuracy") == [
        {"arm": "x", "seeds": 2, "points": [[1, pytest.approx(0.6), 0.5, 0.7], [2, 0.8, 0.8, 0.8]]}
    ]


def test_epochs_count_on_through_stages_and_the_last_word_counts() -> None:
    records = [checked(0, 0.9, stage=1), checked(1, 0.1), checked(0, 0.5), checked(1, 0.7)]
    records += [checked(1, None, stage=1), {"arm": "x", "split": "train"}]
    line = curves.validation(records, "accuracy")[0]
    assert [point[:2] for point in line["points"]] == [[1, 0.5], [2, 0.7], [3, 0.9]]


def test_an_epoch_that_one_seed_lacks_is_not_a_mean() -> None:
    records = [checked(e, 0.1 * e, s) for s, amount in ((0, 4), (1, 3)) for e in range(amount)]
    assert [p[0] for p in curves.validation(records, "accuracy")[0]["points"]] == [1, 2, 3]
    assert curves.validation([checked(0, 0.5)], "accuracy") == [], "one point is no line"


def test_a_long_line_keeps_its_ends_and_is_bounded() -> None:
    line = curves.validation([checked(e, 0.5) for e in range(5000)], "accuracy")[0]["points"]
    assert len(line) == curves.MOST_POINTS
    assert (line[0][0], line[-1][0]) == (1, 5000)


def stepped(epoch: int, step: int, stage: int = 0, arm: str = "distilled", **terms: Any) -> Any:
    mark = {"arm": arm, "seed": 0, "stage": stage, "epoch": epoch, "step": step}
    return mark | {"split": "train", "terms": terms}


def test_a_loss_is_the_mean_over_the_steps_of_an_epoch() -> None:
    """Records of 3 and 1 steps weigh 3 to 1."""
    records = [stepped(0, 3, kl=1.0), stepped(0, 4, kl=5.0), stepped(1, 8, kl=0.5)]
    records.append(stepped(0, 4, arm="teacher", labels=9.0))
    assert curves.losses(records) == [
        {"arm": "distilled", "term": "kl", "seeds": 1, "points": [[1, 2, 2, 2], [2, 0.5, 0.5, 0.5]]}
    ]


def test_a_term_of_the_second_stage_begins_there() -> None:
    records = [stepped(e, e + 1, stage=s, **{f"t{s}": 1.0}) for s in (0, 1) for e in (0, 1)]
    found = {line["term"]: [p[0] for p in line["points"]] for line in curves.losses(records)}
    assert found == {"t0": [1, 2], "t1": [3, 4]}


def test_class_changes_are_after_minus_before_with_the_best_first() -> None:
    labels = [0, 0, 1, 1]
    models = {
        "teacher": [said(0.1, 0.1, 0.9, 0.9, labels=labels)],
        "baseline": [said(*first, labels=labels) for first in ((0.9,) * 4, (0.9, 0.1, 0.9, 0.9))],
        "distilled": [said(0.1, 0.1, 0.1, 0.9, labels=labels)] * 2,
    }  # fmt: skip
    found = curves.class_changes(TASK, models)
    assert found is not None
    assert (found["against"], found["of"]) == ("baseline", 2)
    first, second = found["rows"]
    assert first == {"name": "a", "teacher": 1.0, "before": 0.25, "after": 1.0,
                     "change": 0.75, "low": 0.5, "high": 1.0}  # fmt: skip
    assert (second["name"], second["change"]) == ("b", -0.5)


def test_the_start_stands_in_and_absent_classes_are_left_out() -> None:
    task = TabularClassification(classes=("a", "b", "c"))
    rows = {"logits": torch.eye(3)[[0, 1]], "labels": torch.tensor([0, 1])}
    found = curves.class_changes(task, {"start": [rows], "distilled": [rows, rows]})
    assert found is not None
    assert found["against"] == "start"
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    assert curves.class_changes(task, {"distilled": [rows]}) is None


def test_only_the_classes_that_changed_most_are_kept() -> None:
    task = TabularClassification(classes=100)
    labels = torch.arange(100)
    before = {"logits": torch.eye(100), "labels": labels}
    after = {"logits": torch.eye(100).roll(1, 0), "labels": labels}
    after["logits"][:80] = torch.eye(100)[:80]
    found = curves.class_changes(task, {"baseline": [before], "distilled": [after]})
    assert found is not None
    assert len(found["rows"]) == curves.MOST_CLASSES
    assert {str(n) for n in range(80, 100)} <= {row["name"] for row in found["rows"]}


def test_the_bins_give_the_calibration_error() -> None:
    torch.manual_seed(0)
    rows = [
        {"logits": 2 * torch.randn(200, 4), "labels": torch.randint(4, (200,))} for _ in range(2)
    ]
    both = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
    bins = curves.calibration(rows)
    assert sum(b["share"] for b in bins) == pytest.approx(1)
    error = sum(b["share"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    assert error == pytest.approx(calibration_error(both["logits"], both["labels"]))
    assert all(b["share"] > 0 for b in bins)


def images(amount: int, *shape: int) -> TensorSource:
    inputs = torch.arange(amount * torch.Size(shape).numel()).reshape(amount, *shape).float()
    return TensorSource(inputs / inputs.max(), torch.zeros(amount, dtype=torch.long), classes=2)


def test_the_largest_disagreements_come_first_with_their_pixels() -> None:
    source = images(4, 1, 2, 3)
    models = {
        "teacher": [said(0.1, 0.2, 0.4, 0.6)],
        "distilled": [said(0.1, 0.1, 0.1, 0.1), said(0.2, 0.9, 0.6, 0.9)],
    }
    found = curves.disagreements(TASK, source, models, best=1)
    assert found is not None
    assert (found["differ"], found["of"]) == (2, 4)
    first, second = found["examples"]
    assert (first["id"], second["id"]) == (1, 2)
    assert first["label"] == "a"
    assert first["teacher"] == {"answer": "a", "probability": pytest.approx(0.8)}
    assert first["student"] == {"answer": "b", "probability": pytest.approx(0.9)}
    expected = (255 * source.rows(torch.tensor([1]))["inputs"]).round().byte().flatten()
    assert list(base64.b64decode(first["pixels"])) == expected.tolist()
    assert (first["height"], first["width"], first["channels"]) == (2, 3, 1)


def test_channels_come_last_and_large_images_shrink() -> None:
    image = torch.zeros(1, 3, 300, 150)
    image[:, 1] = 1.0
    source = TensorSource(image, torch.tensor([0]), classes=2)
    models = {"teacher": [said(0.1)], "distilled": [said(0.9)]}
    found = curves.disagreements(TASK, source, models)
    assert found is not None
    example = found["examples"][0]
    assert (example["height"], example["width"], example["channels"]) == (64, 32, 3)
    assert base64.b64decode(example["pixels"])[:6] == bytes([0, 255, 0] * 2)


def test_pixels_that_were_normalised_are_stretched() -> None:
    source = TensorSource(torch.tensor([[[[-2.0, 0.0, 2.0]]]]), torch.tensor([0]), classes=2)
    found = curves.disagreements(TASK, source, {"teacher": [said(0.1)], "distilled": [said(0.9)]})
    assert found is not None
    assert list(base64.b64decode(found["examples"][0]["pixels"])) == [0, 128, 255]


def test_data_that_are_no_images_show_none() -> None:
    models = {"teacher": [said(0.1)], "distilled": [said(0.9)]}
    table = TensorSource(torch.zeros(1, 3), torch.tensor([0]), classes=2)
    assert curves.disagreements(TASK, table, models) is None
    assert curves.disagreements(TASK, images(1, 1, 2, 2), {"distilled": [said(0.9)]}) is None


def test_numbers_have_no_classes_and_no_calibration(tmp_path: Path) -> None:
    labels = torch.linspace(0, 1, 4)[:, None]
    source = TensorSource(labels, labels)
    rows = {"values": labels, "labels": labels}
    models = {"teacher": [rows], "baseline": [rows], "distilled": [rows]}
    task = Regression().fitted(source)
    found = curves.figures(task, source, models, log=tmp_path / "metrics.jsonl")
    assert found["calibration"] == {}
    assert found["classes"] is found["disagreements"] is None


def test_the_file_stays_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = TensorSource(torch.rand(50, 3, 96, 96), torch.arange(50) % 2, classes=2)
    rows = [{"logits": torch.randn(50, 2), "labels": source.labels} for _ in range(3)]
    with (tmp_path / "metrics.jsonl").open("w") as log:
        for epoch in range(2000):
            log.write(json.dumps(stepped(epoch, epoch + 1, a=1.0, b=2.0)) + "\n")
            log.write(json.dumps(checked(epoch, 0.5)) + "\n")
    models = dict(zip(("teacher", "baseline", "distilled"), ([each] for each in rows), strict=True))
    found = curves.figures(TASK, source, models, log=tmp_path / "metrics.jsonl")
    assert len(found["disagreements"]["examples"]) == curves.MOST_EXAMPLES
    assert len(json.dumps(found)) < 400_000


def test_a_log_that_was_cut_off_is_read_and_a_broken_one_named(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(checked(epoch, 0.5)) + "\n" for epoch in (0, 1))
    source, models = images(1, 1, 2, 2), {"distilled": [said(0.9)]}
    log.write_text(whole + '3\n{"arm": 5}\n{"split": "validation", "ar')
    found = curves.figures(TASK, source, models, log=log)
    assert len(found["validation"][0]["points"]) == 2
    log.write_text("{\n" + whole)
    with pytest.raises(DataError, match=r"metrics.jsonl:1: is not a JSON record"):
        curves.figures(TASK, source, models, log=log)
