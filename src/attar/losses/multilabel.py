"""Losses where several labels can hold at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import check_same_examples
from attar.losses._rows import check_logits, check_not_negative, wide
from attar.losses._softmax import floored
from attar.losses.types import NotNegative


def partial_softmax_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Partial softmax (PSM) of multi-label answers: Σ_{k: y_k = 1} KL(p^k ‖ q^k).

    q^k is the softmax of the student over class k and all classes that do not hold, and p^k that of
    the teacher: each label that holds competes with those that do not, and with no other that does.

    Shapes: student and teacher [N, C] logits, labels [N, C] of 0 and 1 (above 1/2 it holds).
    Returns [N], in nats, a sum over the labels that hold; 0 where none does, or all do. A class
    that is -inf on both sides is as if cut off; one that only the student excludes costs very much.

    Paper: Yang et al., "Multi-Label Knowledge Distillation" (L2D), ICCV 2023, where it is compared
    with `binary_kl`. No weight is established; start at 1.

    Neighbours: `binary_kl` asks each label by itself; `kl_divergence` is this where one label
    holds.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> partial_softmax_kl(student, teacher, torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([0.9242])
    """
    check_logits(student, teacher)
    _check_labels(labels, student)
    holds = labels > 0.5
    odds_q, rest_q = _against_rest(wide(student), holds)
    odds_p, rest_p = _against_rest(wide(teacher.detach()), holds)
    # KL of (k or not) and, as far as the teacher says not, KL among those that do not hold.
    yes, no = odds_p.sigmoid(), (-odds_p).sigmoid()
    apart = (rest_p.exp() * (rest_p - rest_q)).sum(1, keepdim=True)
    own = F.logsigmoid(odds_p) - F.logsigmoid(odds_q)
    other = F.logsigmoid(-odds_p) - F.logsigmoid(-odds_q)
    gone = (student == -math.inf) & (teacher == -math.inf)
    counts = holds & ~gone & ~(holds | gone).all(1, keepdim=True)
    return (yes * own + no * (other + apart)).masked_fill(~counts, 0.0).sum(1)


def _against_rest(logits: Tensor, holds: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds of each class against all that do not hold, and their log-probabilities."""
    logits = floored(logits + 0.0)
    lowest = torch.finfo(logits.dtype).min / 4
    rest = logits.masked_fill(holds, lowest)
    among = F.log_softmax(rest, dim=1).masked_fill(holds, 0.0)
    return (logits - rest.logsumexp(1, keepdim=True)).clamp(min=-1e6, max=1e6), among


def _check_labels(labels: Tensor, signal: Tensor) -> None:
    if labels.shape != signal.shape[:2]:
        raise ValueError(
            f"labels must be [N, C] of 0 and 1 of the same rows and classes, "
            f"got {labels.dtype} {tuple(labels.shape)} and {tuple(signal.shape)}."
        )


def label_embeddings(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    classes: NotNegative = 100.0,
    instances: NotNegative = 1000.0,
) -> Tensor:
    """Label-wise embeddings (LED): distances of the vectors of labels that hold.

    `classes` · Σ_c D_c + `instances` · Σ_n D_n. D_c compares the distances between the examples in
    which label c holds, by their vectors of c; D_n those between the labels that hold in example n.
    D is Σ_ij huber(d_ij(s) / μ(s) - d_ij(t) / μ(t)) over the number of vectors, as in
    `relation_distance`, which averages instead.

    Shapes: student [N, C, L] and teacher [N, C, L'] embeddings of each label, labels [N, C] of 0
    and 1 (above 1/2 it holds). Returns a scalar. It compares the examples of the batch with one
    another, so the value depends on the batch, and it grows with N and C, as nothing is averaged.
    Vectors that coincide to rounding are at distance 0, without gradient.

    Paper: Yang et al., "Multi-Label Knowledge Distillation" (L2D), ICCV 2023: weights 100 and 1000,
    carried inside, beside 10 of `binary_kl`. The official code takes vectors of zeros for labels
    that do not hold; here the labels say it.

    Neighbours: `relation_distance` compares whole examples.

    >>> import torch
    >>> student = torch.tensor([[[0.0], [1.0], [2.0]]])
    >>> teacher = torch.tensor([[[0.0], [1.0], [3.0]]])
    >>> label_embeddings(student, teacher, torch.ones(1, 3), instances=1.0)
    tensor(0.0417)
    """
    check_not_negative("classes", classes)
    check_not_negative("instances", instances)
    if student.ndim != 3 or teacher.ndim != 3 or 0 in (*student.shape[1:], *teacher.shape[1:]):
        raise ValueError(
            f"student and teacher must be features [N, C, L] with values in them, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    check_same_examples(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of labels, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    _check_labels(labels, student)
    mine, theirs, holds = wide(student), wide(teacher.detach()), labels > 0.5
    by_class = _gap(mine.transpose(0, 1), theirs.transpose(0, 1), holds.T)
    return classes * by_class + instances * _gap(mine, theirs, holds)


def _gap(student: Tensor, teacher: Tensor, holds: Tensor) -> Tensor:
    """The sum over groups [G, M, L] of the gap between relative distances, each over its size."""
    mine, theirs = (_relative(side, holds) for side in (student, teacher))
    common = torch.promote_types(mine.dtype, theirs.dtype)
    gaps = F.smooth_l1_loss(mine.to(common), theirs.to(common), reduction="none").sum((1, 2))
    return (gaps / holds.sum(1).clamp(min=1)).sum()


def _relative(points: Tensor, holds: Tensor) -> Tensor:
    """Distances [G, M, M] of those that hold over their group's mean of those above zero."""
    norms = points.square().sum(2)
    sums = norms.unsqueeze(2) + norms.unsqueeze(1)
    squared = sums - 2 * points @ points.transpose(1, 2)
    apart = (squared > 16 * torch.finfo(points.dtype).eps * sums) & (
        holds.unsqueeze(2) & holds.unsqueeze(1)
    )
    distances = squared.masked_fill(~apart, 1.0).sqrt().masked_fill(~apart, 0.0)
    mean = distances.sum((1, 2)) / apart.sum((1, 2)).clamp(min=1)
    return distances / mean.masked_fill(mean == 0, 1.0)[:, None, None]
