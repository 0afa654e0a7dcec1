"""Losses of detection: distributions of box edges, scores of boxes, features on and off objects."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import check_not_negative, check_positive, check_same_shape, wide
from attar.losses._softmax import divergence, log_probabilities
from attar.losses.types import NotNegative, Positive


def localization_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 10.0) -> Tensor:
    """Localization distillation (LD): T² mean_e KL(p_e ‖ q_e) of box edges as distributions.

    q_e is the softmax of the student's logits / T over the bins of edge e, and p_e that of the
    teacher.

    Shapes: student and teacher [N, E, B] logits of B bins for E edges (4 of a box), a row for each
    box. Returns [N], in nats times T². Only for heads that give a distribution over distances (GFL,
    YOLOv8 to 11, D-FINE).

    Paper: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022: T = 10,
    weight 0.25 on boxes of the main and of the valuable region. The official code averages over the
    bins too: weight_ours = weight_theirs / B, so 0.25 at 17 bins is 0.015. CrossKD (Wang et al.,
    CVPR 2024) sums over the bins with T = 1, weight 4.

    Neighbours: `kl_divergence` of each edge; `earth_mover` knows that bins are ordered.

    >>> import torch
    >>> student = torch.tensor([[[2.0, 0.0]]])
    >>> localization_kl(student, torch.tensor([[[0.0, 2.0]]]), temperature=1.0)
    tensor([1.5232])
    """
    check_same_shape(student, teacher)
    check_positive("temperature", temperature)
    if student.ndim != 3 or student.shape[2] < 2 or not student.shape[1]:
        raise ValueError(
            f"features must be logits [N, edges, bins] with at least two bins, "
            f"got {tuple(student.shape)}."
        )
    cost = divergence(*log_probabilities(student, teacher, temperature), temperature**2)
    return cost.sum(1) / cost.shape[1]


def quality_focal(student: Tensor, teacher: Tensor, *, beta: NotNegative = 1.0) -> Tensor:
    """Quality focal loss (QFL) to the teacher's scores, as of CrossKD: Σ_c |p - q|^β BCE(q, p).

    p = sigmoid(teacher), q = sigmoid(student), and BCE(q, p) = -p log q - (1 - p) log(1 - q). The
    factor |p - q|^β turns to the boxes where the two differ; the gradient flows through it too.

    Shapes: student and teacher [N, C] logits of sigmoids, C >= 1, a row for each position or box.
    Returns [N], in nats. A logit of -inf is a certain no: nothing where both say it.

    Papers: Li et al., "Generalized Focal Loss", NeurIPS 2020; as a loss between student and teacher
    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, on
    what the teacher's head makes of the student's features: β = 1, weight 1 (FCOS 0.4).

    Neighbours: `binary_kl` is BCE less the teacher's entropy, every box alike.

    >>> import torch
    >>> quality_focal(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([0.6931])
    """
    check_not_negative("beta", beta)
    check_same_shape(student, teacher)
    if student.ndim != 2 or not student.shape[1]:
        raise ValueError(
            f"logits must have shape [N, C] with at least one class, got {tuple(student.shape)}."
        )
    # A certain answer stays one at 1e4, where products with it are finite.
    mine, p = wide(student).clamp(-1e5, 1e5), wide(teacher.detach()).sigmoid()
    cost = F.softplus(mine) - p * mine
    apart = (p - mine.sigmoid()).abs()
    if beta != 1:
        # The gradient of a power below 1 is infinite at zero.
        apart = apart.masked_fill(apart == 0, 1.0).pow(beta) * (apart > 0)
    return (apart * cost).sum(1)


def focal_features(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    background: NotNegative = 0.5,
    attention: NotNegative = 1.0,
    temperature: Positive = 0.5,
) -> Tensor:
    """Focal distillation of features (FGD, its focal part): on objects and off, by attention.

    Σ_p (w_p + `background` · v_p) a_p Σ_c b_c (s_cp - t_cp)²
    + `attention` · (Σ_p |a_p(s) - a_p| + Σ_c |b_c(s) - b_c|).
    a_p = P softmax_p(mean_c |t| / T) says where the teacher looks among P positions, and
    b_c = C softmax_c(mean_p |t| / T) at which channels; w is the weight of positions on objects,
    and v one over the number of those off.

    Shapes: student and teacher maps [N, C, H, W] of equal shape; labels [N, H, W], the weight of a
    position that lies on an object, 1 / (the object's area in positions; the smallest object
    where several lie), and 0 off objects. Returns [N], sums over values in squared units.

    Paper: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, for
    each level of the pyramid: objects 1e-3, background 5e-4, attention 1e-3 (5e-4 in its
    configurations), T = 0.5: weight 1e-3 here, which the options are relative to. Sums grow with
    the resolution, so clip gradients (35 there). Its global part, a trained relation of positions,
    is a term of its own, `global_context`. The published boxes come to weights of positions by
    rounding outwards to the grid, both ends included.

    Neighbours: `attention_transfer` compares the attention alone; `channel_correlation` needs no
    objects and is the first choice.

    >>> import torch
    >>> student = torch.tensor([[[[2.0, 0.0]]]])
    >>> focal_features(student, torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor([7.9281])
    """
    check_not_negative("background", background)
    check_not_negative("attention", attention)
    check_positive("temperature", temperature)
    _check_focal(student, teacher, labels)
    mine, theirs = wide(student), wide(teacher.detach())
    where, which = _attention(theirs, temperature)
    where_s, which_s = _attention(mine, temperature)
    on = labels.detach().to(theirs.dtype)
    off = (on == 0).to(theirs.dtype)
    off = off / off.sum((1, 2), keepdim=True).clamp(min=1)
    gap = ((mine - theirs).square() * which[:, :, None, None]).sum(1)
    focal = ((on + background * off) * where * gap).sum((1, 2))
    seen = (where_s - where).abs().sum((1, 2)) + (which_s - which).abs().sum(1)
    return focal + attention * seen


def _check_focal(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    check_same_shape(student, teacher)
    if student.ndim != 4 or 0 in student.shape[1:]:
        raise ValueError(f"focal_features needs maps [N, C, H, W], got {tuple(student.shape)}.")
    if labels.shape != (student.shape[0], *student.shape[2:]):
        raise ValueError(
            f"labels must be weights [N, H, W] of the same positions as the maps, "
            f"got {tuple(labels.shape)} and {tuple(student.shape)}."
        )


def _attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where [N, H, W] and at which channels [N, C] the values are large, with mean 1."""
    channels, positions = maps.shape[1], maps.shape[2] * maps.shape[3]
    size = maps.abs() / temperature
    where = F.softmax(size.sum(1).flatten(1) / channels, dim=1) * positions
    which = F.softmax(size.flatten(2).sum(2) / positions, dim=1) * channels
    return where.view(len(maps), *maps.shape[2:]), which
