"""Logits that are not made: what they stand for, their rows, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attar.losses import Projected


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def head(*lead: int, **options: Any) -> Projected:
    return Projected(random(*lead, 3), random(7, 3, seed=1), **options)


def test_it_stands_for_the_logits_of_the_layer() -> None:
    value = head(4, bias=random(7, seed=2), scale=0.5, softcap=2.0)
    raw = 0.5 * (value.hidden @ value.weight.T + value.bias)
    torch.testing.assert_close(value.dense(), 2 * (raw / 2).tanh())
    torch.testing.assert_close(head(4).dense(), head(4).hidden @ head(4).weight.T)
    assert value.shape == (4, 7)
    assert len(value) == 4


def test_half_precision_is_widened() -> None:
    value = head(4, bias=random(7, seed=2))
    half = Projected(value.hidden.bfloat16(), value.weight.bfloat16())
    assert half.dense().dtype == torch.float32
    exact = half.hidden.double() @ half.weight.double().T
    torch.testing.assert_close(half.dense().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "rows",
    [
        1,
        slice(1, 3),
        torch.tensor([2, 0]),
        torch.tensor([[True, False], [False, True], [True, True], [False, False]]),
        (slice(None), 1),
        (torch.tensor([0, 3]), torch.tensor([1, 0])),
    ],
    ids=str,
)
def test_rows_are_those_of_the_logits(rows: Any) -> None:
    value = head(4, 2)
    torch.testing.assert_close(value[rows].dense(), value.dense()[rows])


@pytest.mark.parametrize("rows", [(0, 0, 1), (0, 1, slice(2)), (..., 1, slice(None))])
def test_columns_are_not_cut_by_mistake(rows: Any) -> None:
    with pytest.raises((IndexError, ValueError)):
        head(4, 2)[rows]


def test_gradients_reach_the_hidden_states_through_rows() -> None:
    hidden = random(4, 3).requires_grad_()
    Projected(hidden, random(7, 3))[1:3].dense().sum().backward()
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [False, True, True, False]


def test_detached_it_has_no_graph() -> None:
    hidden, weight = random(4, 3).requires_grad_(), random(7, 3).requires_grad_()
    value = Projected(hidden, weight, weight.sum(-1), softcap=3.0).detach()
    assert not value.dense().requires_grad
    assert value.softcap == 3.0


def test_it_goes_to_another_device() -> None:
    value = head(4, bias=random(7)).to("meta")
    assert {value.hidden.device.type, value.weight.device.type, value.bias.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("hidden", "weight", "options", "message"),
    [
        ((4, 3), (7, 2), {}, r"hidden \[..., D\] and weight \[V, D\], got \(4, 3\) and \(7, 2\)"),
        ((4, 3), (3,), {}, r"got \(4, 3\) and \(3,\)"),
        ((), (7, 3), {}, r"got \(\) and \(7, 3\)"),
        ((4, 3), (7, 3), {"bias": torch.zeros(3)}, r"shape \[7\].*got \(3,\)"),
        ((4, 3), (7, 3), {"softcap": 0.0}, r"softcap must be a number above 0, or None, got 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Projected(torch.zeros(hidden), torch.zeros(weight), **options)


def test_it_is_not_taken_for_a_tensor() -> None:
    with pytest.raises(AttributeError, match=r"no 'softmax'.*attar.losses.wide, or dense"):
        head(4).softmax(-1)
