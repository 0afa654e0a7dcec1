"""Multi-label: scores equal to scikit-learn's, a loss in binary_kl's units, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from attar.evaluation.judge import judge
from attar.runtime import DataError
from attar.tasks import MultiLabelClassification, restore
from attar.tasks.multilabel import average_precision

NAMES = ("shirt", "bag", "shoe")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, -2.0], [-1.0, 0.5, -0.5], [0.0, -2.0, 1.0]])
LABELS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def task(classes: object = NAMES) -> MultiLabelClassification:
    return MultiLabelClassification(classes=classes)  # type: ignore[arg-type]


def rows(logits: Tensor = LOGITS, labels: Tensor = LABELS) -> dict[str, Tensor]:
    return {"logits": logits, "labels": labels}


def table(labels: Tensor, classes: object = None) -> attar.data.Source:
    return attar.data.TensorSource(torch.zeros(len(labels), 3), labels, classes=classes)  # type: ignore[arg-type]


def drawn(seed: int, *, levels: int, count: int = 60, classes: int = 5) -> dict[str, Tensor]:
    """Logits of a few levels, so that many are equal, and labels of which the last never holds."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels + 1, (count, classes), generator=generator) / 2
    labels = (torch.rand(count, classes, generator=generator) < 0.3).float()
    labels[:, -1] = 0
    return rows(logits, labels)


# Scores


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns_also_with_equal_logits(seed: int, levels: int) -> None:
    from sklearn.metrics import average_precision_score

    given = drawn(seed, levels=levels)
    found = average_precision(given["logits"], given["labels"])
    wanted = [
        average_precision_score(holds, scores)
        for scores, holds in zip(
            given["logits"].T[:-1].numpy(), given["labels"].T[:-1].numpy(), strict=True
        )
    ]
    np.testing.assert_allclose(found[:-1], wanted, rtol=1e-12)
    assert math.isnan(found[-1])
    assert task(5).primary(given) == pytest.approx(np.mean(wanted), rel=1e-12)


def test_average_precision_by_hand() -> None:
    """shirt: right at rank 1 and last of 4; bag: right at ranks 1 and 2; shoe never holds."""
    assert task().per_class(rows()) == {
        "shirt": pytest.approx((1 / 1 + 2 / 4) / 2),
        "bag": 1.0,
        "shoe": pytest.approx(math.nan, nan_ok=True),
    }
    assert task().primary(rows()) == pytest.approx((0.75 + 1) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_f1_and_shares_are_scikit_learns(seed: int) -> None:
    from sklearn import metrics

    given = drawn(seed, levels=3)
    said, holds = (given["logits"] > 0).numpy(), given["labels"].numpy().astype(bool)
    scores = task(5).score(given)
    for kind in ("micro", "macro"):
        wanted = metrics.f1_score(holds, said, average=kind, zero_division=0)
        assert scores[f"{kind}_f1"] == pytest.approx(wanted, rel=1e-12)
    assert scores["subset_accuracy"] == pytest.approx(metrics.accuracy_score(holds, said))
    assert scores["hamming_loss"] == pytest.approx(metrics.hamming_loss(holds, said))
    shares = given["logits"].double().sigmoid().flatten().numpy()
    wanted = metrics.log_loss(holds.flatten(), shares)
    assert scores["binary_cross_entropy"] == pytest.approx(wanted, rel=1e-5)
    assert scores["mean_average_precision"] == task(5).primary(given)


def test_no_answer_and_no_label_score_nothing_rather_than_nan() -> None:
    nothing = rows(-torch.ones(2, 3), torch.zeros(2, 3))
    scores = task().score(nothing)
    assert (scores["micro_f1"], scores["macro_f1"], scores["mean_average_precision"]) == (0, 0, 0)
    assert scores["subset_accuracy"] == 1.0


def test_the_floor_is_what_a_constant_answer_gets() -> None:
    for seed in range(3):
        labels = drawn(seed, levels=1)["labels"]
        constant = rows(torch.ones(len(labels), 5) * torch.arange(5.0), labels)
        assert task(5).floor(labels) == pytest.approx(task(5).primary(constant), rel=1e-6)


def test_agreement_is_about_whole_answers_and_probabilities() -> None:
    other = LOGITS.clone()
    other[0, 1] = 1.0  # one answer of one example turns
    found = task().agreement(rows(), rows(other))
    assert found["agreement"] == 0.75
    p, q = torch.tensor([1.0, -1.0]).sigmoid().tolist()
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found["kl"] == pytest.approx(expected / 4, rel=1e-5)
    assert task().agreement(rows(), rows())["kl"] == pytest.approx(0, abs=1e-6)


# The loss


def test_the_loss_is_binary_cross_entropy_summed_over_the_classes() -> None:
    found = task().loss(LOGITS, {"labels": LABELS})
    p = LOGITS.double().sigmoid()
    wanted = -(LABELS * p.log() + (1 - LABELS) * (1 - p).log()).sum(1)
    assert found.shape == (4,)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_loss_has_the_units_of_binary_kl() -> None:
    """A teacher that is sure of the labels is the labels."""
    sure = (LABELS - 0.5) * 80
    wanted = attar.losses.binary_kl(LOGITS, sure)
    torch.testing.assert_close(task().loss(LOGITS, {"labels": LABELS}), wanted)


def test_the_loss_is_finite_for_large_logits_and_takes_mixed_labels() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = task().loss(logits, {"labels": torch.tensor([[0.0, 1.0, 0.25]])})
    value.sum().backward()
    assert value.item() == pytest.approx(2e4 + math.log(2))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.25]]))


def test_a_loss_in_half_precision_is_in_float32() -> None:
    assert task().loss(LOGITS.bfloat16(), {"labels": LABELS}).dtype is torch.float32


# What fits and what does not


def test_class_names_come_from_the_data() -> None:
    fitted = MultiLabelClassification().fitted(table(LABELS, NAMES))
    assert (fitted.width, fitted.names()) == (3, list(NAMES))


@pytest.mark.parametrize(
    ("made", "labels", "classes", "says"),
    [
        (task(), LABELS, ["a", "b", "c"], "classes are shirt, bag, shoe but .* has a, b, c"),
        (task(2), LABELS, 3, "task has 2 classes but .* has 3"),
        (task(), torch.tensor([0, 1, 2]), NAMES, r"labels are \[N\].*\[N, 3\] of 0 and 1; for one"),
        (task(), torch.rand(4, 2), None, r"labels are \[N, 2\]"),
        (task(), LABELS * 2, None, "labels of row 0 are not all 0 or 1"),
        (task(), torch.zeros(4, 3), NAMES, "no class holds in any of its rows"),
        (MultiLabelClassification(), LABELS, None, "give the task classes: N"),
        (attar.tasks.ImageClassification(), LABELS, 3, "use multi-label-classification, or"),
        (attar.tasks.TabularClassification(), LABELS, 3, r"labels\.argmax\(1\) for one-hot"),
        (attar.tasks.Regression(), LABELS, 3, "use multi-label-classification"),
    ],
)
def test_data_and_task_that_do_not_fit_are_refused(
    made: attar.tasks.Task, labels: Tensor, classes: object, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        made.fitted(table(labels, classes))


def test_a_task_needs_a_class_and_an_output_of_its_width() -> None:
    with pytest.raises(DataError, match="at least 1 class, not 0"):
        MultiLabelClassification(classes=())
    with pytest.raises(DataError, match=r"expected \[N, 3\]"):
        task().loss(LOGITS[:, :2], {"labels": LABELS[:, :2]})


@pytest.mark.parametrize("classes", [NAMES, 3])
def test_a_task_comes_back_from_its_description(classes: object) -> None:
    again = restore(json.loads(json.dumps(task(classes).describe())))
    assert again == task(classes)


# A verdict


def better(labels: Tensor, noise: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return rows(labels + noise * torch.randn(labels.shape, generator=generator) - 0.5, labels)


def test_a_verdict_compares_by_the_paired_bootstrap_and_counts_each_class() -> None:
    labels = (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    found = judge(
        task(),
        teacher=better(labels, 0.3, 1),
        baseline=[better(labels, 2.0, 2)],
        distilled=[better(labels, 0.5, 3)],
        retain=0.9,
        resamples=100,
    )
    assert found.outcome == "better"
    assert found.difference is not None
    assert found.difference.test == "bootstrap"
    assert found.labels == tuple(labels.sum(0).long().tolist())
    told = found.to_json()
    assert told["percent"] is True
    assert told["class_table"]["caption"] == "Average precision of each class, in percent"
    assert [row["cells"][0] for row in told["class_table"]["rows"]] == list(NAMES)
    assert "mean average precision" in found.headline


def test_a_student_learns_several_labels_and_comes_back_with_its_task(tmp_path: object) -> None:
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    y = x[:, :3] > 0.2  # each label has an input of its own
    data = attar.data.tensors(x[:400], y[:400], x[400:], y[400:])
    fitted = MultiLabelClassification().fitted(data.train)
    torch.manual_seed(0)
    teacher = attar.models.build("mlp", data=data.train, widths=[32])
    attar.train(teacher, data.train, fitted, epochs=15, batch_size=32)
    student = attar.models.build("mlp", data=data.train, widths=[4])
    term = attar.Term(attar.losses.binary_kl, weight=0.9)
    attar.distill(student, attar.Teacher(teacher, fitted), data.train, fitted, [term], epochs=15)
    found = attar.evaluate(student, data.test, fitted)
    labels = data.test.labels
    assert labels is not None
    assert found["mean_average_precision"] > 0.8 > fitted.floor(labels)
    assert found["micro_f1"] > 0.8
    plain = F.binary_cross_entropy_with_logits(found.rows["logits"], labels)
    assert found["binary_cross_entropy"] == pytest.approx(plain.item())


def test_an_export_tells_what_its_logits_mean(tmp_path: object) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    folder = f"{tmp_path}/out"
    example = torch.rand(4, 1, 4, 4)
    attar.exporting.export(net, folder, example=example, task=task(), formats=["safetensors"])
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert "the sigmoid of each is its probability" in card
    assert "classes (3): shirt, bag, shoe" in card
    assert "pixels / 255" in card
