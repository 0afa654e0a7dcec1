"""Losses on how answers go together within a batch: logits [N, C] in, a scalar out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import absent, check_logits, check_not_negative, check_positive
from attar.losses._softmax import tempered
from attar.losses.types import NotNegative, Positive

# The constant of the official implementation; the published numbers were made with it.
PEARSON_EPS = 1e-8


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
    q = F.softmax(tempered(student, temperature), dim=-1)
    p = F.softmax(tempered(teacher.detach(), temperature), dim=-1)
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


def probability_gram(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Positive = 4.0,
    examples: NotNegative = 1.0,
    classes: NotNegative = 1.0,
) -> Tensor:
    """Batch and class parts of multi-level logit distillation (MLLD): Gram matrices of answers.

    T² (examples · ‖p pᵀ - q qᵀ‖² / N + classes · ‖pᵀ p - qᵀ q‖² / C), squared Frobenius norms,
    where p = softmax(teacher / T) and q = softmax(student / T) are [N, C]. The first asks which
    examples answer alike, the second which classes are answered together.

    Shapes: student and teacher [N, C] logits. Returns a scalar. It is a relation between the
    examples present, so the value depends on how the data is batched. Absent classes (-inf on both
    sides) are as if cut off; an empty batch is 0. It costs a few N² C products; no matrix [C, C] is
    made where C is above N.

    Paper: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023: the sum over T = 2, 3, 4, 5,
    6 of these and of `kl_divergence`, each a term, 0.9 with 0.1 of cross-entropy, on a weak and a
    strong view. The official parts have no T²: weight_ours = weight_theirs / T². The official code
    departs from the paper (it leaves out the strong views' parts, and its confidence mask only
    rescales); these are the paper's parts.

    Neighbours: `correlation` compares each row and each column by itself.

    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> probability_gram(student, torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]))
    tensor(0.1095)
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    check_not_negative("examples", examples)
    check_not_negative("classes", classes)
    q = F.softmax(tempered(student, temperature), dim=-1)
    p = F.softmax(tempered(teacher.detach(), temperature), dim=-1).to(q.dtype)
    # pᵀp - qᵀq is the symmetric part of aᵀb, p pᵀ - q qᵀ that of abᵀ.
    a, b = p - q, p + q
    between = a @ b.T
    total = examples / max(len(q), 1) * (between + between.T).square().sum() / 4
    if classes:
        present = (~absent(student, teacher)).any(0).sum().clamp(min=1)
        total = total + classes * _symmetric_norm(a, b, between) / present
    return total * temperature**2


def _symmetric_norm(a: Tensor, b: Tensor, between: Tensor) -> Tensor:
    """Squared Frobenius norm of the symmetric part of aᵀb, given abᵀ; from the smaller side."""
    if a.shape[1] <= a.shape[0]:
        across = a.T @ b
        return (across + across.T).square().sum() / 4
    return ((a @ a.T) * (b @ b.T)).sum() / 2 + (between * between.T).sum() / 2
