"""Losses of detection: golden values, definitions, images without objects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    focal_features,
    global_context,
    kl_divergence,
    localization_kl,
    mse,
    quality_focal,
)


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights(boxes: list[Tensor], image: tuple[int, int], height: int, width: int) -> Tensor:
    """One over the area of the smallest box over a position, as published; corners are included."""
    maps = torch.zeros(len(boxes), height, width, dtype=torch.float64)
    for row, many in zip(maps, boxes, strict=True):
        for left, top, right, bottom in many.detach().tolist():
            x0, x1 = math.floor(left / image[1] * width), math.ceil(right / image[1] * width)
            y0, y1 = math.floor(top / image[0] * height), math.ceil(bottom / image[0] * height)
            part = row[y0 : y1 + 1, x0 : x1 + 1]
            part.clamp_(min=1 / ((y1 + 1 - y0) * (x1 + 1 - x0)))
    return maps


def test_focal_part_with_the_start_of_the_global_one_is_the_golden_value(oracle: Any) -> None:
    case = oracle("fgd")
    student, teacher = case.inputs["f_s"], case.inputs["f_t"]
    on = weights([case.inputs["boxes0"], case.inputs["boxes1"]], (64, 80), 8, 10)
    start = global_context(student, teacher)
    start.student.look.weight.data.copy_(case.inputs["ms_w"].squeeze(3))
    start.teacher.look.weight.data.copy_(case.inputs["mt_w"].squeeze(3))
    relation = start(student, teacher).mean() * student[0].numel()
    case.assert_value(relation, "rela")
    case.assert_value(mse(student, teacher).mean() * student[0].numel(), "rela")
    value = 1e-3 * focal_features(student, teacher, on).mean() + 5e-6 * relation
    case.assert_value(value)
    case.assert_gradient(value, "f_s")


def test_attention_part_alone_is_the_golden_value(oracle: Any) -> None:
    case = oracle("fgd")
    given = case.inputs["f_s"], case.inputs["f_t"], torch.zeros(2, 8, 10)
    with_, without = (
        focal_features(*given, background=0.0, attention=share).mean() for share in (1.0, 0.0)
    )
    case.assert_value(with_ - without, "mask_loss")
    assert without.item() == 0


def test_a_gap_weighs_as_the_golden_attention_of_its_position_and_its_channel(oracle: Any) -> None:
    case = oracle("fgd")
    teacher = case.inputs["f_t"].detach()
    for row, where, which in zip(
        teacher, case.expected["S_attention_t"], case.expected["C_attention_t"], strict=True
    ):
        # Each row errs by one at one value, and every position counts one.
        many = row.expand(row.numel(), *row.shape)
        student = many + torch.eye(row.numel(), dtype=row.dtype).view(-1, *row.shape)
        on = torch.ones(row.numel(), *row.shape[1:])
        each = focal_features(student, many, on, attention=0.0).view(row.shape)
        case.close(each.mean(0), where)
        case.close(each.mean((1, 2)), which)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_an_image_without_objects_or_without_background_is_finite(fill: float) -> None:
    student = values(2, 3, 4, 5).requires_grad_()
    value = focal_features(student, values(2, 3, 4, 5, seed=1), torch.full((2, 4, 5), fill))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_weights_of_other_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be weights \[N, H, W\] .*\(2, 4, 4\)"):
        focal_features(values(2, 3, 4, 5), values(2, 3, 4, 5), torch.ones(2, 4, 4))


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_localization_is_the_mean_over_edges_of_their_divergences(temperature: float) -> None:
    student, teacher = values(5, 4, 17), values(5, 4, 17, seed=1)
    wanted = sum(
        kl_divergence(student[:, edge], teacher[:, edge], temperature=temperature)
        for edge in range(4)
    )
    value = localization_kl(student, teacher, temperature=temperature)
    torch.testing.assert_close(value, wanted / 4)


def test_one_bin_is_no_distribution() -> None:
    with pytest.raises(ValueError, match=r"at least two bins, got \(5, 4, 1\)"):
        localization_kl(values(5, 4, 1), values(5, 4, 1))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_quality_focal_is_its_definition_with_a_factor_that_learns(beta: float) -> None:
    student, teacher = (values(6, 3, seed=k).requires_grad_() for k in (0, 1))
    p = teacher.detach().sigmoid()
    cost = F.binary_cross_entropy_with_logits(student, p, reduction="none")
    wanted = ((p - student.sigmoid()).abs() ** beta * cost).sum(1)
    value = quality_focal(student, teacher, beta=beta)
    torch.testing.assert_close(value, wanted)
    for one, other in zip(
        torch.autograd.grad(value.sum(), student),
        torch.autograd.grad(wanted.sum(), student),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_equal_and_certain_answers_have_finite_gradients(beta: float) -> None:
    student = torch.tensor([[0.0, 3.0, -1e4, 1e4, -math.inf]], requires_grad=True)
    value = quality_focal(student, student.detach(), beta=beta)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
