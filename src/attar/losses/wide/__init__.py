"""Losses on wide logits: a last layer of many columns, whose logits [N, V] are never made.

A `Projected` stands for them. The rows are taken in chunks: a chunk's logits are made, compared,
and their gradient written over them and brought to the hidden states and the layer, all in the
forward pass. So beside the gradients themselves there are two buffers of a chunk, however many rows
there are; and the time is that of the products that no loss can do without, and little more.

Arithmetic is in float32, or float64 if the inputs are, whatever precision these have; gradients are
summed in it and given in the type of the input. On a CPU, where products of halves are slow, these
are made in float32 too.

The gradients are made for a total in which every row has the same factor, as a sum or a mean of it
has. With another factor for each row the pass is made once more, in the backward pass: give factors
as the weights of items, and leave out rows that do not count, `student[mask]`, before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attar.losses import divergence, response
from attar.losses.projected import Projected
from attar.losses.types import Fraction, Positive, Share
from attar.losses.wide._items import Item, Teacher, check
from attar.losses.wide._pass import Combined, Job

__all__ = [
    "Item",
    "apply",
    "combined",
    "cross_entropy",
    "jensen_shannon",
    "kl_divergence",
    "reverse_kl",
    "skewed_kl",
    "total_variation",
]

CHUNK_BYTES = 256 << 20


def combined(
    student: Projected, items: Sequence[Item], *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, list[Tensor]]:
    """Losses on the same wide logits, in one pass over them: (their weighted sum, their values).

    total [N] = Σ_k weight_k · value_k, to be differentiated; each value [N] is detached. Kernels
    know `kl_divergence`, `reverse_kl`, `skewed_kl`, `jensen_shannon`, `total_variation` and
    `cross_entropy`, by what the function is: those of one teacher and temperature share their
    probabilities. Any other loss that gives a value a row is called on a few rows at a time.

    Args:
        student: the logits [N, V], rows that count only.
        items: the losses, each with what it compares with.
        chunk_bytes: what the buffers of a chunk's logits may take, those of the student and of each
            teacher that is a `Projected`; at least 64 rows are taken.

    Raises ValueError for a loss of whole signals (one that takes a mask, gives no value a row or
    has weights of its own), for shapes that do not fit, and for what the losses themselves refuse.

    >>> import torch
    >>> from attar import losses
    >>> student = losses.Projected(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0], [0, 1]]))
    >>> teacher = torch.tensor([[0.0, 1.0]])
    >>> soft = Item(losses.kl_divergence, 0.9, teacher)
    >>> hard = Item(losses.cross_entropy, 0.1, supplied={"labels": torch.tensor([1])})
    >>> combined(student, [soft, hard])
    (tensor([1.2174]), [tensor([1.1163]), tensor([2.1269])])
    """
    check(student, items)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}.")
    job = Job(items, chunk_bytes, torch.is_grad_enabled())
    head = student.detach()
    total, *values = Combined.apply(student.hidden, student.weight, student.bias, head, job)
    return total, values


def apply(
    loss: Callable[..., Tensor],
    student: Projected,
    teacher: Teacher | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    **supplied: Any,
) -> Tensor:
    """Any loss that gives a value a row, on wide logits [N, V]; returns [N].

    Options go in by `functools.partial`; labels and what else has rows by name. Raises as
    `combined` does.

    >>> import torch
    >>> from attar import losses
    >>> student = losses.Projected(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0], [0, 1]]))
    >>> apply(losses.alpha_beta_divergence, student, torch.tensor([[0.0, 1.0]]))
    tensor([0.9194])
    """
    item = Item(loss, 1.0, teacher, supplied)
    return combined(student, [item], chunk_bytes=chunk_bytes)[0]


def kl_divergence(
    student: Projected,
    teacher: Teacher,
    *,
    temperature: Positive = 4.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attar.losses.kl_divergence` of wide logits [N, V]; returns [N]."""
    loss = partial(response.kl_divergence, temperature=temperature)
    return apply(loss, student, teacher, chunk_bytes=chunk_bytes)


def reverse_kl(
    student: Projected,
    teacher: Teacher,
    *,
    temperature: Positive = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attar.losses.reverse_kl` of wide logits [N, V]; returns [N]."""
    loss = partial(divergence.reverse_kl, temperature=temperature)
    return apply(loss, student, teacher, chunk_bytes=chunk_bytes)


def skewed_kl(
    student: Projected,
    teacher: Teacher,
    *,
    skew: Share = 0.1,
    reverse: bool = False,
    temperature: Positive = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attar.losses.skewed_kl` of wide logits [N, V]; returns [N]."""
    loss = partial(divergence.skewed_kl, skew=skew, reverse=reverse, temperature=temperature)
    return apply(loss, student, teacher, chunk_bytes=chunk_bytes)


def jensen_shannon(
    student: Projected,
    teacher: Teacher,
    *,
    beta: Share = 0.5,
    normalized: bool = False,
    temperature: Positive = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attar.losses.jensen_shannon` of wide logits [N, V]; returns [N]."""
    loss = partial(
        divergence.jensen_shannon, beta=beta, normalized=normalized, temperature=temperature
    )
    return apply(loss, student, teacher, chunk_bytes=chunk_bytes)


def total_variation(
    student: Projected, teacher: Teacher, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """`attar.losses.total_variation` of wide logits [N, V]; returns [N]."""
    return apply(divergence.total_variation, student, teacher, chunk_bytes=chunk_bytes)


def cross_entropy(
    student: Projected,
    labels: Tensor,
    *,
    label_smoothing: Fraction = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attar.losses.cross_entropy` of wide logits [N, V]; returns [N]."""
    loss = partial(response.cross_entropy, label_smoothing=label_smoothing)
    return apply(loss, student, chunk_bytes=chunk_bytes, labels=labels)
