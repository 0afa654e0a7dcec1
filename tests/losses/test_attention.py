"""Losses on maps of one example: published values, definitions, invariances, degenerate maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses import (
    attention_transfer,
    channel_similarity,
    class_attention,
    factor_transfer,
    gram,
    neuron_selectivity,
)

Loss = Callable[..., Tensor]
OF_POSITIONS = [attention_transfer, factor_transfer, neuron_selectivity]
OF_CHANNELS = [channel_similarity, gram]
EVERY = [*OF_POSITIONS, *OF_CHANNELS, class_attention]


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "name", "inputs"),
    [
        (attention_transfer, "at_p2", "f"),
        (factor_transfer, "ft", "f"),
        (neuron_selectivity, "nst", "f"),
        (class_attention, "catkd", "cam"),
    ],
)
def test_mean_over_examples_is_the_golden_value(
    loss: Loss, name: str, inputs: str, oracle: Any
) -> None:
    case = oracle(name)
    value = loss(case.inputs[f"{inputs}_s"], case.inputs[f"{inputs}_t"]).mean()
    case.assert_value(value)
    case.assert_gradient(value, f"{inputs}_s")


def test_gram_of_two_layers_side_by_side_holds_the_golden_flow_between_them(oracle: Any) -> None:
    """The published matrix, between two layers, is the off-diagonal block of ours of both."""
    case = oracle("fsp")

    def block(first: str, second: str) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(case.inputs[first], 3), case.inputs[second]], 1)

    both = gram(block("s1", "s2"), block("t1", "t2"))
    one, two = (
        gram(block("s1", "s2")[:, part], block("t1", "t2")[:, part])
        for part in (slice(3), slice(3, None))
    )
    value = ((49 * both - 9 * one - 16 * two) / (2 * 3 * 4)).mean()
    case.assert_value(value)
    case.assert_gradient(value, "s1")
    case.assert_gradient(value, "s2")


@pytest.mark.parametrize(
    ("channels", "size"), [((6, 9), 5), ((6, 6), 3), ((2, 3), 8), ((40, 50), 2)]
)
def test_neuron_selectivity_is_its_definition_in_either_form(
    channels: tuple[int, int], size: int
) -> None:
    student, teacher = (maps(3, c, size, size, seed=i) for i, c in enumerate(channels))
    s, t = (x.flatten(2).numpy() for x in (student, teacher))
    s, t = (x / np.sqrt((x**2).sum(2, keepdims=True)) for x in (s, t))
    kernels = [np.einsum("ncp,ndp->ncd", a, b) ** 2 for a, b in ((s, s), (t, t), (s, t))]
    wanted = sum(sign * k.mean((1, 2)) for sign, k in zip((1, 1, -2), kernels, strict=True))
    np.testing.assert_allclose(neuron_selectivity(student, teacher).numpy(), wanted, rtol=1e-9)


def test_channel_similarity_is_its_definition() -> None:
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 2, 3, seed=1)
    rows = []
    for x in (student, teacher):
        g = np.einsum("ncp,ndp->ncd", x.flatten(2).numpy(), x.flatten(2).numpy())
        rows.append(g / np.linalg.norm(g, axis=2, keepdims=True))
    wanted = ((rows[0] - rows[1]) ** 2).sum((1, 2)) / 5
    np.testing.assert_allclose(channel_similarity(student, teacher).numpy(), wanted, rtol=1e-9)


def test_gram_is_its_definition() -> None:
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 2, 3, seed=1)
    s, t = (
        np.einsum("ncp,ndp->ncd", x.flatten(2).numpy(), x.flatten(2).numpy()) / x[0, 0].numel()
        for x in (student, teacher)
    )
    wanted = ((s - t) ** 2).mean((1, 2))
    np.testing.assert_allclose(gram(student, teacher).numpy(), wanted, rtol=1e-9)


# Layouts and sizes.


@pytest.mark.parametrize("loss", [*OF_POSITIONS, *OF_CHANNELS])
def test_tokens_are_positions_of_channels(loss: Loss) -> None:
    student, teacher = maps(3, 5, 2, 4), maps(3, 5, 2, 4, seed=1)
    as_tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    torch.testing.assert_close(loss(*as_tokens), loss(student, teacher))


@pytest.mark.parametrize("loss", OF_POSITIONS)
def test_the_larger_map_is_pooled_to_the_smaller_on_either_side(loss: Loss) -> None:
    large, small = maps(3, 5, 6, 4), maps(3, 7, 3, 2, seed=1)
    pooled = F.adaptive_avg_pool2d(large, (3, 2))
    torch.testing.assert_close(loss(large, small), loss(pooled, small))
    torch.testing.assert_close(loss(small, large), loss(small, pooled))


@pytest.mark.parametrize("loss", OF_POSITIONS)
def test_sizes_that_pooling_cannot_match_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"both height and width, got \(2, 3, 4, 2\)"):
        loss(maps(2, 3, 4, 2), maps(2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"same number of tokens, got \(2, 3, 4\)"):
        loss(maps(2, 3, 4), maps(2, 2, 4))


@pytest.mark.parametrize("loss", [*OF_CHANNELS, class_attention])
def test_other_channels_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match="same number of channels, got 3 and 4"):
        loss(maps(2, 3, 4, 4), maps(2, 4, 4, 4))


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize("shapes", [((2, 6), (2, 6)), ((2, 3, 4), (2, 3, 2, 2))])
def test_what_is_neither_maps_nor_tokens_is_refused(
    loss: Loss, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match=r"maps \[N, C, H, W\] or both tokens"):
        loss(maps(*shapes[0]), maps(*shapes[1]))


def test_class_attention_is_of_maps_only() -> None:
    with pytest.raises(ValueError, match=r"class_attention needs maps \[N, C, H, W\]"):
        class_attention(maps(2, 3, 4), maps(2, 3, 4))


# Invariances.


@pytest.mark.parametrize("loss", [attention_transfer, factor_transfer])
def test_attention_ignores_order_signs_and_common_scale_of_channels(loss: Loss) -> None:
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 4, 4, seed=1)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])[:, None, None]
    torch.testing.assert_close(
        loss(7 * student[:, [3, 1, 4, 0, 2]] * signs, 0.01 * teacher.flip(1)),
        loss(student, teacher),
    )


@pytest.mark.parametrize("loss", [neuron_selectivity, class_attention])
def test_scale_of_each_channel_is_free(loss: Loss) -> None:
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 4, 4, seed=1)
    scale = torch.tensor([1.0, 0.1, 10.0, 3.0, 2.0])[:, None, None]
    torch.testing.assert_close(loss(student * scale, teacher), loss(student, teacher))


@pytest.mark.parametrize("loss", OF_CHANNELS)
def test_channel_relations_ignore_where_positions_are(loss: Loss) -> None:
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 4, 4, seed=1)
    torch.testing.assert_close(loss(student.flip(2, 3), teacher), loss(student, teacher))


# Degenerate maps.


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("part", ["an example", "a channel"])
def test_zero_maps_give_finite_values_and_bounded_gradients(
    loss: Loss, side: str, part: str
) -> None:
    given = {"student": maps(3, 5, 4, 4).float(), "teacher": maps(3, 5, 4, 4, seed=1).float()}
    for name in given:
        if side in (name, "both"):
            given[name][0 if part == "an example" else (slice(None), 2)] = 0
    given["student"].requires_grad_()
    value = loss(**given)
    value.sum().backward()
    assert value.isfinite().all()
    gradient = given["student"].grad
    assert gradient is not None
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("loss", EVERY)
def test_constant_maps_give_finite_values_and_gradients(loss: Loss) -> None:
    student = torch.ones(2, 3, 4, 4, requires_grad=True)
    value = loss(student, torch.full((2, 3, 4, 4), 2.0))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
