"""Losses on scores of candidates [N, K]: what is asked for, and in which order."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from attar.losses._rows import absent, check_logits, check_positive, wide
from attar.losses.types import Positive

Size = Annotated[int, Ge(1)]


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of margins (MarginMSE): mean_k ((s_0 - s_k) - (t_0 - t_k))², k > 0.

    Candidate 0 is the relevant one, and the others are compared with it.

    Shapes: student and teacher [N, K] scores of K >= 2 candidates, the relevant one first. Returns
    [N], in squared units. A candidate that is -inf on both sides is as if cut off.

    Paper: Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture
    Knowledge Distillation", 2020, K = 2, weight 1. It needs scores of the teacher's scale, such as
    dot products: cosines cannot reach a margin above 2.

    Neighbours: unchanged by adding a constant to a row. `centered_mse` compares all pairs of
    candidates; `kl_divergence` (T = 1 or 2) compares them as a distribution.

    >>> import torch
    >>> margin_mse(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([10.])
    """
    check_logits(student, teacher)
    gone = absent(student, teacher)
    gap = (wide(student) - wide(teacher.detach())).masked_fill(gone, 0.0)
    squared = (gap[:, :1] - gap[:, 1:]).square().masked_fill(gone[:, 1:] | gone[:, :1], 0.0)
    return squared.sum(1) / (~gone[:, 1:]).sum(1).clamp(min=1)


def relaxed_ranking(student: Tensor, teacher: Tensor, *, interesting: Size = 40) -> Tensor:
    """Relaxed ranking distillation (RRD): -Σ_k log(e^(s_k) / Σ_j e^(s_j)), j from k to the end.

    Candidates are sorted by the teacher. Each of its first K = `interesting` is to be picked out of
    those from it on; the order of the rest does not count. It is the list-wise likelihood of
    Plackett and Luce (ListMLE where K is the number of candidates, or more).

    Shapes: student and teacher [N, M] scores of M >= 2 candidates, such as the K best of the
    teacher and L drawn from the rest. Returns [N], in nats. It is not zero at equality. Of equal
    scores of the teacher the first comes first. A candidate that the teacher excludes (-inf) is
    not interesting; one that both exclude is as if cut off.

    Paper: Kang et al., "DE-RRD: A Knowledge Distillation Framework for Recommender System", CIKM
    2020: K = L = 40, weight 1e-3 next to a sum over users. The official code sums over users:
    weight_ours = weight_theirs · N. It has no maximum taken off before exp; here it is in log
    space.

    Neighbours: `ranking_distillation` asks for the best ones without their order.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> relaxed_ranking(student, teacher, interesting=1)
    tensor([2.4076])
    """
    check_logits(student, teacher)
    if not interesting >= 1:
        raise ValueError(f"interesting must be a whole number of at least 1, got {interesting}.")
    order = teacher.detach().argsort(dim=1, descending=True, stable=True)
    sorted_ = wide(student).gather(1, order)
    known = teacher.detach().gather(1, order)[:, :interesting] > -math.inf
    # A row that excludes everything has no likelihood; the lowest number stands for -inf.
    finite = sorted_.clamp(min=torch.finfo(sorted_.dtype).min / 4)
    remaining = finite.flip(1).logcumsumexp(1).flip(1)
    cost = (remaining - finite)[:, :interesting].masked_fill(~known, 0.0)
    excluded = (sorted_[:, :interesting] == -math.inf) & known
    return cost.masked_fill(excluded, 0.0).sum(1).masked_fill(excluded.any(1), math.inf)


def ranking_distillation(
    student: Tensor, teacher: Tensor, *, top: Size = 10, decay: Positive = 10.0
) -> Tensor:
    """Ranking distillation (RD): -Σ_k w_k log sigmoid(s_k) over the teacher's first K candidates.

    The teacher's best candidates are positives, more so the higher they stand: w_k is
    e^(-k / decay), k from 1, over its sum.

    Shapes: student and teacher [N, M] scores of M >= 2 candidates; the student's are logits of a
    sigmoid. Returns [N], in nats. It is not zero at equality, and needs a loss on labels beside it
    with negatives. A candidate that the teacher excludes (-inf) counts 0.

    Paper: Tang & Wang, "Ranking Distillation: Learning Compact Ranking Models With High Performance
    for Recommender System", KDD 2018: K = 10, weight 0.5. Its second factor, tanh(μ (rank gap)),
    estimates the student's rank by sampling and is not part of it.

    Neighbours: `relaxed_ranking` also keeps the order, and pushes the rest down.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> ranking_distillation(student, teacher, top=1)
    tensor([0.6931])
    """
    check_logits(student, teacher)
    check_positive("decay", decay)
    if not top >= 1:
        raise ValueError(f"top must be a whole number of at least 1, got {top}.")
    count = min(top, student.shape[1])
    best = wide(teacher.detach()).topk(count, dim=1)
    known = best.values > -math.inf
    places = torch.arange(1, count + 1, device=student.device, dtype=best.values.dtype)
    weight = (-places / decay).exp() * known
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    chosen = wide(student).gather(1, best.indices).masked_fill(~known, 0.0)
    return (weight * F.softplus(-chosen)).sum(1)
