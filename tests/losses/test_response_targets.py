"""Changed targets, labels on their own, centred logits and relations in a batch, by their laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    binary_kl,
    centered_mse,
    cross_entropy,
    hard_distillation,
    kl_divergence,
    mse,
    probability_gram,
    transformed_teacher_kl,
    virtual_teacher,
)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    values = np.random.default_rng([10, seed]).standard_normal(shape) * scale
    return torch.from_numpy(values)


def pair(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return logits(rows, classes).requires_grad_(), logits(rows, classes, seed=1)


class TestHardDistillation:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("deit_hard")
        labelled = cross_entropy(case.inputs["z_cls"], case.inputs["target"]).mean()
        loss = (
            labelled / 2 + hard_distillation(case.inputs["z_dist"], case.inputs["z_t"]).mean() / 2
        )
        case.assert_value(loss)
        case.assert_gradient(loss, "z_dist")

    def test_it_is_the_limit_of_an_ever_sharper_teacher(self) -> None:
        student, teacher = pair()
        sharp = transformed_teacher_kl(student, teacher, power=1e4)
        torch.testing.assert_close(hard_distillation(student, teacher), sharp)

    def test_of_equal_logits_the_first_is_the_choice(self) -> None:
        student = logits(1, 3)
        value = hard_distillation(student, torch.tensor([[1.0, 1.0, 1.0]]))
        torch.testing.assert_close(value, cross_entropy(student, torch.tensor([0])))


class TestVirtualTeacher:
    LABELS = torch.tensor([0, 4, 1, 1, 3, 2])

    @pytest.mark.parametrize(("correct", "T"), [(0.99, 20.0), (0.9, 1.0), (0.5, 0.5), (0.05, 2.0)])
    def test_it_is_kl_divergence_to_the_teacher_that_is_meant(
        self, correct: float, T: float
    ) -> None:
        student, _ = pair()
        told = torch.full((6, 5), (1 - correct) / 4).double()
        told = told.scatter(1, self.LABELS[:, None], correct)
        torch.testing.assert_close(
            virtual_teacher(student, self.LABELS, correct=correct, temperature=T),
            kl_divergence(student, told.log(), temperature=T),
        )

    def test_at_T_of_one_it_is_label_smoothing_less_a_constant(self) -> None:
        student, _ = pair()
        smooth = cross_entropy(student, self.LABELS, label_smoothing=0.1 * 5 / 4)
        constant = 0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 4)
        value = virtual_teacher(student, self.LABELS, correct=0.9, temperature=1.0)
        torch.testing.assert_close(value, smooth + constant)

    def test_the_published_code_is_all_but_label_smoothing_without_a_label(
        self, oracle: Any
    ) -> None:
        case = oracle("tfkd_reg_official")
        student, target = case.inputs["z_s"], case.inputs["target"]
        told = torch.full((8, 10), 0.01 / 9).double().scatter(1, target[:, None], 0.99)
        soft = (told / 20).softmax(1)  # of probabilities, so that 0.99 becomes 0.105
        official = kl_divergence(student, soft.log(), temperature=1.0).mean() / 10
        hard = cross_entropy(student, target).mean()
        case.assert_value(0.05 * hard + 0.95 * 100 * official)
        ours = virtual_teacher(student, target, temperature=20.0)
        assert not math.isclose(ours.mean().item(), official.item(), rel_tol=0.5)

    def test_mixed_labels_count_as_their_arg_max(self) -> None:
        student, _ = pair()
        mixed = 0.7 * F.one_hot(self.LABELS, 5) + 0.3 * F.one_hot(self.LABELS.flip(0), 5)
        torch.testing.assert_close(
            virtual_teacher(student, mixed), virtual_teacher(student, self.LABELS)
        )

    def test_one_class_present_leaves_nothing_to_say_and_an_absent_label_is_infinite(self) -> None:
        student = torch.tensor([[1.0, -math.inf], [-math.inf, 1.0]])
        value = virtual_teacher(student, torch.tensor([0, 0]))
        assert value.tolist() == [0.0, math.inf]


class TestTransformedTeacherKL:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("ttm_gamma0.1")
        loss = transformed_teacher_kl(case.inputs["z_s"], case.inputs["z_t"], power=0.1).mean()
        case.assert_value(loss)
        case.assert_gradient(loss)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_a_power_of_one_over_T_is_kl_divergence_at_T(self, temperature: float) -> None:
        torch.testing.assert_close(
            transformed_teacher_kl(*pair(), power=1 / temperature, temperature=temperature),
            kl_divergence(*pair(), temperature=temperature),
        )

    def test_a_row_weighs_the_sum_of_its_powers(self) -> None:
        student, teacher = pair()
        plain, weighed = (
            transformed_teacher_kl(student, teacher, power=0.2, weighted=w) for w in (False, True)
        )
        torch.testing.assert_close(weighed, plain * (teacher.softmax(1) ** 0.2).sum(1))

    def test_a_power_of_one_weighs_every_row_the_same(self) -> None:
        torch.testing.assert_close(
            transformed_teacher_kl(*pair(), power=1.0, weighted=True),
            kl_divergence(*pair(), temperature=1.0),
        )


class TestBinaryKL:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_value_is_the_divergence_of_every_label_summed(self, temperature: float) -> None:
        student, teacher = pair()
        q, p = ((z / temperature).sigmoid() for z in (student, teacher))
        wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        value = binary_kl(student, teacher, temperature=temperature)
        torch.testing.assert_close(value, temperature**2 * wanted.sum(1))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(gradient, temperature * (q - p))

    def test_one_question_is_two_classes_of_which_one_stays_at_zero(self) -> None:
        student, teacher = pair(classes=1)
        two = [F.pad(z, (0, 1)) for z in (student, teacher)]
        torch.testing.assert_close(
            binary_kl(student, teacher, temperature=2.0), kl_divergence(*two, temperature=2.0)
        )

    def test_exact_where_probabilities_round_to_one(self) -> None:
        student = torch.tensor([[-200.0, 200.0]], requires_grad=True)
        value = binary_kl(student, -student.detach())
        assert value.item() == 400.0
        value.sum().backward()
        assert student.grad is not None
        assert student.grad.tolist() == [[-1.0, 1.0]]

    def test_a_certain_no_costs_infinity_only_where_the_teacher_is_not_sure_of_it(self) -> None:
        student = torch.tensor([[-math.inf, 1.0], [-math.inf, 1.0], [1.0, 1.0]], requires_grad=True)
        teacher = torch.tensor([[1.0, 1.0], [-math.inf, 1.0], [-math.inf, 1.0]])
        value = binary_kl(student, teacher)
        torch.testing.assert_close(value, torch.tensor([math.inf, 0.0, math.log1p(math.e)]))
        value.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_no_question_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"at least one class, got \(3, 0\)"):
            binary_kl(torch.zeros(3, 0), torch.zeros(3, 0))


class TestCenteredMSE:
    def test_value_is_mse_after_the_means_are_gone(self) -> None:
        student, teacher = pair()
        centred = [z - z.mean(1, keepdim=True) for z in (student, teacher)]
        torch.testing.assert_close(centered_mse(student, teacher), mse(*centred))

    def test_adding_a_constant_to_a_row_changes_nothing(self) -> None:
        student, teacher = pair()
        moved = centered_mse(student + 1e4, teacher - 1e4)
        torch.testing.assert_close(moved, centered_mse(student, teacher))

    def test_half_of_it_is_kl_divergence_at_a_large_temperature(self) -> None:
        torch.testing.assert_close(
            kl_divergence(*pair(), temperature=1e4), centered_mse(*pair()) / 2, rtol=1e-3, atol=0
        )

    def test_a_one_sided_class_makes_only_its_row_infinite_without_gradient(self) -> None:
        student, teacher = pair(3)
        teacher[1, 2] = -math.inf
        value = centered_mse(student, teacher)
        assert value.isfinite().tolist() == [True, False, True]
        value.sum().backward()
        assert student.grad is not None
        assert (student.grad != 0).any(1).tolist() == [True, False, True]


class TestProbabilityGram:
    @pytest.mark.parametrize(
        ("output", "parts"), [("cc_loss", {"examples": 0.0}), ("bc_loss", {"classes": 0.0})]
    )
    def test_golden_has_no_square_of_T(
        self, oracle: Any, output: str, parts: dict[str, float]
    ) -> None:
        case = oracle("mlld_parts_T4")
        loss = probability_gram(case.inputs["z_s"], case.inputs["z_t"], **parts) / 16
        case.assert_value(loss, output)
        case.assert_gradient(loss, output=f"{output}::")

    def test_the_published_whole_is_these_parts_with_its_slips(self, oracle: Any) -> None:
        """Masks that only rescale; strong views without T = 2 and 6, and without Gram matrices."""
        case = oracle("mlld_full_official")
        weak, strong = (
            (case.inputs[f"z_s_{view}"], case.inputs[f"z_t_{view}"].detach())
            for view in ("weak", "strong")
        )
        answers = weak[1].softmax(1)
        sure, share = answers.amax(1), answers.sum(0)
        unsure, rare = ((v <= v.quantile(0.5)).to(v.dtype).mean().item() for v in (sure, share))

        def soft(view: tuple[Tensor, Tensor], *temperatures: float) -> Any:
            return sum(kl_divergence(*view, temperature=t).mean() for t in temperatures)

        def matrices(**without: float) -> Any:
            return sum(
                probability_gram(*weak, temperature=t, **without) / t**2
                for t in (4.0, 3.0, 5.0, 2.0, 6.0)
            )

        labelled = sum(
            cross_entropy(view[0], case.inputs["target"]).mean() for view in (weak, strong)
        )
        parts = {
            "loss_ce": 0.1 * labelled,
            "loss_kd": 0.9 * unsure * soft(weak, 4.0, 3.0, 5.0, 2.0, 6.0)
            + 0.9 * (soft(strong, 4.0, 3.0, 5.0) + soft(weak, 2.0, 6.0)),
            "loss_cc": 0.9 * rare * matrices(examples=0.0),
            "loss_bc": 0.9 * unsure * matrices(classes=0.0),
        }
        for name, value in parts.items():
            case.assert_value(value, name)
        total = sum(parts.values())
        case.assert_value(total, "total")
        for name in ("z_s_weak", "z_s_strong"):
            case.assert_gradient(total, name)

    @pytest.mark.parametrize(("rows", "classes"), [(7, 3), (4, 4), (3, 7)])
    def test_value_is_the_difference_of_both_matrices(self, rows: int, classes: int) -> None:
        student, teacher = pair(rows, classes)
        q, p = ((z / 2).softmax(1) for z in (student, teacher))
        alike = (p @ p.T - q @ q.T).square().sum() / rows
        together = (p.T @ p - q.T @ q).square().sum() / classes
        value = probability_gram(student, teacher, temperature=2.0)
        torch.testing.assert_close(value, 4 * (alike + together))

    def test_the_parts_add_up(self) -> None:
        student, teacher = pair()
        examples, classes = (
            probability_gram(student, teacher, **{part: 0.0}) for part in ("classes", "examples")
        )
        both = probability_gram(student, teacher, examples=2.0, classes=3.0)
        torch.testing.assert_close(both, 2 * examples + 3 * classes)

    def test_exchanging_classes_leaves_the_examples_alike(self) -> None:
        teacher = logits(6, 5)
        moved = teacher[:, [3, 1, 0, 4, 2]]
        assert probability_gram(moved, teacher, classes=0.0).item() < 1e-12
        assert probability_gram(moved, teacher, examples=0.0).item() > 1e-3
        assert probability_gram(teacher.flip(0), teacher, examples=0.0).item() < 1e-12

    def test_an_empty_batch_is_zero_with_its_graph(self) -> None:
        student = logits(0, 4).requires_grad_()
        loss = probability_gram(student, logits(0, 4))
        loss.backward()
        assert loss.item() == 0
