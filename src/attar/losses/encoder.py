"""Losses on the insides of transformers: attention, its parts, and hidden states."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from attar.losses._maps import check_same_examples, mean_square
from attar.losses._rows import check_not_negative, check_same_shape, wide
from attar.losses.types import NotNegative, Tensors

# Scores below it are those of masked positions, as in the official code.
MASKED_SCORE = -100.0

Size = Annotated[int, Ge(1)]


def attention_relation(
    student: Tensors, teacher: Tensors, mask: Tensor | None, *, heads: Size = 12
) -> Tensor:
    """Self-attention relations (MiniLM v2): mean of KL(p ‖ q), q = softmax_j(x_i · x_j / √d).

    x are the queries, or the keys, or the values of one layer, cut anew into `heads` relation heads
    of d = D / heads values, so that the two sides may differ in heads and in D. The mean is over
    heads and counted positions i; several tensors, such as (queries, keys, values), add up.

    Shapes: student and teacher are one tensor [N, T, D], or equally long tuples of them, of equal N
    and T; D may differ and is a multiple of `heads` on each side. `mask` [N, T] is True at counted
    tokens, or None: others are neither asked nor looked at. Returns [N], in nats; an example
    without tokens gives 0. Takes 2 · N · heads · T² values of memory a tensor.

    Paper: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers", 2021: queries, keys and values, weight 1 each; 48 relation heads with
    a base and 64 with a large teacher; of teachers with 24 layers the 21st (BERT) or 19th
    (RoBERTa), of those with 12 the last. The default 12 suits small models.

    Neighbours: unchanged by rotations of each head. `attention_scores` compares the model's own
    attention; `pixel_relation` takes cosines, across images.

    >>> import torch
    >>> student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> attention_relation(student, torch.tensor([[[1.0], [1.0]]]), None, heads=1)
    tensor([0.0612])
    """
    if not heads >= 1:
        raise ValueError(f"heads must be a whole number of at least 1, got {heads}.")
    mine, theirs = (side if isinstance(side, tuple) else (side,) for side in (student, teacher))
    if len(mine) != len(theirs) or not mine:
        raise ValueError(
            f"student and teacher must have the same number of tensors, at least one, "
            f"got {len(mine)} and {len(theirs)}."
        )
    parts = [_relation(a, b, mask, heads) for a, b in zip(mine, theirs, strict=True)]
    return torch.stack(parts).sum(0)


def _relation(student: Tensor, teacher: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    _check_tokens(student, teacher, mask, heads)
    log_q = _log_relations(wide(student), mask, heads)
    log_p = _log_relations(wide(teacher.detach()), mask, heads)
    cost = ((log_p - log_q) * log_p.exp()).sum((1, 3))
    if mask is None:
        return cost.sum(1) / (heads * cost.shape[1])
    return (cost * mask).sum(1) / (heads * mask.sum(1).clamp(min=1))


def _check_tokens(student: Tensor, teacher: Tensor, mask: Tensor | None, heads: int) -> None:
    if student.ndim != 3 or teacher.ndim != 3 or 0 in (*student.shape[1:], *teacher.shape[1:]):
        raise ValueError(
            f"student and teacher must be features [N, T, D] with values in them, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    check_same_examples(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of tokens, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if student.shape[2] % heads or teacher.shape[2] % heads:
        raise ValueError(
            f"features of {student.shape[2]} and {teacher.shape[2]} values cannot be cut into "
            f"{heads} heads: heads must divide both."
        )
    if mask is not None and mask.shape != student.shape[:2]:
        raise ValueError(
            f"mask must be [N, T] of the same tokens, "
            f"got {tuple(mask.shape)} and {tuple(student.shape)}."
        )


def _log_relations(values: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Log-probabilities [N, heads, T, T]; what is not looked at has a low one, not -inf."""
    split = values.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = (split / math.sqrt(split.shape[3])) @ split.transpose(2, 3)
    if mask is not None:
        low = torch.finfo(scores.dtype).min / 4
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], low)
    return F.log_softmax(scores, dim=-1)


def attention_scores(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of attention scores before the softmax (TinyBERT).

    Scores of at most -100, those of masked positions, are taken as 0 on each side.

    Shapes: student and teacher [N, heads, T, T], or [N, ...], of equal shape. Returns [N], in
    squared units, the mean over all values, masked ones too.

    Paper: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020: sum
    over the layers of the student, weight 1, with `mse` of hidden states through one shared
    projector and of embeddings.

    Neighbours: `attention_relation` needs neither equal heads nor the scores themselves, which
    fused attention does not give.

    >>> import torch
    >>> attention_scores(torch.tensor([[2.0, -1e4, 1.0]]), torch.tensor([[0.0, -1e4, 1.0]]))
    tensor([1.3333])
    """
    check_same_shape(student, teacher)
    if student.ndim < 2 or 0 in student.shape[1:]:
        raise ValueError(
            f"features must be [N, ...] with values in them, got {tuple(student.shape)}."
        )
    mine, theirs = (
        side.masked_fill(side <= MASKED_SCORE, 0.0)
        for side in (wide(student), wide(teacher.detach()))
    )
    return mean_square(mine - theirs)


def absolute_and_cosine(student: Tensor, teacher: Tensor, *, cosine: NotNegative = 1.0) -> Tensor:
    """Absolute and cosine error of hidden states (DistilHuBERT): |s - t| - λ log σ(cos(s, t)).

    The absolute difference is averaged over all values, the other part over the vectors.

    Shapes: student and teacher of equal shape, vectors along the last dimension: [N, D], tokens
    [N, L, D], or tokens of several layers [N, K, L, D]. Returns [N]. It is not zero at equality:
    -log σ(1) = 0.3133 is its least. A zero vector has cosine 0, without gradient from that part.
    `cosine` is λ.

    Paper: Chang et al., "DistilHuBERT: Speech Representation Learning by Layer-wise Distillation of
    Hidden-unit BERT", ICASSP 2022: λ = 1, weight 1, layers 4, 8 and 12 (the official configuration
    has 4 and 12), each through a trained head of its own.

    Neighbours: `cosine_distance` compares directions alone, `mse` squares the differences.

    >>> import torch
    >>> absolute_and_cosine(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1.9315])
    """
    check_not_negative("cosine", cosine)
    check_same_shape(student, teacher)
    if student.ndim < 2 or 0 in student.shape[1:]:
        raise ValueError(
            f"features must be vectors [N, ..., D] with values in them, got {tuple(student.shape)}."
        )
    student, teacher = wide(student), wide(teacher.detach())
    norms = [torch.linalg.vector_norm(side, dim=-1) for side in (student, teacher)]
    scale = norms[0] * norms[1]
    similar = (student * teacher).sum(-1) / scale.masked_fill(scale == 0, math.inf)
    rows = (student - teacher).abs().flatten(1)
    apart = F.softplus(-similar.unsqueeze(1)).flatten(1)
    return rows.sum(1) / rows.shape[1] + cosine * apart.sum(1) / apart.shape[1]
