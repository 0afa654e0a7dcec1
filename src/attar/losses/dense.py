"""Losses of dense prediction: channels over space, pixels over images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import map_pair, unit
from attar.losses._rows import check_positive, check_same_shape
from attar.losses.types import Positive

# The constant of the official implementation, beside the standard deviation.
STANDARDIZE_EPS = 1e-6


def channel_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 4.0) -> Tensor:
    """Channel-wise distillation (CWD): T² mean_c KL(p_c ‖ q_c) of maps as distributions.

    q_c is the softmax over positions of channel c of student / T, and p_c that of the teacher.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D], of equal shape: features
    through a projector, or logits of dense prediction. Returns [N], in nats times T². It is in log
    space; the official softmax().log() is infinite at gaps near 100.

    Paper: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. The
    official code divides by N · C, as here: 3 on logits and 50 on features (0.3 and 5 with
    transformers), T = 4, carry over.

    Neighbours: unchanged by adding a constant to a channel. `kl_divergence` compares the classes
    at each position; `attention_transfer` adds up the channels.

    >>> import torch
    >>> student = torch.tensor([[[[2.0, 0.0]]]])
    >>> channel_kl(student, torch.tensor([[[[0.0, 2.0]]]]), temperature=1.0)
    tensor([1.5232])
    """
    check_same_shape(student, teacher)
    check_positive("temperature", temperature)
    student, teacher = map_pair(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    gap = (log_p - log_q).mul_(log_p.exp())
    return gap.sum((1, 2)) * (temperature**2 / student.shape[1])


def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson distillation of features (PKD): mean_c (1 - ρ_c), over examples and positions.

    ρ_c is the Pearson correlation of channel c between student and teacher. Computed as in the
    official code, half the mean squared difference of channels standardised as (f - mean) /
    (std + 1e-6) with the unbiased std, which is (M - 1) / M (1 - ρ) for M values a channel.

    Shapes: student and teacher of equal shape: maps [N, C, H, W], tokens [N, L, D], or [N, D].
    Returns a scalar, in [0, 2]. Mean and deviation are those of the batch, so the value depends on
    it (much in [N, D], little in large maps). A channel in which the teacher is constant says
    nothing and counts 0; one in which the student is counts 1/2, without gradient.

    Paper: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient", NeurIPS 2022. Official weights, for each level of the pyramid, carry
    over: 6 for GFL, 2 for RetinaNet and FCOS, 1 for ATSS.

    Neighbours: unchanged by a positive scale and a shift of each channel on either side.
    `correlation` is of class probabilities.

    >>> import torch
    >>> student = torch.tensor([[0.0], [1.0], [2.0]])
    >>> channel_correlation(student, torch.tensor([[0.0], [1.0], [0.0]]))
    tensor(0.6667)
    """
    check_same_shape(student, teacher)
    if student.ndim == 2 and student.shape[1]:
        student, teacher = student.unsqueeze(1), teacher.unsqueeze(1)
    student, teacher = map_pair(student, teacher)
    mine, theirs = (side - side.mean((0, 2), keepdim=True) for side in (student, teacher))
    count = max(student.shape[0] * student.shape[2], 1)
    size, factor = _standard(mine, count)
    size_teacher, factor_teacher = _standard(theirs, count)
    together = (mine * theirs).sum((0, 2)) * (factor * factor_teacher)
    parts = (size.square() + size_teacher.square()) / 2 - together
    return (parts * (size_teacher > 0)).mean() / count


def _standard(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each channel's norm after it is standardised, and the factor that does it."""
    norm = torch.linalg.vector_norm(centred, dim=(0, 2))
    spread = norm / math.sqrt(max(count - 1, 1)) + STANDARDIZE_EPS
    factor = spread.masked_fill(norm == 0, math.inf).reciprocal()
    return norm * factor, factor


def pixel_relation(student: Tensor, teacher: Tensor, *, temperature: Positive = 0.1) -> Tensor:
    """Cross-image relations of pixels (CIRKD, its mini-batch part): mean_{ab,i} KL(p ‖ q).

    For pixel i of image a and all pixels j of image b, q = softmax_j(cos(s_ai, s_bj) / T), and p is
    that of the teacher; the mean is over all pairs of images, with itself too, and all pixels i.

    Shapes: student and teacher maps [N, C, H, W], or tokens [N, L, D], of equal positions; channels
    may differ. Returns a scalar, in nats (no T²). It compares the images of the batch with one
    another, so the value depends on the batch. A zero pixel is at cosine 0 from all, without
    gradient. Memory and work grow as (N H W)²: eight maps of 32 x 32 are 67 million cosines a
    side, so pool larger maps first.

    Paper: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation",
    CVPR 2022, with T = 0.1; weight 1, the same here. Its two memories of past pixels and regions
    are not part of it.

    Neighbours: `similarity_preserving` compares whole images.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> pixel_relation(student, torch.tensor([[[[1.0, 1.0]]]]), temperature=1.0)
    tensor(0.1201)
    """
    check_positive("temperature", temperature)
    student, teacher = map_pair(student, teacher)
    if student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"student and teacher must have the same number of positions, "
            f"got {student.shape[2]} and {teacher.shape[2]}."
        )
    log_q, log_p = (_log_relations(side, temperature) for side in (student, teacher))
    return (log_p - log_q).mul_(log_p.exp()).sum() / max(log_p.numel() // log_p.shape[2], 1)


def _log_relations(maps: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [all pixels, images, pixels of an image]."""
    images, _, pixels = maps.shape
    rows = unit(maps, dim=1).transpose(1, 2).flatten(0, 1)
    similar = (rows / temperature) @ rows.T
    return F.log_softmax(similar.view(images * pixels, images, pixels), dim=-1)
