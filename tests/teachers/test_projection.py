"""A teacher of other classes answers in the student's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.runtime import UsageError
from attar.teachers import Carried, adapted, project, renamed

TASK = attar.tasks.ImageClassification(classes=("a", "b"))


class Says(nn.Module):
    """Gives the logits that stand in the first pixels of each image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(images.flatten(1)[:, : self.count])


def data(logits: Tensor, labels: list[int]) -> Any:
    images = logits.reshape(len(logits), 1, 1, -1)
    return attar.data.TensorSource(images, torch.tensor(labels), classes=("a", "b"))


def test_it_is_the_empirical_predictor() -> None:
    """LEEP's own formula, written as sums over examples, classes and labels."""
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), [index % 2 for index in range(40)]
    found = project(Says(3), data(logits, labels), TASK)
    chances = logits.double().softmax(1)
    joint = torch.zeros(3, 2, dtype=torch.float64)
    for chance, label in zip(chances, labels, strict=True):
        joint[:, label] += chance
    expected = chances @ (joint / joint.sum(1, keepdim=True))
    said = found.eval()(logits.reshape(40, 1, 1, 3)).double().exp()
    torch.testing.assert_close(said, expected, atol=1e-3, rtol=1e-3)


def test_every_row_counts_also_where_there_are_many() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(700, 3), [int(index > 300) for index in range(700)]
    found = project(Says(3), data(logits, labels), TASK)
    joint = logits.softmax(1).T @ torch.nn.functional.one_hot(torch.tensor(labels)).float()
    table = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(found.table, table, atol=1e-4, rtol=1e-3)


def test_a_class_that_the_teacher_never_expects_says_nothing_of_ours() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e4], [1.0, 0.0, -1e4]])
    found = project(Says(3), data(logits, [0, 1]), TASK)
    assert found.table is not None
    torch.testing.assert_close(found.table[2], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_may_be_narrow_and_give_its_logits_in_an_object(dtype: torch.dtype) -> None:
    class Wrapped(Says):
        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(images).to(dtype))

    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    plain, wrapped = (project(kind(3), data(logits, [0, 1]), TASK) for kind in (Says, Wrapped))
    images = logits.reshape(2, 1, 1, 3)
    said = wrapped.eval()(images)
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, plain.eval()(images), rtol=0, atol=0.01)


def test_what_gives_no_logits_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gives a Tensor, and what is projected are logits"):
        Carried(nn.Identity(), torch.eye(2))(torch.randn(3, 1, 2, 2))


def test_answers_are_distributions_also_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]])
    found = project(Says(3), data(logits, [0, 1, 0]), TASK).eval()
    said = found(logits.reshape(3, 1, 1, 3))
    assert bool(said.isfinite().all())
    torch.testing.assert_close(said.exp().sum(1), torch.ones(3))


def test_a_teacher_that_tells_the_classes_apart_by_other_names_is_perfect() -> None:
    labels = [0, 0, 1, 1, 0, 1]
    logits = torch.nn.functional.one_hot(torch.tensor([2, 2, 0, 0, 2, 0]), 3) * 12.0
    source = data(logits, labels)
    found = project(Says(3), source, TASK)
    assert attar.evaluate(found, source, TASK).scores["accuracy"] == 1.0


def test_the_model_is_left_as_it_was_found() -> None:
    model = Says(3).train()
    project(model, data(torch.randn(4, 3), [0, 1, 0, 1]), TASK)
    assert model.training
    assert model.drop.training


def test_classes_are_carried_over_by_name() -> None:
    found = renamed(Says(4), ["w", "x", "y", "z"], TASK, {"a": ["x", "w"], "b": ["z"]})
    logits = torch.tensor([[1.0, 2.0, 9.0, 0.5]])
    share = logits.exp()[0]
    kept = share[0] + share[1] + share[3]  # y is none of ours, however sure the teacher is of it
    expected = torch.stack([share[0] + share[1], share[3]]) / kept
    torch.testing.assert_close(found.eval()(logits.reshape(1, 1, 1, 4)).exp()[0], expected)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"a": ["x"]}, "'b' has no class of the teacher"),
        ({"a": ["x"], "c": ["y"]}, "the data have no class 'c'"),
        ({"a": ["x"], "b": ["yy"]}, r"the teacher has no class 'yy'; did you mean 'y'\?"),
        ({"a": ["x", "y"], "b": ["y"]}, "'y' stands twice"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(classes: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        renamed(Says(2), ["x", "y"], TASK, classes)


def test_unlabelled_data_cannot_teach_the_projection() -> None:
    source = attar.data.TensorSource(torch.randn(4, 1, 1, 3), classes=2)
    with pytest.raises(UsageError, match="has no labels to project"):
        project(Says(3), source, TASK)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_fitted_to_what_the_model_was_built_for(channels: int) -> None:
    model = attar.models.build("mlp", shape=(channels, 6, 6), outputs=4, widths=[3]).eval()
    found = Carried(model, torch.full((4, 2), 0.5), shape=(channels, 6, 6)).eval()
    for theirs in (1, 3):
        assert found(torch.rand(2, theirs, 9, 12)).shape == (2, 2)
    same = torch.rand(2, channels, 6, 6)
    table = Carried(model, torch.eye(4), shape=(channels, 6, 6))
    torch.testing.assert_close(table(same), model(same).log_softmax(1))
    other = torch.rand(2, 4 - channels, 6, 6)
    seen = other.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    torch.testing.assert_close(table(other), model(seen).log_softmax(1))


def test_rows_that_teach_the_projection_are_fitted_to_the_model_too() -> None:
    model = attar.models.build("mlp", shape=(1, 6, 6), outputs=4, widths=[3])
    source = attar.data.TensorSource(torch.rand(8, 3, 9, 9), torch.arange(8) % 2, classes=2)
    assert project(model, source, TASK)(torch.rand(2, 3, 9, 9)).shape == (2, 2)


def test_a_student_learns_from_it(digits: attar.data.Splits) -> None:
    """A teacher of two classes, even and odd in other words, is a teacher of ten."""
    task = attar.tasks.ImageClassification().fitted(digits.train)
    torch.manual_seed(0)
    model = attar.models.build("resnet", shape=(1, 8, 8), outputs=3, width=4)
    teacher = attar.Teacher(project(model, digits.train, task), task)
    student = attar.models.build("resnet", data=digits.train, width=4)
    rows = attar.data.Subset(digits.train, torch.arange(64))
    attar.distill(student, teacher, rows, task, [attar.Term(attar.losses.kl_divergence)], epochs=1)


# ---------------------------------------------------------------- other inputs, fewer classes


class Shape(nn.Module):
    """Says what images it was given."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.flatten(1)[:, :2]


def test_a_teacher_reads_images_of_its_own_size_and_then_its_own_transform() -> None:
    model = Shape()
    images = torch.rand(2, 3, 8, 12)
    adapted(model, TASK, size=(4, 6), transform=lambda images: images * 2 - 1)(images)
    resized = nn.functional.interpolate(images, [4, 6], mode="bilinear", antialias=True)
    torch.testing.assert_close(model.seen, resized * 2 - 1)
    adapted(model, TASK, size=8)(images)
    assert model.seen.shape == (2, 3, 8, 8)


def test_the_size_that_a_model_was_built_for_is_known() -> None:
    model = attar.models.build("mlp", shape=(1, 6, 6), outputs=2, widths=[3])
    assert adapted(model, TASK)(torch.rand(2, 3, 9, 9)).shape == (2, 2)
    assert adapted(model, TASK, size=6)(torch.rand(2, 3, 9, 9)).shape == (2, 2)


def test_what_is_not_adapted_is_what_the_model_gives() -> None:
    images = torch.randn(3, 1, 1, 2)
    assert torch.equal(adapted(Says(2).eval(), TASK)(images), images.flatten(1))


def test_a_teacher_of_some_classes_gives_the_others_next_to_nothing() -> None:
    task = attar.tasks.ImageClassification(classes=("a", "b", "c", "d"))
    found = adapted(Says(3).eval(), task, classes=("d", None, 0))
    logits = torch.tensor([[1.0, 9.0, 2.0]])
    said = found(logits.reshape(1, 1, 1, 3))[0]
    share = torch.tensor([2.0, 1.0]).softmax(0)
    torch.testing.assert_close(said.exp(), torch.tensor([share[0], 0.0, 0.0, share[1]]))
    assert bool(said.isfinite().all())
    assert found.known is not None
    assert found.known.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("a", "e"), "the task has no class 'e'"),
        (("a", 2), "the task has no class '2'"),
        (("a", 0), "'a' stands twice"),
        (("a", None), "at least two"),
    ],
)
def test_classes_that_are_not_the_students_are_refused(classes: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        adapted(Says(2), TASK, classes=classes)


def test_every_output_needs_a_class() -> None:
    with pytest.raises(UsageError, match="has 3 classes, but 2 are named"):
        adapted(Says(3), TASK, classes=("a", "b"))(torch.randn(2, 1, 1, 3))
    with pytest.raises(UsageError, match="that knows its classes"):
        adapted(Says(3), attar.tasks.ImageClassification(), classes=("a", "b"))
