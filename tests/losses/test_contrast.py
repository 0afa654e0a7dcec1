"""Contrast within the batch, and affinities of two modalities, by definition and golden values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import affinity_kl, contrast, cosine_distance, kl_divergence


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_value_is_the_definition(temperature: float) -> None:
    student, teacher = points(7, 5), points(7, 5, seed=1)
    s, t = (
        x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (student, teacher)
    )
    e = np.exp(s @ t.T / temperature)
    wanted = -np.log(np.diag(e) / e.sum(1)).mean()
    value = contrast(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(wanted, rel=1e-9)


def test_equal_features_of_all_examples_are_chance() -> None:
    assert contrast(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8))


def test_the_own_teacher_is_better_than_another_examples() -> None:
    teacher = points(6, 5)
    assert contrast(teacher, teacher) < 0.1 < contrast(teacher.roll(1, 0), teacher)


def test_length_of_vectors_and_common_rotation_change_nothing() -> None:
    student, teacher = points(6, 5), points(6, 5, seed=1)
    rotation = torch.linalg.qr(points(5, 5, seed=2)).Q
    torch.testing.assert_close(
        contrast(9 * student @ rotation, teacher @ rotation / 7), contrast(student, teacher)
    )


def test_alone_there_is_nothing_to_tell_apart() -> None:
    student = points(1, 5).requires_grad_()
    value = contrast(student, points(1, 5, seed=1))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_a_zero_vector_gets_no_gradient() -> None:
    student = points(4, 5).float()
    student[1] = 0
    student.requires_grad_()
    contrast(student, points(4, 5, seed=1).float()).backward()
    assert student.grad is not None
    assert (student.grad[1] == 0).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (4, 5, 1), (3, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same shape"):
        contrast(points(4, 5), points(*shape))


# Two modalities: the parts of CLIP-KD.

SCALE = 1 / 0.07


def towers(case: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    student, teacher = (
        (case.inputs[names[0]], case.inputs[names[1]])
        for names in (("img_s", "txt_s"), ("img_t_raw", "txt_t_raw"))
    )
    return student, teacher


def test_affinities_have_the_golden_value_and_gradient(oracle: Any) -> None:
    case = oracle("clip_kd")
    value = affinity_kl(*towers(case), temperature=1 / SCALE, teacher_temperature=0.01)
    case.assert_value(value, "ckd_loss")
    for name in ("img_s", "txt_s"):
        case.assert_gradient(value, name, "ckd::")


def test_contrast_of_the_towers_is_the_golden_task_and_interactive_loss(oracle: Any) -> None:
    """The published cross scale is log(1 / 0.07), without its exponential."""
    case = oracle("clip_kd")
    (image, text), (image_t, text_t) = towers(case)
    both = (
        contrast(image, text, temperature=1 / SCALE),
        contrast(text, image, temperature=1 / SCALE),
    )
    case.assert_value(sum(both) / 2, "task_loss")
    cross = 1 / math.log(1 / 0.07)
    both = contrast(image, text_t, temperature=cross), contrast(text, image_t, temperature=cross)
    case.assert_value(sum(both) / 2, "icl_loss")


def test_cosine_distance_of_the_towers_is_the_golden_feature_loss(oracle: Any) -> None:
    case = oracle("clip_kd")
    student, teacher = towers(case)
    parts = [cosine_distance(s, t).mean() for s, t in zip(student, teacher, strict=True)]
    case.assert_value(2000 * sum(parts) * 2 / 6, "fd_loss")


def test_kl_of_cross_affinities_is_the_golden_value(oracle: Any) -> None:
    case = oracle("clip_kd")
    (image, text), (image_t, text_t) = (
        [F.normalize(side, dim=1) for side in sides] for sides in towers(case)
    )
    told = 100 * image_t @ text_t.T
    scale = math.log(1 / 0.07)
    both = [
        kl_divergence(scale * one @ other.T, wanted, temperature=1.0).mean()
        for one, other, wanted in ((image, text_t, told), (text, image_t, told.T))
    ]
    case.assert_value(sum(both) / 2, "cross_kd_loss")


def test_affinities_at_one_temperature_are_zero_at_equality() -> None:
    pair = points(5, 4), points(5, 4, seed=1)
    value = affinity_kl(pair, pair, temperature=0.1, teacher_temperature=0.1)
    assert abs(value.item()) < 1e-12


def test_affinities_of_widths_that_differ_and_of_none_or_one() -> None:
    for rows in (0, 1, 5):
        pair = points(rows, 4).requires_grad_(), points(rows, 4, seed=1)
        value = affinity_kl(pair, (points(rows, 7), points(rows, 7, seed=1)))
        value.backward()
        assert value.isfinite()
        assert rows > 1 or value.item() == 0
        assert pair[0].grad is not None


def test_what_is_no_pair_of_embeddings_is_refused() -> None:
    one, pair = points(4, 3), (points(4, 3), points(4, 3))
    with pytest.raises(ValueError, match="teacher must be two tensors of features"):
        affinity_kl(pair, (one,))
    with pytest.raises(ValueError, match="student must be two tensors of features"):
        affinity_kl((one, points(4, 5)), pair)
    with pytest.raises(ValueError, match="same number of examples"):
        affinity_kl(pair, (points(5, 3), points(5, 3)))
