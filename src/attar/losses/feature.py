"""Losses on values that are compared as they are: features, logits, regression outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import absent, check_same_shape, wide


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error (MSE) of a row: mean over all but the first dimension of (s - t)².

    Shapes: student and teacher [N, ...] of equal shape: features [N, D], [N, T, D], [N, C, H, W],
    logits [N, C], regression outputs [N, K] or [N]. Returns [N], in squared units. In two
    dimensions, where values may be logits, columns that are -inf on both sides are as if cut off.

    Papers: on logits Ba & Caruana, "Do Deep Nets Really Need to be Deep?", 2014, and Kim et al.,
    "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
    IJCAI 2021; on features through a projector Romero et al., "FitNets: Hints for Thin Deep
    Nets", 2015. Codes that sum over the classes or channels have a loss that is as many times
    larger: weight_ours = weight_theirs · (their number).

    Neighbours: half of it on centred logits is the limit of `kl_divergence` as T grows.

    >>> import torch
    >>> mse(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([2.6667])
    """
    check_same_shape(student, teacher)
    if not student.ndim or 0 in student.shape[1:]:
        raise ValueError(f"mse needs rows with values in them, got shape {tuple(student.shape)}.")
    student, teacher = wide(student), wide(teacher.detach())
    if student.ndim == 2:
        return _mse_of_columns(student, teacher)
    squared = F.mse_loss(student, teacher, reduction="none")
    return squared.flatten(1).mean(1) if student.ndim > 2 else squared


def _mse_of_columns(student: Tensor, teacher: Tensor) -> Tensor:
    gone = absent(student, teacher)
    count = (student.shape[1] - gone.sum(1)).clamp(min=1)
    return (student - teacher).masked_fill(gone, 0.0).square().sum(1) / count
