"""Projectors: shapes, values, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attar.models import projectors
from attar.runtime import UsageError


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "parameters"),
    [
        ((4, 3), (4, 5), nn.Linear, 3 * 5 + 5),
        ((4, 7, 3), (4, 7, 5), nn.Linear, 3 * 5 + 5),
        ((4, 3, 6, 2), (4, 5, 6, 2), nn.Conv2d, 3 * 5 + 5),
        ((4, 3, 6, 2), (4, 3, 6, 2), nn.Conv2d, 3 * 3 + 3),
    ],
)
def test_the_result_has_the_teachers_shape(student, teacher, kind, parameters):
    signal = torch.rand(student)
    module = projectors.linear(signal, torch.rand(teacher))
    assert isinstance(module, kind)
    assert module(signal).shape == teacher
    assert sum(p.numel() for p in module.parameters()) == parameters
    module(signal).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_convolution_maps_each_position_alone():
    module = projectors.linear(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4))
    signal = torch.rand(2, 3, 4, 4)
    by_hand = torch.einsum("nchw,dc->ndhw", signal, module.weight[:, :, 0, 0])
    torch.testing.assert_close(module(signal), by_hand + module.bias.view(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("signal", "weights"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_weights_are_wide(signal, weights):
    module = projectors.linear(torch.rand(2, 3, dtype=signal), torch.rand(2, 4))
    assert {p.dtype for p in module.parameters()} == {weights}


def test_same_seed_same_projector():
    signals = torch.rand(2, 3), torch.rand(2, 4)
    torch.manual_seed(0)
    first = projectors.linear(*signals)
    torch.manual_seed(0)
    assert torch.equal(first.weight, projectors.linear(*signals).weight)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((2, 3, 4, 4), (2, 5, 8, 8), r"height and width.*\[2, 3, 4, 4\].*\[2, 5, 8, 8\]"),
        ((2, 3, 4, 4), (2, 5), "one kind"),
        ((2, 3), (2, 7, 3), "one kind"),
        ((2, 3, 4, 4, 4), (2, 5, 4, 4, 4), "one kind"),
        ((2,), (2,), "one kind"),
        ((2, 7, 3), (2, 8, 3), "only size 2 may differ"),
        ((2, 3), (3, 3), "only size 1 may differ"),
        ((2, 3, 4, 4), (3, 3, 4, 4), "only size 1 may differ"),
    ],
)
def test_shapes_that_no_linear_map_joins(student, teacher, said):
    with pytest.raises(UsageError, match=said):
        projectors.linear(torch.rand(student), torch.rand(teacher))


@pytest.mark.parametrize("signal", [torch.ones(2, 3, dtype=torch.int64), (torch.rand(2, 3),), None])
def test_signals_that_are_no_floating_tensor(signal):
    with pytest.raises(UsageError, match="the student's signal must be one floating tensor"):
        projectors.linear(signal, torch.rand(2, 3))
    with pytest.raises(UsageError, match="the teacher's signal must be one floating tensor"):
        projectors.linear(torch.rand(2, 3), signal)


def test_the_room_lists_its_projectors():
    assert projectors.__all__ == ["linear"]
