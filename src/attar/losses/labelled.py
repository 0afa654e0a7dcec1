"""Losses on what a model answers that treat the labelled class apart: logits and labels in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import (
    check_labels,
    check_logits,
    check_not_negative,
    check_positive,
    wide,
)
from attar.losses._softmax import (
    decoupled,
    divergence,
    label_column,
    log_probabilities,
    tempered,
    without,
)
from attar.losses.response import cross_entropy
from attar.losses.types import NotNegative, Positive

# The constant of the official implementation; the published numbers were made with it.
WEIGHT_EPS = 1e-7


def decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: NotNegative = 1.0,
    beta: NotNegative = 8.0,
    temperature: Positive = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (DKD): T² (α TCKD + β NCKD).

    With y the labelled class, p = softmax(teacher / T) and q = softmax(student / T):
    TCKD = KL([p_y, 1 - p_y] ‖ [q_y, 1 - q_y]) is what the teacher says about how hard the example
    is, NCKD = KL(p̂ ‖ q̂), with p̂ and q̂ the softmax over the other classes, what it says about
    them. Shapes: student and teacher [N, C] logits, C >= 3; labels int64 [N], or float [N, C]
    (after mixup), of which the arg max is the labelled class. Returns [N], in nats times T².

    Paper: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. Official weights carry over:
    α = 1 and cross-entropy 1; β = 8 (ResNet pairs), 6 (VGG, WRN) or 2 (ResNet-56) with T = 4 on
    CIFAR-100; β = 0.5 to 2 with T = 1 on ImageNet. A large β needs a warm-up of the term's weight
    (20 epochs on CIFAR-100). The official code takes log(softmax) and turns infinite in float32
    when a logit gap nears 100; here all is in log space. Absent classes as in `kl_divergence`; at
    least two classes besides the labelled one must be present.

    Neighbours: α = 1 and β = 1 - p_y (a number a row) is `kl_divergence`. With two classes NCKD is
    always zero, so C = 2 is refused: use `kl_divergence`.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> decoupled_kl(student, teacher, torch.tensor([0]))
    tensor([4.9280])
    """
    check_logits(student, teacher)
    check_labels(labels, student)
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    if student.shape[1] == 2:
        raise ValueError(
            "decoupled_kl needs at least three classes, got 2: "
            "its non-target part is zero for two, use kl_divergence."
        )
    column = label_column(labels, student)
    binary_q, others_q = decoupled(tempered(student, temperature), column)
    binary_p, others_p = decoupled(tempered(teacher.detach(), temperature), column)
    target, other = divergence(binary_q, binary_p), divergence(others_q, others_p)
    return (alpha * target + beta * other) * temperature**2


def normalized_kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    gamma: NotNegative = 1.5,
    temperature: Positive = 1.0,
) -> Tensor:
    """Normalised knowledge distillation (NKD): the label as sure as the teacher is, the rest by KL.

    -p_y log q_y + γ T² KL(p̂ ‖ q̂), with y the labelled class, p and q the softmax of teacher and
    student at temperature 1, p̂ and q̂ the softmax at T over the other classes, which so sum to one
    on both sides.

    Shapes: student and teacher [N, C] logits; labels int64 [N], or float [N, C] (after mixup), of
    which the arg max is the labelled class. Returns [N], in nats. It is not zero where the student
    is the teacher: the first part is a cross-entropy, weighted by the teacher. Excluded classes
    (-inf) as in `kl_divergence`. With two classes there is only the first part.

    Paper: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels", ICCV 2023: γ = 1.5, T = 1, with
    cross-entropy 1; the weights carry over. The official second part is a cross-entropy: larger by
    γ T² times the entropy of p̂, with the same gradient. As there, the first part has no
    temperature.

    Neighbours: the second part is that of `decoupled_kl`; where DKD compares how sure both are of
    the label, this asks for it.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> normalized_kl(student, teacher, torch.tensor([0]))
    tensor([0.7299])
    """
    check_logits(student, teacher)
    check_labels(labels, student)
    check_not_negative("gamma", gamma)
    check_positive("temperature", temperature)
    column, both = label_column(labels, student), (wide(student), wide(teacher.detach()))
    cost_q, cost_p = (cross_entropy(z, column.squeeze(-1)) for z in both)
    sure = torch.exp(-cost_p)
    target = sure * cost_q.masked_fill(sure == 0, 0.0)
    others_q, others_p = (
        F.log_softmax(without(tempered(z, temperature), column), dim=-1) for z in both
    )
    return target + divergence(others_q, others_p, gamma * temperature**2)


def target_enhanced_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, *, power: Positive = 1.5
) -> Tensor:
    """Target-enhanced distillation (OFA-KD): the teacher's answer, with the label brought forward.

    Σ_c w_c (log ŵ_c - log q_c) = W KL(ŵ ‖ q), where q = softmax(student), p = softmax(teacher), W
    is the sum of w, ŵ = w / W, and w_c = (p_c + [c = y])^ε - [c = y], with y the labelled class and
    ε the `power`: with ε > 1 the label gains, and the other classes lose the more the smaller they
    are. For teachers of another architecture, whose dark knowledge the student cannot use.

    Shapes: student and teacher [N, C] logits; labels int64 [N], or float [N, C] (after mixup), of
    which the arg max is the labelled class. Returns [N], in nats; zero where q = ŵ, which for ε ≠ 1
    is not the teacher. Excluded classes (-inf) as in `kl_divergence`.

    Paper: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
    Distillation", NeurIPS 2023: ε = 1 to 1.5, T = 1; weight 1 at each of four exits, next to
    cross-entropy 1; the weights carry over. The official value is -Σ w_c log q_c: larger by a
    constant of the teacher, with the same gradient.

    Neighbours: ε = 1 is `kl_divergence` at temperature 1.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> target_enhanced_kl(student, teacher, torch.tensor([1]))
    tensor([2.4165])
    """
    check_logits(student, teacher)
    check_labels(labels, student)
    check_positive("power", power)
    column = label_column(labels, student)
    log_q, log_p = log_probabilities(student, teacher, 1.0)
    label = (log_p.gather(-1, column).exp().log1p() * power).expm1().log()
    log_w = log_p.mul_(power).scatter_(-1, column, label)
    log_total = log_w.logsumexp(-1, keepdim=True)
    return divergence(log_q, log_w - log_total) * log_total.squeeze(-1).exp()


def weighted_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: Positive = 2.0
) -> Tensor:
    """Weighted soft labels (WSLD): `kl_divergence`, more where the student is behind its teacher.

    w T² KL(p ‖ q), with p = softmax(teacher / T), q = softmax(student / T) and w = 1 - exp(-CE_s /
    CE_t), where CE is the cross-entropy with the label at temperature 1. w is held: no gradient
    flows through it. An example that the student already answers better than its teacher counts
    for little.

    Shapes: student and teacher [N, C] logits; labels int64 [N], or float [N, C] (after mixup), of
    which the arg max is the labelled class. Returns [N], in nats times T². Excluded classes (-inf)
    as in `kl_divergence`; where the teacher is certain of the label w is 1.

    Paper: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
    Perspective", ICLR 2021: T = 2, weight 2.5 with cross-entropy 1; the weights carry over. The
    official divergence is a cross-entropy: larger by w T² times the teacher's entropy, with the
    same gradient; its class count is fixed at 1000.

    Neighbours: w is 0.63 where both are equally good, and 1 gives `kl_divergence`.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> weighted_kl(student, teacher, torch.tensor([0]))
    tensor([0.1994])
    """
    check_logits(student, teacher)
    check_labels(labels, student)
    check_positive("temperature", temperature)
    number = label_column(labels, student).squeeze(-1)
    cost_q, cost_p = (cross_entropy(z.detach(), number) for z in (student, teacher))
    largest = torch.finfo(cost_p.dtype).max
    weight = -torch.expm1(-cost_q / (cost_p + WEIGHT_EPS).clamp(max=largest))
    log_q, log_p = log_probabilities(student, teacher, temperature)
    return weight * divergence(log_q, log_p, temperature**2)
