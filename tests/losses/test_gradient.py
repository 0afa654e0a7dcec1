"""Losses on gradients: golden values of two networks by autograd, zero gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attar.losses import jacobian_matching, sobolev


def network(case: Any, side: str, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = (case.inputs[f"{side}_{name}"] for name in ("W1", "b1", "W2", "b2"))
    return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def jacobian(case: Any, side: str) -> Tensor:
    """[N, C, D], by one pass back for each class."""
    x = case.inputs["x"]
    answers = network(case, side, x)
    rows = [torch.autograd.grad(z.sum(), x, create_graph=True)[0] for z in answers.unbind(1)]
    return torch.stack(rows, dim=1)


def of_labels(case: Any, side: str) -> Tensor:
    x = case.inputs["x"]
    answers = network(case, side, x)
    cost = torch.nn.functional.cross_entropy(answers, case.inputs["target"], reduction="sum")
    return torch.autograd.grad(cost, x, create_graph=True)[0]


def test_jacobians_of_two_networks_give_the_golden_values(oracle: Any) -> None:
    case = oracle("indep_jacobian_sobolev_mlp")
    mine, theirs = jacobian(case, "s"), jacobian(case, "t")
    case.assert_value(mine, "J_s")
    case.assert_value(sobolev(mine, theirs).mean(), "jac_mse")
    top = network(case, "t", case.inputs["x"]).argmax(1)
    rows = torch.arange(len(top))
    of_top = jacobian_matching(mine[rows, top], theirs[rows, top])
    case.assert_value(of_top.mean(), "jac_normalised_teacher_argmax")
    of_all = jacobian_matching(mine.flatten(0, 1), theirs.flatten(0, 1)).sum() / len(top)
    case.assert_value(of_all, "jac_normalised_all_classes")


def test_input_gradients_of_two_networks_give_the_golden_values(oracle: Any) -> None:
    case = oracle("indep_jacobian_sobolev_mlp")
    mine, theirs = of_labels(case, "s"), of_labels(case, "t")
    case.assert_value(mine, "input_grad_ce_s")
    case.assert_value(theirs, "input_grad_ce_t")
    case.assert_value(sobolev(mine, theirs).mean(), "igrad_mse")
    case.assert_value(jacobian_matching(mine, theirs).mean() / 2, "igrad_1_minus_cos")


@pytest.mark.parametrize("loss", [jacobian_matching, sobolev])
def test_the_weights_of_the_student_learn_from_its_gradients(loss: Any, oracle: Any) -> None:
    case = oracle("indep_jacobian_sobolev_mlp")
    loss(of_labels(case, "s"), of_labels(case, "t")).mean().backward()
    assert case.inputs["s_W1"].grad.abs().sum() > 0
    assert case.inputs["t_W1"].grad is None


def test_a_projection_on_random_directions_is_on_average_the_whole(oracle: Any) -> None:
    """Over an orthonormal set of directions v, the squares of vᵀ(J_s - J_t) add up exactly."""
    case = oracle("indep_jacobian_sobolev_mlp")
    mine, theirs = jacobian(case, "s"), jacobian(case, "t")
    directions = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    parts = [sobolev(v @ mine, v @ theirs) for v in directions]
    torch.testing.assert_close(sum(parts), sobolev(mine, theirs))


@pytest.mark.parametrize(("zero", "wanted"), [("student", 1.0), ("teacher", 0.0), ("both", 0.0)])
def test_zero_gradients_have_no_direction_and_give_none(zero: str, wanted: float) -> None:
    mine, theirs = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    if zero != "teacher":
        mine[0] = 0
    if zero != "student":
        theirs[0] = 0
    mine.requires_grad_()
    value = jacobian_matching(mine, theirs)
    value.sum().backward()
    assert value.tolist() == pytest.approx([wanted, 0.0], abs=1e-6)
    assert mine.grad is not None
    assert (mine.grad[0] == 0).all()
    assert mine.grad.isfinite().all()


def test_slopes_count_in_one_and_not_in_the_other() -> None:
    gradient = torch.randn(4, 6, dtype=torch.float64)
    assert jacobian_matching(3 * gradient, gradient).abs().max() < 1e-12
    torch.testing.assert_close(sobolev(3 * gradient, gradient), 4 * gradient.square().sum(1))
    assert jacobian_matching(-gradient, gradient).tolist() == pytest.approx([4.0] * 4)
