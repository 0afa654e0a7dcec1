"""Mean squared error by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attar.losses import mse


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 4), (6, 3, 4, 2), (0, 5), (0, 3, 4)])
def test_mse_is_the_mean_over_all_but_the_first_dimension(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    student, teacher = random.standard_normal(shape), random.standard_normal(shape)
    wanted = ((student - teacher) ** 2).reshape(shape[0], math.prod(shape[1:])).mean(1)
    value = mse(torch.from_numpy(student), torch.from_numpy(teacher))
    np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-12)


def test_gradient_is_two_differences_over_the_number_of_values() -> None:
    student, teacher = torch.randn(4, 3, 2, dtype=torch.float64), torch.ones(4, 3, 2).double()
    mse(student.requires_grad_(), teacher).sum().backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / 6)


def test_minus_infinity_on_one_side_is_an_infinite_difference() -> None:
    student = torch.tensor([[1.0, -math.inf], [1.0, 2.0]])
    assert mse(student, torch.zeros(2, 2)).tolist() == [math.inf, 2.5]


def test_nan_is_never_swallowed() -> None:
    assert mse(torch.tensor([[1.0, math.nan]]), torch.zeros(1, 2)).isnan().item()


@pytest.mark.parametrize("shape", [(), (3, 0), (3, 2, 0)])
def test_rows_without_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows with values"):
        mse(torch.zeros(shape), torch.zeros(shape))
