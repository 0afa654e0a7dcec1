"""Contrast within the batch by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attar.losses import contrast


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_value_is_the_definition(temperature: float) -> None:
    student, teacher = points(7, 5), points(7, 5, seed=1)
    s, t = (
        x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (student, teacher)
    )
    e = np.exp(s @ t.T / temperature)
    wanted = -np.log(np.diag(e) / e.sum(1)).mean()
    value = contrast(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(wanted, rel=1e-9)


def test_equal_features_of_all_examples_are_chance() -> None:
    assert contrast(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8))


def test_the_own_teacher_is_better_than_another_examples() -> None:
    teacher = points(6, 5)
    assert contrast(teacher, teacher) < 0.1 < contrast(teacher.roll(1, 0), teacher)


def test_length_of_vectors_and_common_rotation_change_nothing() -> None:
    student, teacher = points(6, 5), points(6, 5, seed=1)
    rotation = torch.linalg.qr(points(5, 5, seed=2)).Q
    torch.testing.assert_close(
        contrast(9 * student @ rotation, teacher @ rotation / 7), contrast(student, teacher)
    )


def test_alone_there_is_nothing_to_tell_apart() -> None:
    student = points(1, 5).requires_grad_()
    value = contrast(student, points(1, 5, seed=1))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_a_zero_vector_gets_no_gradient() -> None:
    student = points(4, 5).float()
    student[1] = 0
    student.requires_grad_()
    contrast(student, points(4, 5, seed=1).float()).backward()
    assert student.grad is not None
    assert (student.grad[1] == 0).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (4, 5, 1), (3, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same shape"):
        contrast(points(4, 5), points(*shape))
