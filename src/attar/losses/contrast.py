"""Losses that tell an example's teacher from the teachers of other examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import flat_pair, unit
from attar.losses._rows import check_positive, check_same_shape
from attar.losses.types import Positive


def contrast(student: Tensor, teacher: Tensor, *, temperature: Positive = 0.07) -> Tensor:
    """Contrast within the batch (InfoNCE): -mean_i log(e^(c_ii / T) / Σ_j e^(c_ij / T)).

    c_ij = cos(s_i, t_j): each example of the student picks its own teacher's features out of those
    of the batch.

    Shapes: student and teacher [N, D] or [N, ...] of equal shape, flattened (add
    `projector: linear` where D differs). Returns a scalar, in nats; chance is log N. The other
    examples of the batch are what it is compared with, so the value depends on the batch: give it
    many; one example alone gives 0. It is not zero at equality. A zero vector is at cosine 0 from
    all, without gradient.

    Papers: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018;
    between student and teacher Tian et al., "Contrastive Representation Distillation" (CRD), ICLR
    2020, which takes 16384 negatives from a memory of past features and another estimator, so that
    its weight 0.8 does not carry over: start at 0.1 to 1.

    Neighbours: `cosine_distance` pulls to the own teacher and pushes from no other.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> contrast(student, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), temperature=1.0)
    tensor(0.4791)
    """
    check_same_shape(student, teacher)
    check_positive("temperature", temperature)
    student, teacher = flat_pair(student, teacher)
    similar = (unit(student) / temperature) @ unit(teacher).T
    own = torch.arange(len(similar), device=similar.device)
    return F.cross_entropy(similar, own, reduction="sum") / max(len(similar), 1)
