"""Losses on what a model answers: logits [N, C] in, nats a row [N] out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import (
    check_labels,
    check_logits,
    check_positive,
    check_same_shape,
    check_share,
    refuse_labels,
    wide,
)
from attar.losses._softmax import (
    all_finite,
    can_be_asked,
    divergence,
    label_column,
    log_probabilities,
    tempered,
    weighed,
)
from attar.losses.sparse import TopK, comparable
from attar.losses.types import Fraction, Positive, Share

# The constant of the official implementation; the published numbers were made with it.
STANDARDIZE_EPS = 1e-7


def cross_entropy(student: Tensor, labels: Tensor, *, label_smoothing: Fraction = 0.0) -> Tensor:
    """Cross-entropy (CE) with labels: -Σ_c y_c log q_c, with q = softmax(student).

    Shapes: student [N, C] logits; labels int64 [N] class numbers, or float [N, C] class
    probabilities (after mixup or cutmix; rows sum to one). Returns [N], in nats.

    `label_smoothing` ε replaces y by (1 - ε) y + ε / C: the mass is spread over all C classes, as
    in Szegedy et al., "Rethinking the Inception Architecture", 2016, and in PyTorch. Codes that
    spread it over the other C - 1 classes (Tf-KD, and much of Keras-era code) mean
    ε_ours = ε_theirs · C / (C - 1).

    A class whose student logit is -inf has probability zero: it costs nothing where the label
    gives it nothing, and +inf where the label, or smoothing, gives it mass. A class number outside
    [0, C) is a ValueError on the CPU (-100 too: rows that do not count are left out before a loss
    sees them) and a device-side assertion on an accelerator.

    Neighbours: with labels = softmax(teacher) it is `kl_divergence` at temperature 1 plus the
    teacher's entropy: another value, the same gradient.

    >>> import torch
    >>> cross_entropy(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
    tensor([0.4076])
    """
    check_labels(labels, student)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
    student = wide(student)
    if labels.is_floating_point():
        return _soft_cross_entropy(student, wide(labels), label_smoothing)
    try:
        # torch would pass over rows labelled -100 in silence; no index is ignored here.
        return F.cross_entropy(
            student,
            labels.long(),
            reduction="none",
            ignore_index=-(2**63),
            label_smoothing=label_smoothing,
        )
    except IndexError:
        refuse_labels(labels, student)
        raise


def _soft_cross_entropy(student: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    target = labels.detach()
    if smoothing:
        target = target * (1 - smoothing) + smoothing / target.shape[1]
    log_q = F.log_softmax(student, dim=-1).masked_fill(target == 0, 0.0)  # 0 · log 0 = 0
    return -(target * log_q).sum(-1)


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Hard distillation, as of DeiT: cross-entropy with the teacher's arg max as the label.

    -log q_k with q = softmax(student) and k = argmax_c teacher_c: only the teacher's decision is
    kept. Shapes: student and teacher [N, C] logits. Returns [N], in nats; +inf where the student
    excludes (logit -inf) the teacher's choice. Of equal logits the first is the choice.

    It is not zero where the student is the teacher, as the answer is asked to be sure.

    Paper: Touvron et al., "Training data-efficient image transformers & distillation through
    attention", ICML 2021: weight ½ next to ½ of cross-entropy with the labels; there it trains a
    second head (the distillation token), whose address is the term's student signal. The teacher
    sees the same augmented image.

    Neighbours: `cross_entropy` with labels = teacher.argmax(1); what `kl_divergence` becomes for a
    teacher whose temperature goes to zero.

    >>> import torch
    >>> hard_distillation(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([2.4076])
    """
    check_logits(student, teacher)
    return F.cross_entropy(wide(student), teacher.detach().argmax(-1), reduction="none")


def virtual_teacher(
    student: Tensor, labels: Tensor, *, correct: Share = 0.99, temperature: Positive = 4.0
) -> Tensor:
    """Teacher-free distillation (Tf-KD reg): a teacher that is `correct` and knows nothing else.

    T² Σ_c u_c (log u_c - log q_c), with q = softmax(student / T), and u the teacher that gives the
    labelled class `correct`, shares the rest evenly, and is softened: its probabilities to the
    power 1 / T, normalised. Shapes: student [N, C] logits; labels int64 [N], or float [N, C] (after
    mixup), of which the arg max is the labelled class. Returns [N], in nats times T². A class
    whose student logit is -inf is absent: the rest is shared among the others.

    Paper: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR
    2020: 0.99, weight 0.95 with 0.05 of cross-entropy. The official code, with T = 20, takes the
    softmax of probabilities (all but uniform whatever T), leaves the student at T = 1 and averages
    over the classes, with 100 before it: neither its T nor its weight carries over.

    Neighbours: at T = 1 it is `cross_entropy` with label_smoothing (1 - correct) C / (C - 1), less
    a constant. `kl_divergence` to a teacher of these logits is the same number.

    >>> import torch
    >>> virtual_teacher(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0]))
    tensor([1.8025])
    """
    check_labels(labels, student)
    check_share("correct", correct)
    check_positive("temperature", temperature)
    log_q = F.log_softmax(tempered(student, temperature), dim=-1)
    log_u = _softened_label(log_q.detach(), label_column(labels, student), correct, temperature)
    return divergence(log_q, log_u, temperature**2)


def _softened_label(log_q: Tensor, column: Tensor, correct: float, temperature: float) -> Tensor:
    """Log-probabilities of the virtual teacher over the classes that the student has."""
    gone = log_q == -math.inf
    others = (log_q.shape[-1] - 1 - gone.sum(-1, keepdim=True)).to(log_q.dtype)
    right = log_q.new_full((), math.log(correct) / temperature)
    other = (math.log1p(-correct) - others.clamp(min=1).log()) / temperature
    total = torch.logaddexp(right, others.log() + other)
    told = (other - total).expand_as(log_q).masked_fill(gone, -math.inf)
    return told.scatter(-1, column, right - total)


def kl_divergence(
    student: Tensor, teacher: Tensor | TopK, *, temperature: Positive = 4.0
) -> Tensor:
    """Knowledge distillation (KD), the soft targets of Hinton: T² Σ_c p_c (log p_c - log q_c).

    p = softmax(teacher / T) and q = softmax(student / T). The factor T² keeps the size of the
    gradient, T (q - p), so that a weight means the same at every temperature.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N], in
    nats times T²; zero where the two distributions are equal, +inf where the student excludes
    (logit -inf) what the teacher expects. A class that the teacher excludes contributes nothing,
    whatever the student says of it, -inf included.

    Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Usual
    weights: T = 4, 0.9 with 0.1 of cross-entropy (mdistiller, RepDistiller); the same here.
    A code that averages over the classes too (`KLDivLoss()` with its default reduction: DeiT,
    Tf-KD, TAKD, NVIDIA ModelOpt) has a loss C times smaller: weight_ours = weight_theirs / C.
    Codes without T² (DistiLLM, TRL, torchtune): weight_ours = weight_theirs / T².

    Neighbours: as T grows it becomes half the `mse` of the centred logits. `decoupled_kl` with
    beta = 1 - p_label is the same number. `standardized_kl` is this after each row of logits is
    standardised.

    >>> import torch
    >>> kl_divergence(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1.3196])
    """
    pair = comparable(student, teacher, temperature)
    return divergence(*log_probabilities(*pair, temperature), temperature**2)


def transformed_teacher_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    power: Positive = 0.1,
    weighted: bool = False,
    temperature: Positive = 1.0,
) -> Tensor:
    """Transformed teacher matching (TTM, WTTM): `kl_divergence` with the teacher softened alone.

    T² KL(p̃ ‖ q) with q = softmax(student / T) and p̃_c = p_c^γ / U, where p = softmax(teacher), γ is
    `power` and U = Σ_c p_c^γ. A power γ is a temperature of 1 / γ on the teacher's side only, so
    this is Hinton's loss with separate temperatures. The student is pulled towards answers that
    are themselves soft. With `weighted` each row counts U times: more where the teacher is unsure.

    Shapes: student and teacher [N, C] logits. Returns [N], in nats times T²; excluded classes
    (-inf) as in `kl_divergence`.

    Paper: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024:
    γ = 0.1 to 0.2, the student at T = 1, so that no T² is in their weights: they carry over (45
    next to cross-entropy 1 from VGG-13 to VGG-8). U is at least 1, and 1 for a certain teacher.

    Neighbours: γ = 1 / T is `kl_divergence` at T; γ = 1 and T = 1 gives U = 1, plain KL. As γ grows
    it becomes `hard_distillation`.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> transformed_teacher_kl(student, teacher)
    tensor([0.3789])
    >>> transformed_teacher_kl(student, teacher, weighted=True)
    tensor([0.9907])
    """
    check_logits(student, teacher)
    check_positive("power", power)
    check_positive("temperature", temperature)
    log_q = F.log_softmax(tempered(student, temperature), dim=-1)
    if not weighted:
        log_p = F.log_softmax(tempered(teacher.detach(), 1 / power), dim=-1)
        return divergence(log_q, log_p, temperature**2)
    powers = F.log_softmax(wide(teacher.detach()), dim=-1).mul_(power)
    log_total = powers.logsumexp(-1, keepdim=True)
    value = divergence(log_q, powers.sub_(log_total), temperature**2)
    return value * log_total.squeeze(-1).exp()


def standardized_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    """Logit standardisation (LS-KD): `kl_divergence` between z-scores of the logits.

    Each row becomes (z - mean) / (std + 1e-7), std unbiased, on both sides, and then T² KL: the
    student matches the order and the shape of the teacher's logits, and its own scale is free
    (the labels set it: calibrate the student afterwards).

    Shapes: student and teacher [N, C] logits. Returns [N], in nats times T². Mean and std are of
    the finite logits, so absent classes (-inf) are as if cut off. A row of constant logits (a head
    that starts at zero) has std 0 and becomes uniform: finite, but the gradient is 1e7 times its
    usual size there, as in the official code; clip it or start the head at random.

    Paper: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024. The official
    recipe gives it weight 9 next to cross-entropy 0.1, ten times the KD it is compared with, so
    part of the published gain is the weight: compare at equal weight.

    Neighbours: unchanged when either side is scaled (by a > 0) or shifted; `kl_divergence` is not.

    >>> import torch
    >>> standardized_kl(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 20.0, 10.0]]))
    tensor([1.2806])
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    pair = log_probabilities(_standardized(student), _standardized(teacher.detach()), temperature)
    return divergence(*pair, temperature**2)


def _standardized(logits: Tensor) -> Tensor:
    logits = wide(logits)
    gone = logits == -math.inf
    if can_be_asked(gone) and not gone.any():
        centred = logits - logits.mean(-1, keepdim=True)
        std = (
            torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (logits.shape[-1] - 1) ** 0.5
        )
        return centred / (std + STANDARDIZE_EPS)
    count = logits.shape[-1] - gone.sum(-1, keepdim=True)
    mean = logits.masked_fill(gone, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (logits - mean).masked_fill(gone, 0.0)
    # The gradient of a norm is zero at zero, that of a square root is not a number.
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    std = norm / (count - 1).clamp(min=1).sqrt()
    return (centred / (std + STANDARDIZE_EPS)).masked_fill(gone, -math.inf)


def binary_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    """Multi-label logit distillation (MLD): the divergence of every label by itself, summed.

    T² Σ_c KL([p_c, 1 - p_c] ‖ [q_c, 1 - q_c]), with p = sigmoid(teacher / T) and
    q = sigmoid(student / T): each class is a question of its own, yes or no. Use it where several
    labels can hold; softmax losses compare labels that do not compete.

    Shapes: student and teacher [N, C] logits of sigmoids, C >= 1. Returns [N], in nats times T². A
    logit of -inf is a certain no: nothing where both say it, +inf where only the student does.

    Paper: Yang et al., "Multi-Label Knowledge Distillation" (L2D), ICCV 2023: weight 10 next to the
    loss on labels, T = 1, a sum over the classes as here. The official code clamps probabilities at
    1e-8. Codes that average over the classes: weight_ours = weight_theirs / C.

    Neighbours: binary cross-entropy with soft labels sigmoid(teacher) less the teacher's entropy;
    for two classes z and 0 the same as `kl_divergence`.

    >>> import torch
    >>> binary_kl(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([0.7616])
    """
    check_same_shape(student, teacher)
    if student.ndim != 2 or not student.shape[1]:
        raise ValueError(
            f"logits must have shape [N, C] with at least one class, got {tuple(student.shape)}."
        )
    check_positive("temperature", temperature)
    student, teacher = tempered(student, temperature), tempered(teacher.detach(), temperature)
    # log(1 - q) = -softplus(student), and log q = student - softplus(student)
    said, told = F.softplus(student, threshold=40), F.softplus(teacher, threshold=40)
    apart = weighed(teacher.sigmoid(), teacher - student) + (said - told).sum(-1)
    return apart * temperature**2


def centered_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of centred logits: the variance over the classes of s - t.

    mean_c ((s_c - s̄) - (t_c - t̄))², with s̄ and t̄ a row's means. A constant added to a row of
    logits changes no probability, and here costs nothing.

    Shapes: student and teacher [N, C] logits. Returns [N]. Absent classes (-inf on both sides) are
    as if cut off; a class that one side alone excludes makes the row +inf, without gradient.

    Papers: Ba & Caruana, "Do Deep Nets Really Need to be Deep?", 2014 (not centred); Hinton,
    Vinyals, Dean, 2015, section 2.1 (centred, as the limit of high temperature); Kim et al., IJCAI
    2021. Codes that sum over the classes: weight_ours = weight_theirs · C.

    Neighbours: half of it is the limit of `kl_divergence` as T grows. `mse` also asks for the mean.
    `standardized_kl` leaves the scale free too.

    >>> import torch
    >>> centered_mse(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[5.0, 7.0, 6.0]]))
    tensor([2.6667])
    """
    check_logits(student, teacher)
    gap = wide(student) - wide(teacher.detach())
    if len(gap) and can_be_asked(gap):
        value = gap.var(-1, correction=0)
        if all_finite(value):
            return value
    infinite = gap.isinf()
    gone = infinite | ((student == -math.inf) & (teacher == -math.inf))
    count = (gap.shape[-1] - gone.sum(-1, keepdim=True)).clamp(min=1)
    gap = gap.masked_fill(gone, 0.0)
    centred = (gap - gap.sum(-1, keepdim=True) / count).masked_fill(gone, 0.0)
    value = centred.square().sum(-1) / count.squeeze(-1)
    return value.masked_fill(infinite.any(-1), math.inf)
