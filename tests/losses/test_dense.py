"""Losses of dense prediction: published values, definitions, invariances, constant channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attar.losses import channel_correlation, channel_kl, pixel_relation


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TestChannelKL:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_value_and_gradient_are_the_definition(self, temperature: float) -> None:
        student, teacher = maps(3, 4, 2, 5).requires_grad_(), maps(3, 4, 2, 5, seed=1)
        q, p = ((x / temperature).flatten(2).softmax(2).detach() for x in (student, teacher))
        wanted = temperature**2 * (p * (p / q).log()).sum(2).mean(1)
        value = channel_kl(student, teacher, temperature=temperature)
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
        value.sum().backward()
        torch.testing.assert_close(
            student.grad, (temperature * (q - p) / 4).view(3, 4, 2, 5), rtol=1e-9, atol=1e-12
        )

    def test_a_constant_added_to_a_channel_changes_nothing(self) -> None:
        student, teacher = maps(3, 4, 2, 5), maps(3, 4, 2, 5, seed=1)
        shift = 1e3 * maps(3, 4, 1, 1, seed=2)
        torch.testing.assert_close(
            channel_kl(student + shift, teacher - shift), channel_kl(student, teacher)
        )

    def test_finite_where_a_softmax_is_zero(self) -> None:
        student = torch.tensor([[[[0.0, 200.0]]]], requires_grad=True)
        value = channel_kl(student, torch.tensor([[[[200.0, 0.0]]]]), temperature=1.0)
        value.backward()
        assert value.item() == pytest.approx(200)
        assert student.grad is not None
        assert student.grad.flatten().tolist() == [-1, 1]

    def test_tokens_are_positions(self) -> None:
        student, teacher = maps(3, 4, 2, 5), maps(3, 4, 2, 5, seed=1)
        tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
        torch.testing.assert_close(channel_kl(*tokens), channel_kl(student, teacher))

    def test_other_sizes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="same shape"):
            channel_kl(maps(2, 3, 4, 4), maps(2, 3, 2, 2))


class TestChannelCorrelation:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("pkd_det_pearson")
        value = channel_correlation(case.inputs["f_s"], case.inputs["f_t"])
        case.assert_value(value, "loss_mean")
        case.assert_gradient(value, "f_s")

    def test_it_is_one_less_pearsons_correlation_of_each_channel(self) -> None:
        student, teacher = maps(3, 4, 2, 5), maps(3, 4, 2, 5, seed=1)
        flat = [x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher)]
        rho = [np.corrcoef(s, t)[0, 1] for s, t in zip(*flat, strict=True)]
        value = channel_correlation(student, teacher).item()
        assert value == pytest.approx(29 / 30 * (1 - np.mean(rho)), rel=1e-5)

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_scale_and_shift_of_each_channel_are_free(self, side: str) -> None:
        given = {"student": maps(3, 4, 2, 5), "teacher": maps(3, 4, 2, 5, seed=1)}
        scale = torch.tensor([0.5, 1.0, 20.0, 3.0])[:, None, None]
        moved = {**given, side: given[side] * scale + 7 * scale.flip(0)}
        torch.testing.assert_close(
            channel_correlation(**moved), channel_correlation(**given), rtol=1e-5, atol=0
        )

    def test_tokens_and_vectors_are_positions_of_channels(self) -> None:
        student, teacher = maps(3, 4, 2, 5), maps(3, 4, 2, 5, seed=1)
        tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
        vectors = [x.flatten(0, 1) for x in tokens]
        wanted = channel_correlation(student, teacher)
        torch.testing.assert_close(channel_correlation(*tokens), wanted)
        torch.testing.assert_close(channel_correlation(*vectors), wanted)

    def test_a_constant_teacher_channel_says_nothing(self) -> None:
        student, teacher = maps(3, 2, 4, 4), maps(3, 2, 4, 4, seed=1)
        alone = channel_correlation(student[:, :1], teacher[:, :1])
        teacher[:, 1] = 5.0
        student.requires_grad_()
        value = channel_correlation(student, teacher)
        value.backward()
        torch.testing.assert_close(value, alone / 2)
        assert student.grad is not None
        assert (student.grad[:, 1] == 0).all()

    def test_a_constant_student_channel_counts_half_without_gradient(self) -> None:
        student = torch.zeros(3, 2, 4, 4, requires_grad=True)
        value = channel_correlation(student, maps(3, 2, 4, 4).float())
        value.backward()
        assert value.item() == pytest.approx(0.5 * 47 / 48, rel=1e-5)
        assert student.grad is not None
        assert (student.grad == 0).all()

    def test_one_value_a_channel_has_no_correlation(self) -> None:
        assert channel_correlation(maps(1, 4), maps(1, 4, seed=1)).item() == 0


class TestPixelRelation:
    def test_golden(self, oracle: Any) -> None:
        case = oracle("cirkd_minibatch_T1")
        value = pixel_relation(case.inputs["f_s"], case.inputs["f_t"])
        case.assert_value(value)
        case.assert_gradient(value, "f_s")

    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    def test_value_is_the_definition(self, temperature: float) -> None:
        student, teacher = maps(2, 4, 2, 3), maps(2, 5, 2, 3, seed=1)
        total = 0.0
        for a in range(2):
            for b in range(2):
                maps_of = []
                for x in (student, teacher):
                    rows = [x[i].flatten(1).T.numpy() for i in (a, b)]
                    one, two = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows)
                    e = np.exp(one @ two.T / temperature)
                    maps_of.append(e / e.sum(1, keepdims=True))
                q, p = maps_of
                total += (p * np.log(p / q)).sum(1).mean() / 4
        value = pixel_relation(student, teacher, temperature=temperature)
        assert value.item() == pytest.approx(total, rel=1e-9)

    def test_rotations_and_lengths_change_nothing(self) -> None:
        student, teacher = maps(2, 4, 2, 3), maps(2, 5, 2, 3, seed=1)
        rotation = torch.linalg.qr(maps(4, 4, seed=2)).Q
        turned = torch.einsum("nchw,cd->ndhw", student, rotation) * maps(2, 1, 2, 3, seed=3).abs()
        torch.testing.assert_close(
            pixel_relation(turned, 9 * teacher), pixel_relation(student, teacher)
        )

    def test_a_zero_pixel_gets_no_gradient(self) -> None:
        student, teacher = maps(2, 4, 2, 3).float(), maps(2, 5, 2, 3, seed=1).float()
        student[0, :, 1, 1] = 0
        student.requires_grad_()
        pixel_relation(student, teacher).backward()
        assert student.grad is not None
        assert (student.grad[0, :, 1, 1] == 0).all()
        assert student.grad.isfinite().all()

    def test_other_positions_are_refused(self) -> None:
        with pytest.raises(ValueError, match="same number of positions, got 16 and 4"):
            pixel_relation(maps(2, 3, 4, 4), maps(2, 3, 2, 2))
