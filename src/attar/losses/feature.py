"""Losses on values that are compared as they are: features, logits, regression outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import mean_square
from attar.losses._rows import (
    absent,
    check_not_negative,
    check_positive,
    check_same_shape,
    wide,
)
from attar.losses.types import NotNegative, Positive, Tensors

# Grids of the hierarchical context, each with half the weight of the one before.
CONTEXT_SIZES = (4, 2, 1)


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
    return _mean_of_rows(squared) if student.ndim > 2 else squared


def _mse_of_columns(student: Tensor, teacher: Tensor) -> Tensor:
    gone = absent(student, teacher)
    count = (student.shape[1] - gone.sum(1)).clamp(min=1)
    return (student - teacher).masked_fill(gone, 0.0).square().sum(1) / count


def bounded_mse(
    student: Tensor, teacher: Tensor, labels: Tensor, *, margin: NotNegative = 0.0
) -> Tensor:
    """Teacher-bounded regression: the squared error of rows in which the student is behind.

    mean_k (s - y)² of a row where that plus the margin is above the teacher's mean_k (t - y)², and
    0 where the student is better than the teacher by the margin. The teacher is no goal but a
    bound: where it errs it is not copied.

    Shapes: student, teacher and labels [N, K] or [N] of equal shape, in the same units; a stage
    gives the labels in those of the output. Returns [N], in squared units.

    Paper: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation",
    NIPS 2017, for the corners of boxes; weight 0.5 next to the loss on the labels.

    Neighbours: with an infinite margin it is the loss on the labels; `mse` copies the teacher
    wherever it stands.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0], [0.5]]), torch.tensor([[1.0], [1.0]])
    >>> bounded_mse(student, teacher, torch.zeros(2, 1))
    tensor([4., 0.])
    """
    check_same_shape(student, teacher)
    check_not_negative("margin", margin)
    if labels.shape != student.shape or not labels.is_floating_point():
        raise ValueError(
            f"labels must be numbers of the outputs' shape {tuple(student.shape)}, got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    student, teacher = wide(student), wide(teacher.detach())
    labels = labels.to(student.dtype)
    error = mean_square(student - labels) if student.ndim > 1 else (student - labels).square()
    bound = mean_square(teacher - labels) if student.ndim > 1 else (teacher - labels).square()
    return error.masked_fill(error.detach() + margin <= bound, 0.0)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance of features: mean over positions of 1 - cos(s, t).

    Shapes: student and teacher of equal shape: vectors [N, D], tokens [N, L, D], or maps
    [N, C, H, W], whose vectors are the channels of a position. Returns [N], in [0, 2]. A zero
    vector of the teacher has no direction and counts 0; one of the student counts 1, without
    gradient.

    Papers: Sanh et al., "DistilBERT", 2019 (weight 1 next to 5 of soft labels); Ranzinger et al.,
    "AM-RADIO", CVPR 2024. Patient distillation (Sun et al., BERT-PKD, 2019) takes the mean squared
    error of unit vectors, which is 2 / D of it: weight_ours = weight_theirs · 2 / D, so 500 at
    D = 768 is 1.3.

    Neighbours: `mse` also compares lengths; `contrast` also pushes from other examples.

    >>> import torch
    >>> cosine_distance(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([0.8000])
    """
    student, teacher, dim = _vectors(student, teacher)
    norm = torch.linalg.vector_norm(teacher, dim=dim)
    own = torch.linalg.vector_norm(student, dim=dim)
    scale = (own * norm).masked_fill((own == 0) | (norm == 0), torch.inf)
    distance = (1 - (student * teacher).sum(dim) / scale) * (norm > 0)
    return _mean_of_rows(distance) if distance.ndim > 1 else distance


def normalized_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 to the layer-normalised teacher (VkD): mean of huber(s - (t - mean) / std).

    Mean and std (over D, plus 1e-5 in the variance) are of each vector of the teacher; the student,
    after its projector, is taken as it is. huber(x) is x² / 2 up to |x| = 1 and |x| - 1/2 beyond.

    Shapes: student and teacher of equal shape: vectors [N, D], tokens [N, L, D], or maps
    [N, C, H, W], whose vectors are the channels of a position. Returns [N]. It is zero where the
    student equals the normalised teacher. A constant vector of the teacher is normalised to zero.

    Paper: Miles et al., "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR
    2024. There the projector has orthonormal rows, and features are averaged over positions
    first. The mean over all values, as here, carries the weight over.

    Neighbours: `mse` does not normalise: channels with large values lead there.

    >>> import torch
    >>> normalized_smooth_l1(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1.3165])
    """
    student, teacher, dim = _vectors(student, teacher)
    last = teacher.movedim(dim, -1)
    target = F.layer_norm(last, last.shape[-1:]).movedim(-1, dim)
    return _mean_of_rows(F.smooth_l1_loss(student, target, reduction="none"))


def _vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both sides, wide, the teacher detached, and the dimension along which a vector lies."""
    check_same_shape(student, teacher)
    if student.ndim not in (2, 3, 4) or 0 in student.shape[1:]:
        raise ValueError(
            f"features must be vectors [N, D], tokens [N, L, D] or maps [N, C, H, W], "
            f"got {tuple(student.shape)}."
        )
    return wide(student), wide(teacher.detach()), 1 if student.ndim == 4 else -1


def hierarchical_context(student: Tensors, teacher: Tensors) -> Tensor:
    """Hierarchical context loss (HCL): mean squared error at several resolutions.

    Σ_l w_l mse_l / Σ_l w_l, where mse_l is that of the maps average-pooled to their own size,
    4 x 4, 2 x 2 and 1 x 1, with w = 1, 1/2, 1/4, 1/8; a size that is not below the map's height is
    left out.

    Shapes: student and teacher maps [N, C, H, W] of equal shape, or several such pairs as tuples,
    whose values are added. Returns [N], in squared units.

    Paper: Chen et al., "Distilling Knowledge via Knowledge Review" (ReviewKD), CVPR 2021, where it
    follows trained fusions of the student's stages: a term on a list of stages with
    `projector: fusion`. The official weight, 0.6 to 8 by pair of models with 20 epochs of warm-up,
    carries over.

    Neighbours: on maps of 1 x 1 it is `mse`.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    >>> hierarchical_context(student, torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
    tensor([0.3333])
    """
    if isinstance(student, tuple) and isinstance(teacher, tuple):
        values = [_context(s, t) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(values).sum(0)
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    return _context(student, teacher)


def _context(student: Tensor, teacher: Tensor) -> Tensor:
    check_same_shape(student, teacher)
    if student.ndim != 4 or 0 in student.shape[1:]:
        raise ValueError(
            f"hierarchical_context needs maps [N, C, H, W], got {tuple(student.shape)}."
        )
    gap = wide(student) - wide(teacher.detach())
    value, weight, total = mean_square(gap), 1.0, 1.0
    for size in CONTEXT_SIZES:
        if size < gap.shape[2]:
            weight /= 2
            total += weight
            # Pooling is linear: pooling the difference is the difference of the pooled.
            value = value + weight * mean_square(F.adaptive_avg_pool2d(gap, size))
    return value / total


def activation_boundary(student: Tensor, teacher: Tensor, *, margin: Positive = 1.0) -> Tensor:
    """Activation boundaries (AB): mean of max(0, m - s)² where t > 0, and of max(0, m + s)² else.

    s and t are responses before the activation; the student's are to be on the teacher's side of
    zero by the margin m.

    Shapes: student and teacher [N, ...] of equal shape. Returns [N], in squared units. It is zero
    where every response is on the teacher's side by the margin, and so not always at equality.

    Paper: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by
    Hidden Neurons", AAAI 2019. The official code sums over the values: weight_ours =
    weight_theirs · (values an example); theirs is 0.003 · 2^(i - L + 1) for layer i of L (from 0),
    in a stage of its own before the labels are seen.

    Neighbours: `partial_mse` compares the values of neurons that are on.

    >>> import torch
    >>> activation_boundary(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 3.0, 1.0]]))
    tensor([1.6667])
    """
    check_positive("margin", margin)
    student, teacher = _values(student, teacher)
    side = (teacher > 0).to(student.dtype).mul_(-2).add_(1)  # -1 where the teacher is on
    return mean_square((student * side).add_(margin).relu_())


def partial_mse(student: Tensor, teacher: Tensor, *, margin: NotNegative = 0.8) -> Tensor:
    """Partial squared error before the ReLU (OFD): mean of (s - t̃)² where s > t̃ or t > 0.

    t̃ = max(t, -m) is the margin ReLU: where the teacher's neuron is off, the student's has to be
    below -m only, or below the teacher's own value if that is higher.

    Shapes: student and teacher [N, ...] of equal shape, before the activation. Returns [N], in
    squared units.

    Paper: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019. There m is
    each channel's expected value when off, from the teacher's batch norm, E[x given x < 0] of
    N(β, γ²): 0.8 γ at β = 0, hence the default, for a teacher with γ near 1. The official code sums
    over the values: weight_ours = weight_theirs · (values an example); theirs is 1e-3 (CIFAR) or
    1e-4 (ImageNet), halved for each layer before the last.

    Neighbours: `mse` where the teacher's neurons are on; `activation_boundary` compares on and off.

    >>> import torch
    >>> partial_mse(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, -3.0, -2.0]]))
    tensor([0.5467])
    """
    check_not_negative("margin", margin)
    student, teacher = _values(student, teacher)
    target, own = teacher.clamp(min=-margin), student.detach()
    counts = (own > target) | (teacher > 0)
    return mean_square(student - torch.where(counts, target, own))


def active_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of active neurons (BYOT, its features): mean of (s - t)² where s > 0 or t > 0.

    Where both are off, whatever their values, nothing is asked.

    Shapes: student and teacher [N, ...] of equal shape, before the activation. Returns [N], in
    squared units, the mean over all values, those that are off on both sides among them.

    Paper: Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural
    Networks via Self Distillation", ICCV 2019: each exit's features and the last exit's, which is
    the term's teacher as `self:`. The official code sums over the batch as well: weight_ours =
    weight_theirs · (values of the batch); theirs is 1e-6.

    Neighbours: after a ReLU it is `mse`; `partial_mse` asks a neuron of the student that is on
    alone to be off, not to have the teacher's value.

    >>> import torch
    >>> active_mse(torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([[1.0, -3.0, 2.0]]))
    tensor([3.3333])
    """
    student, teacher = _values(student, teacher)
    on = (student.detach() > 0) | (teacher > 0)
    return mean_square((student - teacher) * on)


def _values(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(student, teacher)
    if student.ndim < 2 or 0 in student.shape[1:]:
        raise ValueError(
            f"features must be [N, ...] with values in them, got {tuple(student.shape)}."
        )
    return wide(student), wide(teacher.detach())


def _mean_of_rows(values: Tensor) -> Tensor:
    rows = values.flatten(1)
    return rows.sum(1) / rows.shape[1]  # the backward pass of `mean` divides every value
