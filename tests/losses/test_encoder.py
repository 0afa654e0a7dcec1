"""Losses on the insides of transformers: golden values, definitions, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import absolute_and_cosine, attention_relation, attention_scores, cross_entropy


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_absolute_and_cosine_error_is_the_golden_value(oracle: Any) -> None:
    case = oracle("distilhubert")
    student, teacher = case.inputs["pred"], case.inputs["target"]
    value = absolute_and_cosine(student, teacher).mean()
    case.assert_value(value)
    case.assert_gradient(value, "pred")
    apart = absolute_and_cosine(student, teacher, cosine=0.0).mean()
    case.assert_value(apart, "rec")
    case.assert_value(value - apart, "sim")


def test_zero_vectors_are_at_cosine_zero_without_gradient() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    value = absolute_and_cosine(student, torch.zeros(2, 3))
    value.sum().backward()
    assert value.tolist() == pytest.approx([0.6931] * 2, abs=1e-4)
    assert student.grad is not None
    assert (student.grad == 0).all()


def relation(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """The definition, head by head and token by token, of one example."""
    total = 0.0
    for mine, theirs in zip(student.chunk(heads, 1), teacher.chunk(heads, 1), strict=True):
        q = torch.softmax(mine @ mine.T / mine.shape[1] ** 0.5, 1)
        p = torch.softmax(theirs @ theirs.T / theirs.shape[1] ** 0.5, 1)
        total = total + (p * (p / q).log()).sum(1).mean()
    return total / heads


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_relations_are_their_definition_over_widths_and_heads(heads: int) -> None:
    student, teacher = tokens(3, 5, 6), tokens(3, 5, 12, seed=1)
    wanted = torch.stack([relation(s, t, heads) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(attention_relation(student, teacher, None, heads=heads), wanted)


def test_queries_keys_and_values_add_up() -> None:
    mine = tuple(tokens(2, 5, 6, seed=k) for k in range(3))
    theirs = tuple(tokens(2, 5, 12, seed=9 + k) for k in range(3))
    wanted = sum(attention_relation(a, b, None, heads=3) for a, b in zip(mine, theirs, strict=True))
    torch.testing.assert_close(attention_relation(mine, theirs, None, heads=3), wanted)
    with pytest.raises(ValueError, match="same number of tensors, at least one, got 3 and 2"):
        attention_relation(mine, theirs[:2], None, heads=3)


def test_tokens_that_do_not_count_are_as_if_cut_off() -> None:
    student, teacher = tokens(2, 5, 6), tokens(2, 5, 6, seed=1)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    value = attention_relation(student, teacher, mask, heads=2)
    cut = attention_relation(student[:1, :3], teacher[:1, :3], None, heads=2)
    whole = attention_relation(student[1:], teacher[1:], None, heads=2)
    torch.testing.assert_close(value, torch.cat([cut, whole]))
    student[0, 3:] = 1e4
    assert torch.equal(attention_relation(student, teacher, mask, heads=2), value)


def test_an_example_without_tokens_is_zero_with_no_gradient() -> None:
    student = tokens(2, 4, 6).requires_grad_()
    mask = torch.tensor([[False] * 4, [True] * 4])
    value = attention_relation(student, tokens(2, 4, 6, seed=1), mask, heads=2)
    value.sum().backward()
    assert value[0].item() == 0
    assert student.grad is not None
    assert (student.grad[0] == 0).all()
    assert student.grad[1].abs().sum() > 0


def test_relations_do_not_change_when_heads_are_rotated() -> None:
    student, teacher = tokens(2, 5, 6), tokens(2, 5, 12, seed=1)
    turns = [torch.linalg.qr(tokens(3, 3, seed=k)).Q for k in (2, 3)]
    turned = student @ torch.block_diag(*turns)
    torch.testing.assert_close(
        attention_relation(turned, teacher, None, heads=2),
        attention_relation(student, teacher, None, heads=2),
    )


def test_what_cannot_be_cut_or_compared_is_refused() -> None:
    one = tokens(2, 5, 6)
    with pytest.raises(ValueError, match="6 and 8 values cannot be cut into 4 heads"):
        attention_relation(one, tokens(2, 5, 8), None, heads=4)
    with pytest.raises(ValueError, match="same number of tokens"):
        attention_relation(one, tokens(2, 4, 6), None, heads=2)
    with pytest.raises(ValueError, match=r"mask must be \[N, T\] .* got \(2, 4\)"):
        attention_relation(one, one, torch.ones(2, 4).bool(), heads=2)


def test_scores_of_masked_positions_are_taken_as_zero_on_each_side() -> None:
    student, teacher = tokens(2, 3, 4, 4), tokens(2, 3, 4, 4, seed=1)
    masked = torch.arange(4) > 1
    low = [side.masked_fill(masked, value) for side, value in ((student, -1e4), (teacher, -100.0))]
    zero = [side.masked_fill(masked, 0.0) for side in (student, teacher)]
    wanted = F.mse_loss(*zero, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(attention_scores(*low), wanted)
    excluded = student.masked_fill(masked, -torch.inf)
    torch.testing.assert_close(attention_scores(excluded, low[1]), wanted)


def test_soft_labels_of_the_prediction_layer_are_the_golden_value(oracle: Any) -> None:
    """The published code averages over the classes too, which makes it C times smaller."""
    case = oracle("tinybert_soft_ce")
    student, teacher = case.inputs["z_s"], case.inputs["z_t"]
    value = cross_entropy(student, teacher.softmax(1)).mean() / student.shape[1]
    case.assert_value(value)
    case.assert_gradient(value)
