"""Losses that treat the label apart against published numbers, definitions and one another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    cross_entropy,
    decoupled_kl,
    kl_divergence,
    normalized_kl,
    target_enhanced_kl,
    virtual_teacher,
    weighted_kl,
)

LABELS = torch.tensor([0, 3, 2, 5, 1, 4])
EVERY = [normalized_kl, target_enhanced_kl, weighted_kl]


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    values = np.random.default_rng([9, seed]).standard_normal(shape) * scale
    return torch.from_numpy(values)


def pair() -> tuple[Tensor, Tensor]:
    return logits(6, 6).requires_grad_(), logits(6, 6, seed=1)


def of_case(case: Any) -> tuple[Tensor, Tensor, Tensor]:
    return case.inputs["z_s"], case.inputs["z_t"], case.inputs["target"]


@pytest.mark.parametrize("loss", EVERY)
def test_mixed_labels_count_as_their_arg_max(loss: Any) -> None:
    mixed = 0.7 * F.one_hot(LABELS, 6) + 0.3 * F.one_hot(LABELS.flip(0), 6)
    torch.testing.assert_close(loss(*pair(), mixed), loss(*pair(), LABELS))


@pytest.mark.parametrize("loss", [*EVERY, decoupled_kl, lambda s, t, y: virtual_teacher(s, y)])
@pytest.mark.parametrize("wrong", [-100, -1, 6])
def test_a_label_out_of_range_is_refused_not_ignored(loss: Any, wrong: int) -> None:
    labels = LABELS.clone()
    labels[2] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 6\), got {wrong}\."):
        loss(*pair(), labels)


@pytest.mark.parametrize("loss", EVERY)
def test_adding_a_constant_to_a_row_changes_nothing(loss: Any) -> None:
    student, teacher = pair()
    moved = loss(student - 1e4, teacher + 1e4, LABELS)
    torch.testing.assert_close(moved, loss(student, teacher, LABELS))


@pytest.mark.parametrize("loss", EVERY)
def test_permuting_the_classes_changes_nothing(loss: Any) -> None:
    student, teacher = pair()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = loss(student[:, order], teacher[:, order], order.argsort()[LABELS])
    torch.testing.assert_close(moved, loss(student, teacher, LABELS))


class TestNormalizedKL:
    def test_golden_is_less_the_entropy_of_the_other_classes(self, oracle: Any) -> None:
        case = oracle("nkd_g1.5_T1")
        student, teacher, target = of_case(case)
        others = teacher.detach().scatter(1, target[:, None], -math.inf).softmax(1)
        entropy = -torch.xlogy(others, others).sum(1).mean()
        loss = normalized_kl(student, teacher, target).mean()
        case.assert_value(loss + 1.5 * entropy)
        case.assert_gradient(loss)

    @pytest.mark.parametrize(("gamma", "temperature"), [(0.0, 1.0), (1.5, 1.0), (2.0, 4.0)])
    def test_the_first_part_has_no_temperature_and_the_second_is_that_of_decoupled_kl(
        self, gamma: float, temperature: float
    ) -> None:
        student, teacher = pair()
        value = normalized_kl(student, teacher, LABELS, gamma=gamma, temperature=temperature)
        p_y = teacher.softmax(1).gather(1, LABELS[:, None]).squeeze(1)
        other = decoupled_kl(student, teacher, LABELS, alpha=0, beta=1, temperature=temperature)
        torch.testing.assert_close(value, p_y * cross_entropy(student, LABELS) + gamma * other)

    def test_two_classes_leave_the_first_part(self) -> None:
        student, teacher, labels = logits(4, 2), logits(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
        p_y = teacher.softmax(1).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(
            normalized_kl(student, teacher, labels), p_y * cross_entropy(student, labels)
        )

    def test_a_label_that_only_the_student_excludes_costs_infinity(self) -> None:
        student, teacher = (z.detach() for z in pair())
        student[0, 0] = -math.inf
        student[1, 3] = teacher[1, 3] = -math.inf
        value = normalized_kl(student, teacher, LABELS)
        assert value.isfinite().tolist() == [False] + [True] * 5


class TestTargetEnhancedKL:
    def test_golden_is_less_a_constant_of_the_teacher(self, oracle: Any) -> None:
        case = oracle("ofa_eps1.0")
        student, teacher, target = of_case(case)
        loss = target_enhanced_kl(student, teacher, target, power=1.0).mean()
        p = teacher.detach().softmax(1)
        case.assert_value(loss - torch.xlogy(p, p).sum(1).mean())
        case.assert_gradient(loss)

    def test_power_of_one_is_kl_divergence(self) -> None:
        student, teacher = pair()
        torch.testing.assert_close(
            target_enhanced_kl(student, teacher, LABELS, power=1.0),
            kl_divergence(student, teacher, temperature=1.0),
        )

    @pytest.mark.parametrize("power", [0.5, 1.5, 3.0])
    def test_gradient_is_that_of_the_published_formula(self, power: float) -> None:
        student, teacher = pair()
        label = F.one_hot(LABELS, 6).double()
        weight = (teacher.softmax(1) + label) ** power - label
        published = -(weight * student.log_softmax(1)).sum(1)
        value = target_enhanced_kl(student, teacher, LABELS, power=power)
        gap = (published - value).detach()
        share = weight / weight.sum(1, keepdim=True)
        torch.testing.assert_close(gap, -(weight * share.log()).sum(1))
        (wanted,) = torch.autograd.grad(published.sum(), student)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(gradient, wanted)

    def test_zero_where_the_student_has_the_enhanced_answer(self) -> None:
        _, teacher = pair()
        label = F.one_hot(LABELS, 6).double()
        answer = ((teacher.softmax(1) + label) ** 1.5 - label).log()
        assert target_enhanced_kl(answer, teacher, LABELS).abs().max() < 1e-12


class TestWeightedKL:
    def test_golden_is_less_the_weighted_entropy(self, oracle: Any) -> None:
        case = oracle("wsld_T2_a2.5")
        student, teacher, target = of_case(case)
        soft = weighted_kl(student, teacher, target)
        costs = [cross_entropy(z.detach(), target) for z in (student, teacher)]
        weight = 1 - torch.exp(-costs[0] / (costs[1] + 1e-7))
        p = (teacher.detach() / 2).softmax(1)
        soft_official = soft - 4 * weight * torch.xlogy(p, p).sum(1)
        case.assert_value(2.5 * soft_official.mean())
        case.assert_gradient(2.5 * soft.mean())

    def test_the_weight_is_held_and_says_who_is_behind(self) -> None:
        student, teacher = pair()
        value = weighted_kl(student, teacher, LABELS)
        plain = kl_divergence(student, teacher, temperature=2.0)
        weight = (value / plain).detach()
        costs = [cross_entropy(z, LABELS) for z in (student, teacher)]
        assert ((weight > 1 - 1 / math.e) == (costs[0] > costs[1])).all()
        (gradient,) = torch.autograd.grad(value.sum(), student)
        (wanted,) = torch.autograd.grad((weight * plain).sum(), student)
        torch.testing.assert_close(gradient, wanted)

    def test_a_teacher_that_is_certain_gives_the_whole_weight_and_both_certain_none(self) -> None:
        teacher = torch.tensor([[1e3, 0.0, 0.0]]).double()
        student = torch.tensor([[1.0, 0.0, 2.0]]).double()
        label = torch.tensor([0])
        torch.testing.assert_close(
            weighted_kl(student, teacher, label), kl_divergence(student, teacher, temperature=2.0)
        )
        assert weighted_kl(2 * teacher, teacher, label).item() == 0
