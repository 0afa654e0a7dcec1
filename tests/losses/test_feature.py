"""Losses on features as they are: definitions, published values, invariances, zero vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    activation_boundary,
    active_mse,
    bounded_mse,
    cosine_distance,
    hierarchical_context,
    mse,
    normalized_smooth_l1,
    partial_mse,
)

FORMS = [(6, 8), (6, 3, 8), (6, 8, 3, 2)]


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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


def as_vectors(values: Tensor) -> np.ndarray:
    """[N, positions, D], whatever the form."""
    values = values.flatten(2).transpose(1, 2) if values.ndim == 4 else values
    return values.reshape(len(values), -1, values.shape[-1]).numpy()


class TestCosineDistance:
    @pytest.mark.parametrize("shape", FORMS)
    def test_value_is_the_definition(self, shape: tuple[int, ...]) -> None:
        student, teacher = features(*shape), features(*shape, seed=1)
        s, t = as_vectors(student), as_vectors(teacher)
        cos = (s * t).sum(2) / np.linalg.norm(s, axis=2) / np.linalg.norm(t, axis=2)
        value = cosine_distance(student, teacher)
        np.testing.assert_allclose(value.numpy(), (1 - cos).mean(1), rtol=1e-9)

    def test_golden_patience_is_it_over_half_the_size(self, oracle: Any) -> None:
        case = oracle("bert_pkd")
        student, teacher = case.inputs["pat_s"].detach(), case.inputs["pat_t"].detach()
        value = cosine_distance(student, teacher).mean() * 2 / 8
        half = case.expected["patience_half"]  # the published code returns float16
        assert value.item() == pytest.approx(half, rel=torch.finfo(torch.float16).eps)

    @pytest.mark.parametrize("shape", FORMS)
    def test_lengths_change_nothing(self, shape: tuple[int, ...]) -> None:
        student, teacher = features(*shape), features(*shape, seed=1)
        torch.testing.assert_close(
            cosine_distance(1e-3 * student, 1e3 * teacher), cosine_distance(student, teacher)
        )

    def test_a_zero_vector_has_no_direction(self) -> None:
        student, teacher = features(3, 4).float(), features(3, 4, seed=1).float()
        student[0], teacher[1] = 0, 0
        student[2], teacher[2] = 0, 0
        student.requires_grad_()
        value = cosine_distance(student, teacher)
        value.sum().backward()
        assert value.tolist() == [1, 0, 0]
        assert student.grad is not None
        assert (student.grad == 0).all()


class TestNormalizedSmoothL1:
    @pytest.mark.parametrize("shape", FORMS)
    def test_value_is_the_definition(self, shape: tuple[int, ...]) -> None:
        student, teacher = features(*shape), 7 * features(*shape, seed=1) + 3
        s, t = as_vectors(student), as_vectors(teacher)
        t = (t - t.mean(2, keepdims=True)) / np.sqrt(t.var(2, keepdims=True) + 1e-5)
        gap = np.abs(s - t)
        wanted = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean((1, 2))
        value = normalized_smooth_l1(student, teacher)
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-9)

    @pytest.mark.parametrize("shape", FORMS)
    def test_scale_and_shift_of_the_teacher_are_free(self, shape: tuple[int, ...]) -> None:
        student, teacher = features(*shape), features(*shape, seed=1)
        torch.testing.assert_close(
            normalized_smooth_l1(student, 50 * teacher - 9),
            normalized_smooth_l1(student, teacher),
            rtol=1e-3,
            atol=1e-4,
        )

    def test_a_constant_teacher_is_zero(self) -> None:
        assert normalized_smooth_l1(torch.zeros(2, 4), torch.full((2, 4), 5.0)).tolist() == [0, 0]


class TestHierarchicalContext:
    @pytest.mark.parametrize(("size", "levels"), [(8, [4, 2, 1]), (4, [2, 1]), (2, [1]), (1, [])])
    def test_value_is_the_definition(self, size: int, levels: list[int]) -> None:
        student, teacher = features(3, 5, size, size), features(3, 5, size, size, seed=1)
        wanted, weights = ((student - teacher) ** 2).mean((1, 2, 3)), [1.0]
        for level in levels:
            weights.append(weights[-1] / 2)
            s, t = (F.adaptive_avg_pool2d(x, level) for x in (student, teacher))
            wanted = wanted + weights[-1] * ((s - t) ** 2).mean((1, 2, 3))
        value = hierarchical_context(student, teacher)
        torch.testing.assert_close(value, wanted / sum(weights), rtol=1e-9, atol=0)

    def test_only_maps_have_resolutions(self) -> None:
        with pytest.raises(ValueError, match=r"needs maps \[N, C, H, W\], got \(2, 3, 4\)"):
            hierarchical_context(features(2, 3, 4), features(2, 3, 4))


class TestActivationBoundary:
    def test_the_sum_over_values_is_golden(self, oracle: Any) -> None:
        case = oracle("ab")
        value = activation_boundary(case.inputs["f_s"], case.inputs["f_t"]).sum() * 6 * 5 * 5
        case.assert_value(value)
        case.assert_gradient(value, "f_s")

    @pytest.mark.parametrize(
        ("student", "teacher", "wanted"),
        [(3.0, 0.1, 0), (1.0, 5.0, 1), (-1.0, 5.0, 9), (-3.0, -0.1, 0), (1.0, 0.0, 9), (1, -1, 9)],
    )
    def test_the_students_response_is_asked_to_be_a_margin_beyond_zero(
        self, student: float, teacher: float, wanted: float
    ) -> None:
        value = activation_boundary(torch.tensor([[student]]), torch.tensor([[teacher]]), margin=2)
        assert value.item() == wanted

    def test_only_the_teachers_sign_matters(self) -> None:
        student, teacher = features(4, 6), features(4, 6, seed=1)
        torch.testing.assert_close(
            activation_boundary(student, teacher), activation_boundary(student, teacher.sign())
        )


class TestPartialMSE:
    @pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
    def test_value_and_gradient_are_the_definition(self, margin: float) -> None:
        student, teacher = features(4, 6, 3).requires_grad_(), features(4, 6, 3, seed=1)
        s, target = student.detach(), teacher.clamp(min=-margin)
        counts = ((s > target) | (teacher > 0)).double()
        value = partial_mse(student, teacher, margin=margin)
        torch.testing.assert_close(value, (counts * (s - target) ** 2).mean((1, 2)))
        value.sum().backward()
        torch.testing.assert_close(student.grad, 2 * counts * (s - target) / 18)

    def test_off_is_off_however_far(self) -> None:
        assert partial_mse(torch.tensor([[-1e4, -0.9]]), torch.tensor([[-2.0, -9.0]])).item() == 0

    def test_where_the_teacher_is_on_it_is_mse(self) -> None:
        student, teacher = features(4, 6), features(4, 6, seed=1).abs()
        torch.testing.assert_close(partial_mse(student, teacher), mse(student, teacher))


class TestActiveMSE:
    def test_the_sum_over_all_values_is_the_published_number(self) -> None:
        student, teacher = features(4, 6, 3).requires_grad_(), features(4, 6, 3, seed=1)
        on = ((student > 0) | (teacher > 0)).double()
        wanted = ((student - teacher) ** 2 * on).sum()
        value = active_mse(student, teacher)
        assert value.shape == (4,)
        torch.testing.assert_close(value.mean() * teacher.numel(), wanted)
        both = (torch.autograd.grad(v, student)[0] for v in (value.mean() * 72, wanted))
        torch.testing.assert_close(*both)

    def test_off_on_both_sides_is_off_however_far(self) -> None:
        student = torch.tensor([[-1e4, 0.0, 2.0, -3.0]])
        value = active_mse(student, torch.tensor([[-2.0, -9.0, -1.0, 1.0]]))
        assert value.item() == (9 + 16) / 4


@pytest.mark.parametrize("loss", [cosine_distance, normalized_smooth_l1])
@pytest.mark.parametrize("shape", [(3,), (3, 2, 2, 2, 2)])
def test_what_is_no_form_of_features_is_refused(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"features must be vectors \[N, D\]"):
        loss(torch.zeros(shape), torch.zeros(shape))


def test_several_maps_are_reviewed_one_by_one() -> None:
    sizes = [(4, 8), (6, 4)]
    student, teacher = (
        tuple(torch.randn(3, c, h, h, requires_grad=True) for c, h in sizes) for _ in range(2)
    )
    both = hierarchical_context(student, teacher)
    apart = [hierarchical_context(s, t) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(both, apart[0] + apart[1])


def test_the_teacher_bounds_the_error_and_is_not_copied() -> None:
    labels = torch.zeros(3, 2)
    student = torch.tensor([[3.0, 4.0], [0.5, 0.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    value = bounded_mse(student, teacher, labels)
    torch.testing.assert_close(value, torch.tensor([12.5, 0.0, 0.0]))
    value.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]))
    # Better than the teacher by less than the margin is not good enough.
    wider = bounded_mse(student, teacher, labels, margin=0.5)
    torch.testing.assert_close(wider, torch.tensor([12.5, 0.125, 1.0]))


def test_the_bound_needs_numbers_for_labels() -> None:
    with pytest.raises(ValueError, match="labels must be numbers"):
        bounded_mse(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
