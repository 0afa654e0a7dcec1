"""Losses on weights: golden values, tuples, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attar.losses import l1_starting_point, l2_starting_point

BOTH = [l1_starting_point, l2_starting_point]


def test_weighted_sum_of_kept_and_new_weights_is_the_golden_value(oracle: Any) -> None:
    """alpha / 2 ‖w - w0‖² + beta / 2 ‖w_new‖², where the new ones are pulled to zero."""
    case = oracle("indep_weight_space")
    kept, new = case.inputs["w"], case.inputs["w_new"]
    value = 0.1 * l2_starting_point(kept, case.inputs["w0"])
    value = value + 0.01 * l2_starting_point(new, torch.zeros_like(new))
    case.assert_value(value, "l2sp")
    for weights, name in ((kept, "l2sp_grad_w"), (new, "l2sp_grad_new")):
        (gradient,) = torch.autograd.grad(value, weights, retain_graph=True)
        case.assert_value(gradient, name)


def test_l1_is_the_sum_of_distances_and_pulls_alike_from_any() -> None:
    weights = torch.tensor([3.0, -1.0, 0.5], requires_grad=True)
    value = l1_starting_point(weights, torch.tensor([0.0, 1.0, 0.5]))
    value.backward()
    assert value.item() == 5
    assert weights.grad is not None
    assert weights.grad.tolist() == [1, -1, 0]


@pytest.mark.parametrize("loss", BOTH)
def test_a_tuple_is_the_sum_over_its_pairs(loss: Any) -> None:
    torch.manual_seed(0)
    mine, theirs = [(torch.randn(3, 4), torch.randn(()), torch.randn(0, 2)) for _ in range(2)]
    wanted = sum(loss(a, b) for a, b in zip(mine, theirs, strict=True))
    torch.testing.assert_close(loss(mine, theirs), wanted)


@pytest.mark.parametrize("loss", BOTH)
def test_other_weights_are_refused(loss: Any) -> None:
    one = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"same number of tensors, at least one, got 2 and 1"):
        loss((one, one), (one,))
    with pytest.raises(ValueError, match=r"at least one, got 0 and 0"):
        loss((), ())
    with pytest.raises(ValueError, match=r"same shape, got \(3, 4\) and \(4, 3\)"):
        loss((one, one), (one, one.T))
