"""Scores by hand, and what tasks refuse."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.runtime import DataError
from attar.tasks import restore

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 1])


def image_task() -> attar.tasks.ImageClassification:
    return attar.tasks.ImageClassification(classes=("cat", "dog"))


def table(labels: Tensor, classes: int | None = None) -> attar.data.Source:
    return attar.data.TensorSource(torch.zeros(len(labels), 3), labels, classes=classes)


def test_scores_of_a_classification_by_hand() -> None:
    task, rows = image_task(), {"logits": LOGITS, "labels": LABELS}
    scores = task.score(rows)
    assert scores["accuracy"] == 0.5  # a tie answers the first class
    assert task.per_class(rows) == {"cat": 1.0, "dog": pytest.approx(1 / 3)}
    assert scores["balanced_accuracy"] == pytest.approx(2 / 3)
    right = [math.exp(2) / (1 + math.exp(2)), math.e / (1 + math.e), 1 / (1 + math.exp(3)), 0.5]
    assert scores["cross_entropy"] == pytest.approx(-sum(map(math.log, right)) / 4, rel=1e-6)
    assert task.floor(LABELS) == 0.75


def test_calibration_error_by_hand() -> None:
    """Four examples in four bins: the mean of |right - confidence|."""
    confidence = torch.tensor([0.95, 0.85, 0.75, 0.65])
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    rows = {"logits": logits, "labels": torch.tensor([0, 0, 1, 0])}
    expected = (0.05 + 0.15 + 0.75 + 0.35) / 4
    assert image_task().score(rows)["calibration_error"] == pytest.approx(expected, rel=1e-6)


def test_a_class_without_examples_does_not_spoil_the_others() -> None:
    rows = {"logits": LOGITS[:1], "labels": LABELS[:1]}
    assert image_task().score(rows)["balanced_accuracy"] == 1.0
    assert math.isnan(image_task().per_class(rows)["dog"])


def test_agreement_is_about_answers_not_labels() -> None:
    same = image_task().agreement({"logits": LOGITS}, {"logits": LOGITS + 5})
    assert same["agreement"] == 1.0
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert image_task().agreement({"logits": LOGITS}, {"logits": -LOGITS})["agreement"] == 0.25


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: {"logits": x, "hidden": x * 0},
        lambda x: (x, x * 0),
        lambda x: type("Output", (), {"logits": x})(),
    ],
    ids=["tensor", "dict", "tuple", "object"],
)
def test_an_output_is_found_in_any_common_form(form: object) -> None:
    assert torch.equal(image_task().output(form(LOGITS), "logits"), LOGITS)  # type: ignore[operator]


def test_an_output_that_is_not_there_is_explained() -> None:
    with pytest.raises(DataError, match=r"no 'logits'.*choose from: scores"):
        image_task().output({"scores": LOGITS}, "logits")


def test_classes_come_from_the_data() -> None:
    assert attar.tasks.ImageClassification().fitted(table(LABELS, 2)).width == 2


@pytest.mark.parametrize(
    ("task", "labels", "classes", "says"),
    [
        (image_task(), LABELS, 3, "task has 2 classes but .* has 3"),
        (image_task(), torch.tensor([0, 1, 2]), None, "row 2 is 2, but with 2 classes .* 0 to 1"),
        (attar.tasks.ImageClassification(), LABELS, None, "give the task classes: N"),
        (image_task(), torch.rand(4, 1), None, "use regression"),
        (attar.tasks.Regression(), LABELS, None, "use a classification task"),
        (attar.tasks.Regression(targets=2), torch.rand(4, 1), None, "2 targets but .* has 1"),
    ],
)
def test_data_that_contradict_the_task_are_refused(
    task: attar.tasks.Task, labels: Tensor, classes: int | None, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        task.fitted(table(labels, classes))


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2 classes, not 1"):
        attar.tasks.ImageClassification(classes=1)
    with pytest.raises(DataError, match=r"label_smoothing is 1\.0"):
        attar.tasks.ImageClassification(classes=3, label_smoothing=1.0)


class Constant(nn.Module):
    """Always answers 0: the mean, in standardised units."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2)


def test_regression_learns_in_units_of_the_data_and_scores_in_their_own() -> None:
    labels = torch.tensor([[10.0, 1.0], [20.0, 1.0], [30.0, 1.0]])
    source = table(labels)
    task = attar.tasks.Regression().fitted(source)
    assert task.mean == (20.0, 1.0)
    assert task.std == pytest.approx((math.sqrt(200 / 3), 1.0))  # a constant target has unit 1
    batch = source.rows(torch.arange(3))
    out = task.forward(Constant(), batch)
    torch.testing.assert_close(task.loss(out, batch).mean(), torch.tensor(0.5))
    rows = task.rows(out, batch)
    assert rows["values"].tolist() == [[20.0, 1.0]] * 3
    assert task.score(rows)["rmse"] == pytest.approx(math.sqrt(200 / 6))
    assert task.score(rows)["rmse"] == pytest.approx(task.floor(labels))
    assert task.score(rows)["r2"] == pytest.approx(0.0)


def test_a_regression_without_units_is_refused() -> None:
    task = attar.tasks.Regression(targets=2)
    with pytest.raises(DataError, match=r"task\.fitted\(train\)"):
        task.rows(torch.zeros(3, 2), {"inputs": torch.zeros(3, 1)})


@pytest.mark.parametrize(
    "task",
    [
        attar.tasks.ImageClassification(classes=("cat", "dog")),
        attar.tasks.TabularClassification(classes=("a", "b", "c")),
        attar.tasks.Regression(targets=1, mean=(2.0,), std=(3.0,)),
    ],
)
def test_a_task_comes_back_from_its_description(task: attar.tasks.Task) -> None:
    assert restore(json.loads(json.dumps(task.describe()))) == task


def test_a_model_without_a_task_is_said() -> None:
    for wrong in (None, {"name": "os.system"}, {"name": "Regression", "targes": 2}):
        with pytest.raises(DataError):
            restore(wrong)
