"""The divergences against published numbers, their definitions, and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.losses import (
    adaptive_kl,
    alpha_beta_divergence,
    earth_mover,
    jensen_shannon,
    kl_divergence,
    reverse_kl,
    skewed_kl,
    total_variation,
)

REPRODUCIBLE = settings(derandomize=True, deadline=None, max_examples=40)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    values = np.random.default_rng([8, seed]).standard_normal(shape) * scale
    return torch.from_numpy(values)


def pair(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return logits(rows, classes), logits(rows, classes, seed=1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of probabilities, by its definition."""
    return (a * (a / b).log()).sum(-1)


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(student, teacher, temperature=1.0)


def counted(case: Any) -> tuple[Tensor, Tensor]:
    """The rows of a case of tokens that have a label."""
    kept = case.inputs["label"] >= 0
    return case.inputs["z_s"][kept], case.inputs["z_t"][kept]


def entropy(teacher: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=teacher.detach()).entropy()


class TestReverseKL:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("llm_reverse_kl")
        loss = reverse_kl(*counted(case)).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_official_T_has_no_square(self, oracle: Any) -> None:
        case = oracle("dskd_divergences_T2")
        loss = reverse_kl(*counted(case), temperature=2.0).sum() / 4
        case.assert_value(loss, "reverse_kl_divergence")
        case.assert_gradient(loss, output="reverse_kl_divergence::")

    def test_symmetric_is_a_sum_of_two_terms(self, oracle: Any) -> None:
        case = oracle("llm_symmetric_kl")
        student, teacher = counted(case)
        loss = 0.1 * plain_kl(student, teacher).mean() + 0.9 * reverse_kl(student, teacher).mean()
        case.assert_value(loss + 0.1 * entropy(teacher).mean())
        case.assert_gradient(loss)

    def test_padded_vocabulary_has_the_finite_gradient_that_others_lack(self, oracle: Any) -> None:
        case = oracle("edge_padded_vocab_inf")
        student, teacher = counted(case)
        assert case.gradients["reverse_kl::z_s"].isnan().any()
        loss = reverse_kl(student, teacher).mean()
        case.assert_value(loss, "reverse_kl")
        (gradient,) = torch.autograd.grad(loss, case.inputs["z_s"])
        q, p = (z.detach()[:, :-2].softmax(-1) for z in (student, teacher))
        gap = (q / p).log()
        wanted = q * (gap - (q * gap).sum(-1, keepdim=True)) / len(q)
        torch.testing.assert_close(gradient[case.inputs["label"] >= 0][:, :-2], wanted)
        assert (gradient[..., -2:] == 0).all()

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_it_is_kl_divergence_with_the_sides_exchanged(self, temperature: float) -> None:
        student, teacher = pair()
        torch.testing.assert_close(
            reverse_kl(student, teacher, temperature=temperature),
            kl_divergence(teacher, student, temperature=temperature),
        )

    def test_a_class_only_the_teacher_excludes_costs_infinity_and_that_row_has_no_gradient(
        self,
    ) -> None:
        student, teacher = pair(3)
        teacher[1, 2] = -math.inf
        student.requires_grad_()
        loss = reverse_kl(student, teacher)
        assert loss.isfinite().tolist() == [True, False, True]
        loss.sum().backward()
        assert student.grad is not None
        assert (student.grad != 0).any(1).tolist() == [True, False, True]

    def test_a_class_the_student_excludes_costs_nothing(self) -> None:
        student, teacher = pair(3)
        student[:, 2] = -math.inf
        q, p = student.softmax(1), teacher.softmax(1)
        kept = [0, 1, 3, 4]
        wanted = kl(q[:, kept], p[:, kept])
        torch.testing.assert_close(reverse_kl(student, teacher), wanted)


class TestSkewedKL:
    def test_golden_forward_is_less_the_entropy(self, oracle: Any) -> None:
        case = oracle("llm_skewed_forward_kl")
        student, teacher = counted(case)
        loss = skewed_kl(student, teacher).mean()
        case.assert_value(loss + entropy(teacher).mean())
        case.assert_gradient(loss)

    @pytest.mark.parametrize(("reverse", "word"), [(False, "forward"), (True, "reverse")])
    def test_golden_of_both_directions(self, oracle: Any, reverse: bool, word: str) -> None:
        case = oracle("dskd_divergences_T2")
        loss = skewed_kl(*counted(case), reverse=reverse, temperature=2.0).sum() / 4
        case.assert_value(loss, f"skewed_{word}_kl_divergence")
        case.assert_gradient(loss, output=f"skewed_{word}_kl_divergence::")

    def test_the_second_version_has_the_same_values(self, oracle: Any) -> None:
        case = oracle("distillm2_v1")
        kept = case.inputs["label"][:, 1:] >= 0  # the code shifts logits and labels itself
        student, teacher = (case.inputs[name][:, :-1] for name in ("z_s", "z_t"))
        for output, reverse in (("tea_pos_kl", False), ("ref_pos_kl", True)):
            rows = skewed_kl(student.flatten(0, 1), teacher.flatten(0, 1), reverse=reverse)
            means = (rows.view(kept.shape) * kept).sum(1) / kept.sum(1)
            case.assert_value(means, output)
            if not reverse:  # in its reverse form the student in the mixture is detached
                case.assert_gradient(means.sum(), output="tea_pos_kl::")

    @REPRODUCIBLE
    @given(skew=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
    def test_value_is_the_divergence_from_the_mixture(self, skew: float, seed: int) -> None:
        student, teacher = logits(3, 5, seed=seed), logits(3, 5, seed=seed + 1)
        q, p = student.softmax(1), teacher.softmax(1)
        forward, backward = (skewed_kl(student, teacher, skew=skew, reverse=r) for r in (0, 1))
        torch.testing.assert_close(forward, kl(p, skew * p + (1 - skew) * q))
        torch.testing.assert_close(backward, kl(q, skew * q + (1 - skew) * p))
        assert max(forward.max(), backward.max()) <= -math.log(skew)

    def test_the_limits_are_plain_kl_and_nothing(self) -> None:
        student, teacher = pair()
        for reverse, plain in ((False, plain_kl), (True, reverse_kl)):
            near = skewed_kl(student, teacher, skew=1e-9, reverse=reverse)
            torch.testing.assert_close(near, plain(student, teacher), rtol=1e-5, atol=1e-7)
            far = skewed_kl(student, teacher, skew=1 - 1e-9, reverse=reverse)
            assert far.abs().max() < 1e-7

    @pytest.mark.parametrize("reverse", [False, True])
    def test_strangers_are_as_far_apart_as_the_skew_allows(self, reverse: bool) -> None:
        student = torch.tensor([[1.0, -math.inf, 2.0]], requires_grad=True)
        teacher = torch.tensor([[-math.inf, 1.0, -math.inf]])
        loss = skewed_kl(student, teacher, reverse=reverse)
        torch.testing.assert_close(loss, torch.tensor([-math.log(0.1)]))
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()


class TestJensenShannon:
    @pytest.mark.parametrize(
        ("name", "temperature"), [("gkd_jsd_b0.5_T0.9", 0.9), ("gkd_jsd_b0.5_T1.0", 1.0)]
    )
    def test_golden_has_no_square_of_T(self, oracle: Any, name: str, temperature: float) -> None:
        case = oracle(name)
        loss = jensen_shannon(*counted(case), temperature=temperature).mean() / temperature**2
        case.assert_value(loss)
        case.assert_gradient(loss)

    @pytest.mark.parametrize(
        ("name", "plain"), [("gkd_jsd_b0.0_T1.0", plain_kl), ("gkd_jsd_b1.0_T1.0", reverse_kl)]
    )
    def test_golden_ends_are_the_plain_divergences(
        self, oracle: Any, name: str, plain: Callable[..., Tensor]
    ) -> None:
        case = oracle(name)
        loss = plain(*counted(case)).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_that_is_a_sum(self, oracle: Any) -> None:
        case = oracle("liger_jsd_sum_b0.5")
        loss = jensen_shannon(*counted(case)).sum()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_that_counts_beta_from_the_other_end(self, oracle: Any) -> None:
        case = oracle("llm_js_distance")
        loss = jensen_shannon(*counted(case), beta=1 - 0.9).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_at_T_of_two(self, oracle: Any) -> None:
        case = oracle("dskd_divergences_T2")
        loss = jensen_shannon(*counted(case), temperature=2.0).sum() / 4
        case.assert_value(loss, "js_divergence")
        case.assert_gradient(loss, output="js_divergence::")

    def test_golden_of_sequences(self, oracle: Any) -> None:
        case = oracle("distillm2_gkd_branch")
        kept = case.inputs["label"][:, 1:] >= 0
        student, teacher = (case.inputs[name][:, :-1].flatten(0, 1) for name in ("z_s", "z_t"))
        rows = jensen_shannon(student, teacher, beta=0.9)
        case.assert_value((rows.view(kept.shape) * kept).sum(1) / kept.sum(1), "tea_pos_kl")

    @REPRODUCIBLE
    @given(beta=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
    def test_value_is_the_definition_and_below_the_entropy_of_beta(
        self, beta: float, seed: int
    ) -> None:
        student, teacher = logits(3, 5, seed=seed), logits(3, 5, seed=seed + 1)
        q, p = student.softmax(1), teacher.softmax(1)
        m = beta * p + (1 - beta) * q
        value = jensen_shannon(student, teacher, beta=beta)
        torch.testing.assert_close(value, beta * kl(p, m) + (1 - beta) * kl(q, m))
        assert value.max() <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        other = jensen_shannon(teacher, student, beta=1 - beta)
        torch.testing.assert_close(other, value)

    def test_over_beta_the_limits_are_the_plain_divergences(self) -> None:
        student, teacher = pair()
        for beta, plain in ((1e-8, plain_kl), (1 - 1e-8, reverse_kl)):
            value = jensen_shannon(student, teacher, beta=beta) / min(beta, 1 - beta)
            torch.testing.assert_close(value, plain(student, teacher), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("beta", "plain"), [(1e-8, plain_kl), (1 - 1e-8, reverse_kl)])
    def test_normalised_it_runs_from_one_kl_to_the_other(
        self, beta: float, plain: Callable[..., Tensor]
    ) -> None:
        student, teacher = pair()
        value = jensen_shannon(student, teacher, beta=beta, normalized=True)
        torch.testing.assert_close(value, plain(student, teacher), rtol=1e-4, atol=1e-6)
        middle = jensen_shannon(student, teacher, temperature=2.0, normalized=True)
        torch.testing.assert_close(middle, 4 * jensen_shannon(student, teacher, temperature=2.0))

    def test_padded_vocabulary_is_as_if_cut_off_where_others_are_not_a_number(
        self, oracle: Any
    ) -> None:
        case = oracle("edge_padded_vocab_inf")
        assert math.isnan(case.expected["trl_jsd_b0.5"])
        pair = counted(case)
        cut = jensen_shannon(*(z[:, :-2] for z in pair))
        torch.testing.assert_close(jensen_shannon(*pair), cut)

    def test_strangers_are_log_two_apart(self) -> None:
        student = torch.tensor([[1.0, -math.inf, -math.inf]], requires_grad=True)
        teacher = torch.tensor([[-math.inf, 1.0, -math.inf]])
        loss = jensen_shannon(student, teacher)
        torch.testing.assert_close(loss, torch.tensor([math.log(2)]))
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()


class TestTotalVariation:
    def test_value_is_the_largest_difference_about_a_set_of_classes(self) -> None:
        student, teacher = pair()
        q, p = student.softmax(1), teacher.softmax(1)
        subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 5)
        wanted = ((p - q) @ subsets.T).amax(1)
        torch.testing.assert_close(total_variation(student, teacher), wanted)

    @REPRODUCIBLE
    @given(seed=st.integers(0, 1000), scale=st.floats(0.01, 30))
    def test_symmetric_at_most_one_and_below_the_bound_of_pinsker(
        self, seed: int, scale: float
    ) -> None:
        student, teacher = logits(4, 5, seed=seed, scale=scale), logits(4, 5, seed=seed + 1)
        value = total_variation(student, teacher)
        torch.testing.assert_close(total_variation(teacher, student), value)
        assert (value <= 1 + 1e-12).all()
        assert (value**2 <= plain_kl(student, teacher) / 2 + 1e-12).all()


class TestAlphaBetaDivergence:
    SETTINGS = ((0.2, 0.7), (0.8, 0.5), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0))

    @pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
    def test_golden_has_no_square_of_T(self, oracle: Any, alpha: float, beta: float) -> None:
        case = oracle("abkd_cls")
        student, teacher = case.inputs["z_s"], case.inputs["z_t"]
        rows = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta, temperature=4.0)
        loss = rows.mean() / 16
        case.assert_value(loss, f"loss_a{alpha}_b{beta}")
        case.assert_gradient(loss, output=f"a{alpha}_b{beta}::")

    def test_negative_powers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="beta must be a number of at least 0, got -1"):
            alpha_beta_divergence(*pair(), alpha=1.0, beta=-1.0)

    def test_the_named_members_of_the_family(self) -> None:
        student, teacher = pair()
        q, p = student.softmax(1), teacher.softmax(1)
        wanted = {
            (1.0, 0.0): kl(p, q),
            (0.0, 1.0): kl(q, p),
            (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(1),
            (1.0, 1.0): (p - q).square().sum(1) / 2,
            (0.0, 0.0): (p.log() - q.log()).square().sum(1) / 2,
        }
        for (alpha, beta), value in wanted.items():
            loss = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
            torch.testing.assert_close(loss, value)

    @pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.6), (1.5, 0.0), (0.0, 0.0)])
    def test_the_edges_are_the_limits(self, alpha: float, beta: float) -> None:
        near = alpha_beta_divergence(*pair(), alpha=alpha or 1e-5, beta=beta or 1e-5)
        edge = alpha_beta_divergence(*pair(), alpha=alpha, beta=beta)
        torch.testing.assert_close(edge, near, rtol=1e-3, atol=0)

    @REPRODUCIBLE
    @given(alpha=st.floats(0.05, 2), beta=st.floats(0.05, 2), seed=st.integers(0, 1000))
    def test_never_negative_and_dual_in_the_sides(
        self, alpha: float, beta: float, seed: int
    ) -> None:
        student, teacher = logits(3, 5, seed=seed), logits(3, 5, seed=seed + 1)
        value = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
        assert (value > 0).all()
        dual = alpha_beta_divergence(teacher, student, alpha=beta, beta=alpha)
        torch.testing.assert_close(value, dual)

    @pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
    def test_absent_classes_and_one_sided_ones_give_no_nan(self, alpha: float, beta: float) -> None:
        student, teacher = pair(3)
        student[:, 4] = teacher[:, 4] = -math.inf
        teacher[0, 0], student[1, 0] = -math.inf, -math.inf
        student.requires_grad_()
        loss = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert loss.isfinite().tolist() == [alpha > 0, beta > 0, True]
        cut = [z.detach()[2:, :4] for z in (student, teacher)]
        torch.testing.assert_close(loss[2:], alpha_beta_divergence(*cut, alpha=alpha, beta=beta))


class TestAdaptiveKL:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("akl_mu0.5")
        loss = adaptive_kl(*counted(case)).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_the_head_of_another_code_ends_one_class_later(self, oracle: Any) -> None:
        case = oracle("dskd_divergences_T2")
        student, teacher = counted(case)
        q, p = (z.detach().div(2).softmax(-1) for z in (student, teacher))
        tail = p.sort(-1).values.cumsum(-1) <= 0.5
        gap = (p - q).abs().gather(-1, p.argsort(-1))
        share = (gap * ~tail).sum(-1) / gap.sum(-1)
        case.assert_value(
            (share * kl(p, q) + (1 - share) * kl(q, p)).sum(), "adaptive_kl_divergence"
        )
        ours = adaptive_kl(student, teacher, temperature=2.0).sum() / 4
        assert abs(ours.item() - case.expected["adaptive_kl_divergence"]) > 1e-3

    def test_the_weight_is_held(self) -> None:
        student, teacher = pair()
        student.requires_grad_()
        both = [plain_kl(student, teacher), reverse_kl(student, teacher)]
        value = adaptive_kl(student, teacher)
        weight = ((value - both[1]) / (both[0] - both[1])).detach()
        assert ((weight > 0) & (weight < 1)).all()
        (gradient,) = torch.autograd.grad(value.sum(), student)
        (wanted,) = torch.autograd.grad((weight * both[0] + (1 - weight) * both[1]).sum(), student)
        torch.testing.assert_close(gradient, wanted)

    def test_the_first_class_is_always_in_the_head(self) -> None:
        student, teacher = torch.zeros(1, 3).double(), torch.tensor([[5.0, 0.0, 0.0]]).double()
        # p = (.987, .0066, .0066), q = (1/3, 1/3, 1/3): the head has half of the difference
        half = (plain_kl(student, teacher) + reverse_kl(student, teacher)) / 2
        torch.testing.assert_close(adaptive_kl(student, teacher, head=0.1), half)


class TestEarthMover:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_value_is_the_squared_difference_of_cumulative_sums(self, temperature: float) -> None:
        student, teacher = pair()
        Q, P = ((z / temperature).softmax(1).numpy().cumsum(1) for z in (student, teacher))
        value = earth_mover(student, teacher, temperature=temperature)
        np.testing.assert_allclose(value, temperature**2 * ((P - Q) ** 2).sum(1), rtol=1e-9)

    def test_certain_answers_are_as_far_apart_as_their_grades(self) -> None:
        certain = torch.zeros(5, 5).fill_diagonal_(200.0)
        for grade in range(5):
            value = earth_mover(certain, certain[grade].expand(5, 5))
            assert value.tolist() == [abs(grade - k) for k in range(5)]

    def test_a_class_absent_in_the_middle_is_as_if_cut_off(self) -> None:
        student, teacher = pair()
        student[:, 2] = teacher[:, 2] = -math.inf
        kept = [0, 1, 3, 4]
        cut = earth_mover(student[:, kept], teacher[:, kept])
        torch.testing.assert_close(earth_mover(student, teacher), cut)
