"""Losses where several labels hold: golden values, definitions, no label and all labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attar.losses import kl_divergence, label_embeddings, partial_softmax_kl


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_partial_softmax_is_the_golden_value(oracle: Any) -> None:
    case = oracle("l2d_partial_softmax")
    value = partial_softmax_kl(case.inputs["z_s"], case.inputs["z_t"], case.inputs["target"]).mean()
    case.assert_value(value)
    case.assert_gradient(value, "z_s")


def test_label_embeddings_are_the_golden_value(oracle: Any) -> None:
    case = oracle("l2d_led")
    given = case.inputs["le_s"], case.inputs["le_t"], case.inputs["target"]
    case.assert_value(label_embeddings(*given, classes=1.0, instances=0.0), "cd")
    case.assert_value(label_embeddings(*given, classes=0.0, instances=1.0), "id")
    value = label_embeddings(*given)
    case.assert_value(value)
    case.assert_gradient(value, "le_s")


def test_one_label_that_holds_is_the_whole_softmax() -> None:
    student, teacher = values(4, 6), values(4, 6, seed=1)
    labels = torch.eye(6)[:4]
    wanted = kl_divergence(student, teacher, temperature=1.0)
    torch.testing.assert_close(partial_softmax_kl(student, teacher, labels), wanted)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_no_label_and_all_labels_say_nothing(fill: float) -> None:
    student = values(3, 4).requires_grad_()
    value = partial_softmax_kl(student, values(3, 4, seed=1), torch.full((3, 4), fill))
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_vectors_of_labels_that_do_not_hold_do_not_count() -> None:
    student, teacher = values(4, 3, 5), values(4, 3, 2, seed=1)
    labels = (values(4, 3, seed=2) > 0).double()
    moved = student + 9 * (1 - labels)[:, :, None]
    value = label_embeddings(student, teacher, labels)
    torch.testing.assert_close(label_embeddings(moved, teacher, labels), value)
    assert label_embeddings(student, teacher, 0 * labels).item() == 0


def test_labels_that_coincide_are_finite() -> None:
    student = torch.zeros(3, 4, 5, requires_grad=True)
    value = label_embeddings(student, torch.zeros(3, 4, 2), torch.ones(3, 4))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_other_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be \[N, C\] of 0 and 1 .*\(3,\)"):
        partial_softmax_kl(values(3, 4), values(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="same number of labels"):
        label_embeddings(values(3, 4, 2), values(3, 5, 2), torch.ones(3, 4))
