"""Losses on scores of candidates: golden values, definitions, candidates that are not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attar.losses import kl_divergence, margin_mse, ranking_distillation, relaxed_ranking


def scores(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def descending(count: int, rows: int = 3) -> Tensor:
    """A teacher that ranks the candidates in the order they stand in."""
    return torch.arange(count, 0, -1.0).double().expand(rows, -1)


def test_relaxed_ranking_of_a_sorted_list_is_the_golden_value(oracle: Any) -> None:
    """The published code sums over users, and is given the interesting ones in order."""
    case = oracle("rrd_relaxed_ranking")
    both = torch.cat([case.inputs["S1"], case.inputs["S2"]], dim=1)
    value = relaxed_ranking(both, descending(12), interesting=5).sum()
    case.assert_value(value)
    case.assert_gradient(value, "S1")
    case.assert_gradient(value, "S2")


def test_the_teacher_sorts_and_the_order_of_the_rest_does_not_count() -> None:
    student, teacher = scores(4, 9), scores(4, 9, seed=1)
    order = teacher.argsort(1, descending=True)
    value = relaxed_ranking(student, teacher, interesting=3)
    torch.testing.assert_close(
        relaxed_ranking(student.gather(1, order), descending(9, 4), interesting=3), value
    )
    among = order[:, 3:]
    shuffled = teacher.scatter(1, among, teacher.gather(1, among.flip(1)))
    torch.testing.assert_close(relaxed_ranking(student, shuffled, interesting=3), value)


def test_all_interesting_is_the_likelihood_of_the_whole_order() -> None:
    student = scores(2, 5)
    wanted = sum(student[:, k:].logsumexp(1) - student[:, k] for k in range(5))
    for count in (5, 40):
        value = relaxed_ranking(student, descending(5, 2), interesting=count)
        torch.testing.assert_close(value, wanted)


def test_exponentials_of_large_scores_do_not_overflow() -> None:
    student = (1000 * scores(3, 6)).float().requires_grad_()
    value = relaxed_ranking(student, descending(6), interesting=4)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_ranking_distillation_adds_up_to_the_golden_value(oracle: Any) -> None:
    """The published code is given its weights; its labelled part is a binary cross-entropy."""
    case = oracle("rd_ranking_distillation")
    positive, negative = case.inputs["pos"], case.inputs["neg"]
    labelled = torch.nn.functional.softplus(torch.cat([-positive, negative], dim=1)).sum(1).mean()
    case.assert_value(labelled, "reg_loss")
    candidates = case.inputs["cand"]
    parts = []
    for k in range(4):
        teacher = torch.zeros_like(candidates)
        teacher[:, k] = 1
        parts.append(ranking_distillation(candidates, teacher, top=1))
    value = labelled + 0.5 * (torch.stack(parts, dim=1) * case.inputs["weight"]).sum(1).mean()
    case.assert_value(value)
    for name in ("pos", "neg", "cand"):
        case.assert_gradient(value, name)


def test_ranking_distillation_is_its_definition() -> None:
    student, teacher = scores(3, 8), scores(3, 8, seed=1)
    weights = [math.exp(-k / 2) for k in (1, 2, 3)]
    best = teacher.argsort(1, descending=True)[:, :3]
    costs = -torch.nn.functional.logsigmoid(student.gather(1, best))
    wanted = (costs * torch.tensor(weights, dtype=torch.float64)).sum(1) / sum(weights)
    value = ranking_distillation(student, teacher, top=3, decay=2.0)
    torch.testing.assert_close(value, wanted)


def test_margins_are_between_the_first_candidate_and_the_others() -> None:
    student, teacher = scores(3, 4), scores(3, 4, seed=1)
    margins = [side[:, :1] - side[:, 1:] for side in (student, teacher)]
    wanted = ((margins[0] - margins[1]) ** 2).mean(1)
    torch.testing.assert_close(margin_mse(student, teacher), wanted)
    torch.testing.assert_close(margin_mse(student + 5, teacher - 3), wanted)


def test_kl_over_candidates_is_the_golden_value_of_list_wise_distillation(oracle: Any) -> None:
    case = oracle("st_distill_kldiv_T2")
    query = case.inputs["q"]
    student = torch.stack([(query * case.inputs[name]).sum(1) for name in ("p", "n1")], dim=1)
    value = kl_divergence(student, case.inputs["teacher_scores"], temperature=2.0).mean()
    case.assert_value(value)
    case.assert_gradient(value, "q")


@pytest.mark.parametrize("loss", [relaxed_ranking, ranking_distillation])
def test_a_candidate_that_only_the_teacher_excludes_is_not_asked_for(loss: Any) -> None:
    student, teacher = scores(2, 4), descending(4, 2).clone()
    teacher[:, 2] = -math.inf
    student.requires_grad_()
    value = loss(student, teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert (student.grad[:, 2] >= 0).all()  # pushed down, or left alone; never up


def test_rows_that_exclude_everything_cost_nothing() -> None:
    nothing = torch.full((2, 3), -math.inf)
    for loss in (margin_mse, relaxed_ranking, ranking_distillation):
        assert loss(nothing, nothing).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("loss", "option"),
    [(relaxed_ranking, "interesting"), (ranking_distillation, "top")],
)
def test_no_candidate_at_all_is_refused(loss: Any, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be a whole number of at least 1, got 0"):
        loss(scores(2, 4), scores(2, 4), **{option: 0})
