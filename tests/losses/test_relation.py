"""Relations between examples: published values, definitions, invariances, points that coincide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attar.losses import (
    correlation_congruence,
    cosine_relation,
    kernel_alignment,
    probabilistic_transfer,
    relation,
    relation_angle,
    relation_distance,
    similarity_preserving,
)

Loss = Callable[..., Tensor]
Reference = Callable[[np.ndarray, np.ndarray], float]


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def by_definition_distance(s: np.ndarray, t: np.ndarray) -> float:
    def relative(x: np.ndarray) -> np.ndarray:
        d = np.linalg.norm(x[:, None] - x[None], axis=2)
        return d / d[d > 0].mean()

    return huber(relative(s) - relative(t)).mean()


def by_definition_angle(s: np.ndarray, t: np.ndarray) -> float:
    def cosines(x: np.ndarray) -> np.ndarray:
        gap = x[:, None] - x[None]
        length = np.linalg.norm(gap, axis=2, keepdims=True)
        way = np.divide(gap, length, out=np.zeros_like(gap), where=length > 0)
        return np.einsum("ijd,kjd->ijk", way, way)

    return huber(cosines(s) - cosines(t)).mean()


def directions(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_definition_probabilities(s: np.ndarray, t: np.ndarray) -> float:
    def near(x: np.ndarray) -> np.ndarray:
        similar = (directions(x) @ directions(x).T + 1) / 2
        return similar / similar.sum(1, keepdims=True)

    q, p = near(s), near(t)
    return (p * np.log((p + 1e-7) / (q + 1e-7))).sum(1).mean()


def by_definition_congruence(s: np.ndarray, t: np.ndarray, gamma: float = 0.4) -> float:
    def kernel(x: np.ndarray) -> np.ndarray:
        c = directions(x) @ directions(x).T
        return sum(
            np.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * c**p for p in range(3)
        )

    return ((kernel(s) - kernel(t)) ** 2).mean()


def by_definition_alignment(s: np.ndarray, t: np.ndarray) -> float:
    s, t = s - s.mean(0), t - t.mean(0)
    cross, own, other = (np.linalg.norm(a.T @ b) for a, b in ((s, t), (s, s), (t, t)))
    return 1 - cross**2 / (own * other)


def by_definition_similarity(s: np.ndarray, t: np.ndarray) -> float:
    g_s, g_t = directions(s @ s.T), directions(t @ t.T)
    return ((g_s - g_t) ** 2).mean()


DEFINITIONS: dict[Loss, Reference] = {
    similarity_preserving: by_definition_similarity,
    relation_distance: by_definition_distance,
    relation_angle: by_definition_angle,
    probabilistic_transfer: by_definition_probabilities,
    correlation_congruence: by_definition_congruence,
    kernel_alignment: by_definition_alignment,
}
every_relation = pytest.mark.parametrize("loss", list(DEFINITIONS))


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@every_relation
@pytest.mark.parametrize("sizes", [(9, 4, 7), (3, 1, 2), (24, 50, 8)])
def test_value_is_the_definition(loss: Loss, sizes: tuple[int, int, int]) -> None:
    count, mine, theirs = sizes
    student, teacher = points(count, mine), points(count, theirs, seed=1)
    wanted = DEFINITIONS[loss](student.numpy(), teacher.numpy())
    assert loss(student, teacher).item() == pytest.approx(wanted, rel=1e-9)


@every_relation
def test_features_are_flattened(loss: Loss) -> None:
    student, teacher = points(6, 4, 3, 2), points(6, 5, 2, seed=1)
    value = loss(student, teacher)
    torch.testing.assert_close(value, loss(student.flatten(1), teacher.flatten(1)))


@every_relation
def test_vectors_are_asked_for(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"features \[N, D\] .* got \(4,\) and \(4, 2\)"):
        loss(points(4), points(4, 2))


# Published values.


def test_similarity_preserving_golden(oracle: Any) -> None:
    case = oracle("sp")
    value = similarity_preserving(case.inputs["f_s"], case.inputs["f_t"])
    case.assert_value(value)
    case.assert_gradient(value, "f_s")


def test_the_published_code_of_congruence_is_another_function(oracle: Any) -> None:
    """It multiplies consecutive differences, so it changes with the order; ours does not."""
    case = oracle("cc_repdistiller")
    student, teacher = case.inputs["e_s"], case.inputs["e_t"].detach()

    def published(order: list[int]) -> Tensor:
        gap = (student[order] - teacher[order]).abs()
        return (gap[:-1] * gap[1:]).sum(1).mean()

    value = published([0, 1, 2, 3, 4, 5])
    case.assert_value(value)
    case.assert_gradient(value, "e_s")
    other = [3, 0, 5, 1, 4, 2]
    assert abs(published(other) - value) > 0.1
    torch.testing.assert_close(
        correlation_congruence(student[other], teacher[other]),
        correlation_congruence(student, teacher),
    )
    assert correlation_congruence(student, student).item() == 0


# Invariances.


@every_relation
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rotations_change_nothing(loss: Loss, side: str) -> None:
    given = {"student": points(7, 5), "teacher": points(7, 5, seed=1)}
    rotation = torch.linalg.qr(points(5, 5, seed=2)).Q
    turned = {**given, side: given[side] @ rotation}
    torch.testing.assert_close(loss(**turned), loss(**given))


@pytest.mark.parametrize("loss", [relation_distance, relation_angle, kernel_alignment])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_shift_and_scale_change_nothing(loss: Loss, side: str) -> None:
    given = {"student": points(7, 5), "teacher": points(7, 5, seed=1)}
    moved = {**given, side: 30 * given[side] + 5}
    torch.testing.assert_close(loss(**moved), loss(**given))


@pytest.mark.parametrize("loss", [probabilistic_transfer, correlation_congruence])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_length_of_a_vector_changes_nothing(loss: Loss, side: str) -> None:
    given = {"student": points(4, 5), "teacher": points(4, 5, seed=1)}
    longer = given[side] * torch.tensor([[1.0], [9.0], [0.1], [3.0]])
    torch.testing.assert_close(loss(**{**given, side: longer}), loss(**given))


@pytest.mark.parametrize("gamma", [0.1, 0.4, 2.0])
def test_gamma_of_congruence_is_the_width_of_its_kernel(gamma: float) -> None:
    student, teacher = points(7, 5), points(7, 5, seed=1)
    wanted = by_definition_congruence(student.numpy(), teacher.numpy(), gamma)
    value = correlation_congruence(student, teacher, gamma=gamma)
    assert value.item() == pytest.approx(wanted, rel=1e-9)


# Angles in blocks.


@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_blocks_change_neither_value_nor_gradient(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = points(9, 4), points(9, 3, seed=1)
    wanted = value_and_gradient(relation_angle, student, teacher)
    monkeypatch.setattr(relation, "BLOCK", block)
    torch.testing.assert_close(value_and_gradient(relation_angle, student, teacher), wanted)


def test_angles_without_gradient_have_the_same_value() -> None:
    student, teacher = points(9, 4), points(9, 3, seed=1)
    with torch.no_grad():
        value = relation_angle(student, teacher)
    torch.testing.assert_close(value, value_and_gradient(relation_angle, student, teacher)[0])


# Degenerate points.


@every_relation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_points_that_coincide_pull_nothing_apart(
    loss: Loss, dtype: torch.dtype, scale: float
) -> None:
    student, teacher = points(6, 5).to(dtype) * scale, points(6, 5, seed=1).to(dtype)
    student[1] = student[0]
    student[4] = student[3]
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() * scale < 2


@pytest.mark.parametrize("loss", [relation_distance, relation_angle])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_points_are_at_distance_zero_whatever_rounding_says(
    loss: Loss, dtype: torch.dtype
) -> None:
    student, teacher = points(6, 64) + 3, points(6, 64, seed=1) - 5
    student[1], teacher[2] = student[0], teacher[5]
    wanted = DEFINITIONS[loss](student.numpy(), teacher.numpy())
    value = loss(student.to(dtype), teacher.to(dtype)).item()
    assert value == pytest.approx(wanted, rel=1e-4 if dtype is torch.float32 else 1e-9)


@every_relation
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_all_points_in_one_place_have_a_value_and_a_finite_gradient(
    loss: Loss, side: str, fill: float
) -> None:
    given = {"student": points(6, 5).float(), "teacher": points(6, 5, seed=1).float()}
    for name in given:
        if side in (name, "both"):
            given[name] = torch.full_like(given[name], fill)
    value, gradient = value_and_gradient(loss, given["student"], given["teacher"])
    assert value.isfinite()
    assert gradient.abs().max() < 2
    if side == "both":
        assert value.item() == pytest.approx(0, abs=1e-6)


@every_relation
def test_a_zero_vector_gets_no_gradient_larger_than_the_others(loss: Loss) -> None:
    student, teacher = points(6, 5).float(), points(6, 5, seed=1).float()
    student[2] = 0
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite()
    assert gradient.abs().max() < 2


@pytest.mark.parametrize(
    ("loss", "fewest"),
    [
        (similarity_preserving, 1),
        (relation_distance, 2),
        (relation_angle, 2),
        (probabilistic_transfer, 1),
        (correlation_congruence, 1),
        (kernel_alignment, 1),
    ],
)
def test_too_few_examples_have_no_relations(loss: Loss, fewest: int) -> None:
    value, gradient = value_and_gradient(
        loss, points(fewest, 5).float(), points(fewest, 5, seed=1).float()
    )
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-5


def test_a_constant_student_is_not_aligned_and_a_constant_teacher_says_nothing() -> None:
    varied, constant = points(6, 5), torch.zeros(6, 5, dtype=torch.float64)
    assert kernel_alignment(constant, varied).item() == 1
    assert kernel_alignment(varied, constant).item() == 0


@every_relation
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_is_near_float64_far_from_the_origin(loss: Loss, offset: float) -> None:
    student, teacher = points(32, 64) + offset, points(32, 64, seed=1) - offset
    value, gradient = value_and_gradient(loss, student, teacher)
    if offset and loss in (similarity_preserving, probabilistic_transfer, correlation_congruence):
        return  # relations of directions: far from the origin all directions are one
    single, gradient_single = value_and_gradient(loss, student.float(), teacher.float())
    torch.testing.assert_close(single.double(), value, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        gradient_single.double(), gradient, rtol=0, atol=0.01 * gradient.abs().max().item()
    )


# Cosines between examples.


def test_cosine_relation_is_its_definition() -> None:
    student, teacher = (
        torch.randn(6, width, generator=torch.Generator().manual_seed(width)).double()
        for width in (4, 7)
    )
    cosines = [
        torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
        for x in (student, teacher)
    ]
    wanted = ((cosines[0] - cosines[1]) ** 2).sum() / 36  # the published code does not divide
    torch.testing.assert_close(cosine_relation(student, teacher), wanted)
    torch.testing.assert_close(cosine_relation(3 * student, teacher / 2), wanted)


def test_an_example_without_a_teacher_has_no_topology() -> None:
    student, teacher = torch.randn(5, 4).requires_grad_(), torch.randn(5, 3)
    teacher[2] = 0
    cosine_relation(student, teacher).backward()
    assert student.grad is not None
    assert (student.grad[2] == 0).all()
    assert student.grad.isfinite().all()
