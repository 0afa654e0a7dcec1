"""Losses on what a model answers: logits [N, C] in, nats a row [N] out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import (
    absent,
    check_labels,
    check_logits,
    check_not_negative,
    check_positive,
    refuse_labels,
    wide,
)
from attar.losses.types import Fraction, NotNegative, Positive

# The constants of the official implementations; the published numbers were made with them.
PEARSON_EPS = 1e-8
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


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: Positive = 4.0) -> Tensor:
    """Knowledge distillation (KD), the soft targets of Hinton: T² Σ_c p_c (log p_c - log q_c).

    p = softmax(teacher / T) and q = softmax(student / T). The factor T² keeps the size of the
    gradient, T (q - p), so that a weight means the same at every temperature.

    Shapes: student and teacher [N, C] logits. Returns [N], in nats times T²; zero where the two
    distributions are equal, +inf where the student excludes (logit -inf) what the teacher expects.
    A class that the teacher excludes contributes nothing, whatever the student says of it, -inf
    included.

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
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    return _tempered_kl(student, teacher.detach(), temperature)


def _tempered_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(_tempered(student, temperature), dim=-1)
    log_p = F.log_softmax(_tempered(teacher, temperature), dim=-1)
    return _divergence(log_q, log_p, temperature**2)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if logits.dtype is not torch.float32:
        logits = wide(logits)
    return logits if temperature == 1 else logits / temperature


def _divergence(log_q: Tensor, log_p: Tensor, scale: float = 1.0) -> Tensor:
    """scale · Σ p (log p - log q) over the last dimension, with 0 log 0 = 0 whatever q is."""
    p = log_p.exp().mul_(scale)
    gap = log_p - log_q
    # Only 0 · inf gives a NaN here. Where there is none, a mask and its backward pass are saved;
    # only a CPU answers that without waiting.
    if p.device.type == "cpu" and not torch.compiler.is_compiling():
        value = (p * gap).sum(-1)
        flat = value.detach().reshape(-1)
        if not math.isnan(flat.dot(flat).item()):
            return value
    return (p * gap.masked_fill(p == 0, 0.0)).sum(-1)


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
    number = labels.argmax(-1) if labels.is_floating_point() else labels.long()
    column = number.unsqueeze(-1)
    binary_q, others_q = _decouple(_tempered(student, temperature), column)
    binary_p, others_p = _decouple(_tempered(teacher.detach(), temperature), column)
    target, other = _divergence(binary_q, binary_p), _divergence(others_q, others_p)
    return (alpha * target + beta * other) * temperature**2


def _decouple(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (this column, any other) [N, 2], and among the others [N, C]."""
    others = logits.scatter(-1, column, -math.inf)
    binary = torch.cat([logits.gather(-1, column), others.logsumexp(-1, keepdim=True)], dim=-1)
    return F.log_softmax(binary, dim=-1), F.log_softmax(others, dim=-1)


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
    return _tempered_kl(_standardized(student), _standardized(teacher.detach()), temperature)


def _standardized(logits: Tensor) -> Tensor:
    logits = wide(logits)
    gone = logits == -math.inf
    count = logits.shape[-1] - gone.sum(-1, keepdim=True)
    mean = logits.masked_fill(gone, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (logits - mean).masked_fill(gone, 0.0)
    # The gradient of a norm is zero at zero, that of a square root is not a number.
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    std = norm / (count - 1).clamp(min=1).sqrt()
    return (centred / (std + STANDARDIZE_EPS)).masked_fill(gone, -math.inf)


def correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Positive = 1.0,
    inter: NotNegative = 1.0,
    intra: NotNegative = 1.0,
) -> Tensor:
    """Distillation from a stronger teacher (DIST): match relations, not values.

    T² (inter · mean_n (1 - ρ(q_n, p_n)) + intra · mean_c (1 - ρ(q_·c, p_·c))), where ρ is the
    Pearson correlation, p = softmax(teacher / T) and q = softmax(student / T). The inter-class part
    asks each row for the teacher's preference among classes, the intra-class part each column for
    the teacher's preference among the examples of the batch.

    Shapes: student and teacher [N, C] logits. Returns a scalar, in [0, 2 T² (inter + intra)]. The
    intra part is a relation between the examples present, so the value depends on how the data is
    batched (with intra=0 it does not); give it 64 or more examples. A row or column in which the
    teacher is constant has no correlation and contributes 0, not a constant 1: a batch of one has
    an intra part of 0, an empty batch is 0. Absent classes (-inf on both sides) are as if cut off.
    ρ is damped by 1e-8 over the product of the norms, as in the official code, so that the loss at
    equality is zero up to that damping.

    Paper: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. The
    official β and γ are inter and intra; the paper's β = γ = 2 is their 1 with a weight of 2;
    temperature 1 on ImageNet and 4 on CIFAR-100. The segmentation copy of the code drops T².

    Neighbours: unchanged by a positive affine map of each row (inter) or each column (intra) of the
    probabilities; `standardized_kl` has that freedom in the logits.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> correlation(student, torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]))
    tensor(2.5169)
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    check_not_negative("inter", inter)
    check_not_negative("intra", intra)
    real = ~absent(student, teacher)
    q = F.softmax(_tempered(student, temperature), dim=-1)
    p = F.softmax(_tempered(teacher.detach(), temperature), dim=-1)
    mean = 1 / real.sum(-1, keepdim=True).to(p.dtype)  # a row of probabilities sums to one
    rows = _one_minus_pearson((q - mean) * real, (p - mean) * real, dim=1)
    columns = _one_minus_pearson(q - q.mean(0), p - p.mean(0), dim=0)
    inter_part = rows.sum() / max(len(rows), 1)
    intra_part = columns.sum() / real.any(0).sum().clamp(min=1)
    return (inter * inter_part + intra * intra_part) * temperature**2


def _one_minus_pearson(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """1 - ρ of centred values along `dim`; 0 where the teacher is constant."""
    norm = torch.linalg.vector_norm(teacher, dim=dim)
    scale = torch.linalg.vector_norm(student, dim=dim) * norm + PEARSON_EPS
    return (1 - (student * teacher).sum(dim) / scale) * (norm > 0)
