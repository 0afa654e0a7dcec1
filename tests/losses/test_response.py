"""Each response loss against published numbers, an independent derivation, and its own laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    correlation,
    cross_entropy,
    decoupled_kl,
    kl_divergence,
    mse,
    standardized_kl,
)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    values = np.random.default_rng([7, seed]).standard_normal(shape) * scale
    return torch.from_numpy(values)


def as_rows(maps: Tensor) -> Tensor:
    """[N, C, H, W] as the rows [N H W, C] that it holds."""
    return maps.movedim(1, -1).flatten(0, -2)


class TestKLDivergence:
    @pytest.mark.parametrize(
        ("name", "temperature"), [("kd_hinton_T1", 1.0), ("kd_repdistiller_T4", 4.0)]
    )
    def test_golden(self, oracle: Any, name: str, temperature: float) -> None:
        case = oracle(name)
        loss = kl_divergence(case.inputs["z_s"], case.inputs["z_t"], temperature=temperature).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_of_pixels(self, oracle: Any) -> None:
        case = oracle("seg_pixel_kd_T1")
        rows = [as_rows(case.inputs[name]) for name in ("z_s", "z_t")]
        loss = kl_divergence(*rows, temperature=1.0).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_of_counted_tokens(self, oracle: Any) -> None:
        case = oracle("distil_whisper_kl_T2")
        counted = case.inputs["label"] >= 0
        loss = kl_divergence(
            case.inputs["z_s"][counted], case.inputs["z_t"][counted], temperature=2.0
        ).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    def test_golden_of_counted_tokens_is_larger_by_the_teachers_entropy(self, oracle: Any) -> None:
        case = oracle("llm_forward_kl")
        counted = case.inputs["label"] >= 0
        teacher = case.inputs["z_t"][counted]
        loss = kl_divergence(case.inputs["z_s"][counted], teacher, temperature=1.0).mean()
        entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
        case.assert_value(loss + entropy)
        case.assert_gradient(loss)  # zero in the rows that do not count

    def test_no_counted_token_is_zero_where_a_published_mean_is_nan(self, oracle: Any) -> None:
        case = oracle("edge_all_tokens_masked")
        counted = case.inputs["label"] >= 0
        rows = kl_divergence(case.inputs["z_s"][counted], case.inputs["z_t"][counted])
        value = rows.sum() / max(len(rows), 1)  # as an objective divides
        case.assert_value(value, "trl_jsd")
        assert math.isnan(case.expected["distillm_forward_kl"])
        (gradient,) = torch.autograd.grad(value, case.inputs["z_s"])
        assert not gradient.any()

    def test_modelopt_default_is_smaller_by_the_number_of_classes(self, oracle: Any) -> None:
        case = oracle("modelopt_logits_kd_T2")
        loss = kl_divergence(case.inputs["z_s"], case.inputs["z_t"], temperature=2.0)
        case.assert_value(loss, "none")
        case.assert_value(loss.mean(), "batchmean")
        case.assert_value(loss.mean(), "mean", factor=6)

    def test_teacher_free_kd_is_smaller_by_the_number_of_classes(self, oracle: Any) -> None:
        case = oracle("kd_elementwise_mean_pitfall")
        student, teacher, target = (case.inputs[name] for name in ("z_s", "z_t", "target"))
        soft = kl_divergence(student, teacher, temperature=4.0).mean()
        hard = cross_entropy(student, target).mean()
        case.assert_value(0.9 * soft / 10 + 0.1 * hard)

    def test_padded_vocabulary_is_finite_where_others_are_not(self, oracle: Any) -> None:
        case = oracle("edge_padded_vocab_inf")
        assert math.isnan(case.expected["trl_jsd_b0.0"])
        counted = case.inputs["label"] >= 0
        student, teacher = case.inputs["z_s"][counted], case.inputs["z_t"][counted].detach()
        loss = kl_divergence(student, teacher, temperature=1.0).mean()
        p = teacher.softmax(-1)
        entropy = -torch.xlogy(p, p).sum(-1).mean()
        case.assert_value(loss + entropy, "forward_kl")  # the official value is the cross-entropy
        case.assert_gradient(loss, output="forward_kl::")

    def test_adding_a_constant_to_a_row_changes_nothing(self) -> None:
        student, teacher, shift = logits(6, 5), logits(6, 5, seed=1), logits(6, 1, seed=2)
        torch.testing.assert_close(
            kl_divergence(student + shift, teacher - 2 * shift), kl_divergence(student, teacher)
        )

    def test_large_temperature_is_half_the_mse_of_centred_logits(self) -> None:
        student, teacher = logits(6, 5), logits(6, 5, seed=1)
        centred = [z - z.mean(1, keepdim=True) for z in (student, teacher)]
        torch.testing.assert_close(
            kl_divergence(student, teacher, temperature=1e4), mse(*centred) / 2, rtol=1e-3, atol=0
        )

    def test_gradient_is_T_times_the_difference_of_probabilities(self) -> None:
        student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
        for temperature in (0.5, 1.0, 4.0):
            loss = kl_divergence(student, teacher, temperature=temperature).sum()
            (gradient,) = torch.autograd.grad(loss, student)
            q, p = ((z / temperature).softmax(1) for z in (student.detach(), teacher))
            torch.testing.assert_close(gradient, temperature * (q - p))

    def test_a_class_only_the_student_excludes_costs_infinity(self) -> None:
        student, teacher = logits(3, 4), logits(3, 4, seed=1)
        student[1, 2] = -math.inf
        loss = kl_divergence(student, teacher)
        assert loss.isfinite().tolist() == [True, False, True]
        assert loss[1] == math.inf

    def test_a_class_the_teacher_excludes_costs_what_the_rest_says(self) -> None:
        student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
        teacher[:, 2] = -math.inf
        p, log_q = (teacher / 4).softmax(1), F.log_softmax(student / 4, 1)
        kept = [0, 1, 3]
        wanted = 16 * (p * (p.log() - log_q))[:, kept].sum(1)
        loss = kl_divergence(student, teacher)
        torch.testing.assert_close(loss, wanted)
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_nan_is_never_swallowed(self) -> None:
        student, teacher = logits(3, 4), logits(3, 4, seed=1)
        student[1, 2] = math.nan
        assert kl_divergence(student, teacher).isnan().tolist() == [False, True, False]


class TestCrossEntropy:
    def test_golden_hard_distillation_of_deit(self, oracle: Any) -> None:
        case = oracle("deit_hard")
        chosen = case.inputs["z_t"].argmax(1)
        labelled = cross_entropy(case.inputs["z_cls"], case.inputs["target"]).mean()
        told = cross_entropy(case.inputs["z_dist"], chosen).mean()
        loss = 0.5 * labelled + 0.5 * told
        case.assert_value(loss)
        case.assert_gradient(loss, "z_cls")
        case.assert_gradient(loss, "z_dist")

    def test_smoothing_over_the_other_classes_is_ours_times_C_over_C_minus_1(
        self, oracle: Any
    ) -> None:
        case = oracle("tfkd_reg_official")
        student, target = case.inputs["z_s"], case.inputs["target"]
        loss = cross_entropy(student, target, label_smoothing=0.1 * 10 / 9).mean()
        case.assert_value(loss, "label_smoothing_0.1_over_C-1")

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_class_numbers_are_one_hot_probabilities(self, smoothing: float) -> None:
        student, number = logits(6, 5), torch.tensor([0, 4, 1, 1, 3, 2])
        torch.testing.assert_close(
            cross_entropy(student, number, label_smoothing=smoothing),
            cross_entropy(student, F.one_hot(number, 5).double(), label_smoothing=smoothing),
        )

    def test_soft_labels_are_kl_divergence_plus_entropy(self) -> None:
        student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
        p = teacher.softmax(1)
        torch.testing.assert_close(
            cross_entropy(student, p),
            kl_divergence(student, teacher, temperature=1) - (p * p.log()).sum(1),
        )

    def test_soft_labels_pass_by_a_class_without_mass(self) -> None:
        student = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
        loss = cross_entropy(student, torch.tensor([[0.5, 0.5, 0.0]]))
        loss.backward()
        assert math.isclose(loss.item(), math.log(1 + math.e) - 0.5, rel_tol=1e-6)
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert cross_entropy(student, torch.tensor([[0.4, 0.5, 0.1]])).item() == math.inf
        assert cross_entropy(student, torch.tensor([0]), label_smoothing=0.1).item() == math.inf

    @pytest.mark.parametrize("wrong", [-100, -1, 5, 255])
    def test_a_label_out_of_range_is_refused_not_ignored(self, wrong: int) -> None:
        with pytest.raises(ValueError, match=rf"\[0, 5\), got {wrong}\."):
            cross_entropy(logits(2, 5), torch.tensor([0, wrong]))

    def test_no_label_is_passed_over_where_values_cannot_be_asked(self) -> None:
        compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
        with pytest.raises(IndexError, match="-100 is out of bounds"):
            compiled(logits(2, 5), torch.tensor([0, -100]))

    def test_no_rows_no_values(self) -> None:
        assert cross_entropy(logits(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)

    @pytest.mark.parametrize(
        "labels", [torch.zeros(3), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4)]
    )
    def test_labels_of_another_form_are_refused(self, labels: Tensor) -> None:
        with pytest.raises(ValueError, match=r"labels must be .* \(3, 5\)"):
            cross_entropy(logits(3, 5), labels)


def decoupled_reference(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, T: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(TCKD, NCKD, teacher's p_y) of each row from probabilities, in float64 and without torch."""
    parts = []
    for z_s, z_t, y in zip(student / T, teacher / T, labels, strict=True):
        q, p = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (z_s, z_t))
        tckd = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        p_hat, q_hat = (np.delete(r, y) / (1 - r[y]) for r in (p, q))
        parts.append((tckd, (p_hat * np.log(p_hat / q_hat)).sum(), p[y]))
    tckd, nckd, p_y = np.array(parts).T
    return tckd, nckd, p_y


class TestDecoupledKL:
    LABELS = torch.tensor([0, 3, 2, 5, 1, 4, 0, 2])

    def pair(self) -> tuple[Tensor, Tensor]:
        return logits(8, 6).requires_grad_(), logits(8, 6, seed=1)

    @pytest.mark.parametrize(("alpha", "beta", "T"), [(1, 8, 4), (1, 0.5, 1), (0, 2, 2), (3, 0, 1)])
    def test_value_is_the_independent_derivation(self, alpha: float, beta: float, T: float) -> None:
        student, teacher = self.pair()
        tckd, nckd, _ = decoupled_reference(
            student.detach().numpy(), teacher.numpy(), self.LABELS.numpy(), T
        )
        loss = decoupled_kl(student, teacher, self.LABELS, alpha=alpha, beta=beta, temperature=T)
        np.testing.assert_allclose(
            loss.detach().numpy(), T**2 * (alpha * tckd + beta * nckd), rtol=1e-9
        )

    def test_gradient_is_the_derivation_by_hand(self) -> None:
        student, teacher = self.pair()
        decoupled_kl(student, teacher, self.LABELS).sum().backward()
        q, p = ((z / 4).softmax(1) for z in (student.detach(), teacher))
        label = F.one_hot(self.LABELS, 6).double()
        q_y, p_y = ((r * label).sum(1, keepdim=True) for r in (q, p))
        q_hat, p_hat = (r * (1 - label) / (1 - r_y) for r, r_y in ((q, q_y), (p, p_y)))
        wanted = 4 * ((q_y - p_y) * (label - q_hat) + 8 * (q_hat - p_hat))
        torch.testing.assert_close(student.grad, wanted, rtol=1e-9, atol=1e-12)

    def test_kl_divergence_is_target_plus_what_is_left_times_non_target(self) -> None:
        student, teacher = self.pair()
        p_y = (teacher / 4).softmax(1).gather(1, self.LABELS[:, None]).squeeze(1)
        target = decoupled_kl(student, teacher, self.LABELS, alpha=1, beta=0)
        other = decoupled_kl(student, teacher, self.LABELS, alpha=0, beta=1)
        torch.testing.assert_close(
            target + (1 - p_y) * other, kl_divergence(student, teacher), rtol=1e-9, atol=1e-12
        )

    def test_finite_where_the_official_code_is_infinite(self, oracle: Any) -> None:
        case = oracle("dkd_extreme_official")
        assert case.expected["loss_float32_official"] == math.inf
        # Both numbers of this case were made from the inputs rounded to float32.
        student, teacher = (case.inputs[name].detach().float().double() for name in ("z_s", "z_t"))
        target = case.inputs["target"]
        exact = decoupled_kl(student, teacher, target, temperature=1).mean()
        torch.testing.assert_close(
            exact.item(), case.expected["loss_float64_official"], rtol=1e-9, atol=0
        )
        single = student.float().requires_grad_()
        loss = decoupled_kl(single, teacher.float(), target, temperature=1).mean()
        torch.testing.assert_close(loss.item(), exact.item(), rtol=1e-5, atol=0)
        loss.backward()
        assert single.grad is not None
        assert single.grad.isfinite().all()

    def test_non_target_part_is_kl_divergence_without_the_label_whatever_its_logit(self) -> None:
        student, teacher = logits(4, 6), logits(4, 6, seed=1)
        student[:, 0], teacher[:, 0] = -1e4, 1e4
        torch.testing.assert_close(
            decoupled_kl(student, teacher, torch.zeros(4, dtype=torch.int64), alpha=0, beta=1),
            kl_divergence(student[:, 1:], teacher[:, 1:]),
        )
        torch.testing.assert_close(
            decoupled_kl(-student, student, torch.zeros(4, dtype=torch.int64), alpha=0, beta=1),
            kl_divergence(-student[:, 1:], student[:, 1:]),
        )

    def test_adding_a_constant_to_a_row_changes_nothing(self) -> None:
        student, teacher = self.pair()
        torch.testing.assert_close(
            decoupled_kl(student - 1e4, teacher + 1e4, self.LABELS),
            decoupled_kl(student, teacher, self.LABELS),
        )

    def test_mixed_labels_count_as_their_arg_max(self) -> None:
        student, teacher = self.pair()
        mixed = 0.7 * F.one_hot(self.LABELS, 6) + 0.3 * F.one_hot(self.LABELS.flip(0), 6)
        torch.testing.assert_close(
            decoupled_kl(student, teacher, mixed), decoupled_kl(student, teacher, self.LABELS)
        )

    def test_two_classes_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"at least three classes, got 2.*kl_divergence"):
            decoupled_kl(logits(3, 2), logits(3, 2), torch.zeros(3, dtype=torch.int64))


class TestStandardizedKL:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("lskd_T2")
        loss = standardized_kl(case.inputs["z_s"], case.inputs["z_t"], temperature=2.0).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)
        scores = torch.tensor(case.expected["z_s_standardised"], dtype=torch.float64)
        again = standardized_kl(scores, case.inputs["z_t"], temperature=2.0).mean()
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)

    def test_scale_and_shift_of_either_side_change_nothing(self) -> None:
        student, teacher = logits(6, 5), logits(6, 5, seed=1)
        scale, shift = logits(6, 1, seed=2).abs() + 0.1, logits(6, 1, seed=3)
        wanted = standardized_kl(student, teacher)
        for pair in ((student * scale + shift, teacher), (student, teacher * scale + shift)):
            torch.testing.assert_close(standardized_kl(*pair), wanted, rtol=1e-5, atol=0)
        assert not torch.allclose(standardized_kl(-student, teacher), wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_constant_logits_are_the_uniform_answer(self, dtype: torch.dtype) -> None:
        student = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        teacher = logits(2, 4).to(dtype)
        loss = standardized_kl(student, teacher)
        p = ((teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, keepdim=True) / 2).softmax(
            1
        )
        torch.testing.assert_close(loss, 4 * (math.log(4) + (p * p.log()).sum(1)))
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        both = standardized_kl(torch.full((2, 4), 0.3), torch.full((2, 4), 5.0))
        assert both.tolist() == [0.0, 0.0]


class TestCorrelation:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("dist_b1_g1_tau1")
        pair = case.inputs["z_s"], case.inputs["z_t"]
        loss = correlation(*pair)
        case.assert_value(loss)
        case.assert_gradient(loss)
        case.assert_value(correlation(*pair, intra=0), "inter")
        case.assert_value(correlation(*pair, inter=0), "intra")

    def test_golden_of_pixels(self, oracle: Any) -> None:
        case = oracle("dist_seg_4d")
        loss = correlation(as_rows(case.inputs["z_s"]), as_rows(case.inputs["z_t"]))
        case.assert_value(loss)
        case.assert_gradient(loss)

    @pytest.mark.parametrize(("temperature", "inter", "intra"), [(4, 2, 2), (1, 0.5, 3)])
    def test_value_is_the_correlation_that_numpy_computes(
        self, temperature: float, inter: float, intra: float
    ) -> None:
        student, teacher = logits(6, 5), logits(6, 5, seed=1)
        q, p = ((z / temperature).softmax(1).numpy() for z in (student, teacher))
        rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
        columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
        loss = correlation(student, teacher, temperature=temperature, inter=inter, intra=intra)
        wanted = temperature**2 * (inter * rows + intra * columns)
        assert math.isclose(loss.item(), wanted, rel_tol=1e-5)

    def test_a_positive_affine_map_of_probabilities_changes_nothing(self) -> None:
        teacher, p = logits(6, 5, seed=1), logits(6, 5).softmax(1)
        # Mixing each row with the uniform answer is affine in the row and keeps it a distribution.
        a = torch.linspace(0.3, 0.9, 6, dtype=torch.float64)[:, None]
        rows = (a * p + (1 - a) / 5).log()
        torch.testing.assert_close(
            correlation(rows, teacher, intra=0),
            correlation(p.log(), teacher, intra=0),
            rtol=1e-5,
            atol=0,
        )
        # One a for all rows and any fixed answer is affine in every column.
        columns = (0.4 * p + 0.6 * logits(1, 5, seed=3).softmax(1)).log()
        torch.testing.assert_close(
            correlation(columns, teacher, inter=0),
            correlation(p.log(), teacher, inter=0),
            rtol=1e-5,
            atol=0,
        )

    def test_a_batch_of_one_has_only_the_inter_part(self) -> None:
        student, teacher = logits(1, 5).requires_grad_(), logits(1, 5, seed=1)
        assert correlation(student, teacher, inter=0).item() == 0
        loss = correlation(student, teacher)
        torch.testing.assert_close(loss, correlation(student, teacher, intra=0))
        loss.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.abs().sum() > 0

    def test_a_constant_teacher_says_nothing(self) -> None:
        student = logits(3, 4).requires_grad_()
        loss = correlation(student, torch.zeros(3, 4, dtype=torch.float64))
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert (student.grad == 0).all()

    def test_an_empty_batch_is_zero_with_its_graph(self) -> None:
        student = logits(0, 4).requires_grad_()
        loss = correlation(student, logits(0, 4))
        loss.backward()
        assert loss.item() == 0
