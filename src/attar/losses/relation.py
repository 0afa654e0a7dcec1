"""Losses on relations between the examples of a batch: scalars that depend on the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._maps import flat_pair, unit
from attar.losses._rows import check_positive
from attar.losses.types import Positive

# The constant of the official implementation; it stands in the logarithm on both sides.
PROBABILITY_EPS = 1e-7
# Values of one block of angles: it stays near the processor, and N³ of them never exist.
BLOCK = 2**18


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (SP): mean_ij (G_ij(s) - G_ij(t))².

    G is the product of each pair of examples, f_i · f_j, each row of it divided by its norm.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar, in [0, 4 / N]. It compares the examples of the batch with one another, so the value
    depends on the batch, and its size falls as 1 / N; one example alone gives 0. A zero vector is
    similar to nothing, without gradient.

    Paper: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019. The official
    weight 3000 carries over.

    Neighbours: unchanged by rotations of the features on either side. `correlation_congruence`
    has a kernel, `kernel_alignment` centres, `channel_similarity` is the same between channels.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> similarity_preserving(student, torch.tensor([[1.0], [1.0]]))
    tensor(0.2929)
    """
    student, teacher = flat_pair(student, teacher)
    gap = unit(student @ student.T) - unit(teacher @ teacher.T)
    return _mean(gap.square())


def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances (RKD-D): mean_ij huber(d_ij(s) / μ(s) - d_ij(t) / μ(t)).

    d_ij is the Euclidean distance of two examples, μ the mean of those above zero, and huber(x) is
    x² / 2 up to |x| = 1 and |x| - 1/2 beyond.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar. It compares the examples of the batch with one another, so the value depends on the
    batch; one example alone gives 0. Points that coincide to rounding (in float32 nearer than about
    1e-3 of their distance from the batch's mean) are at distance 0, without gradient; a student
    that maps all examples to one point gets no gradient from this term.

    Paper: Park et al., "Relational Knowledge Distillation", CVPR 2019. The official code counts
    the diagonal in the mean, as here; its weights 25 and 50 (`relation_angle`), or 1 and 2 for
    metric learning, carry over.

    Neighbours: unchanged by rotations, shifts and scale of the features on either side.
    `relation_angle` compares triples.

    >>> import torch
    >>> student = torch.tensor([[0.0], [1.0], [2.0]])
    >>> relation_distance(student, torch.tensor([[0.0], [1.0], [3.0]]))
    tensor(0.0139)
    """
    student, teacher = flat_pair(student, teacher)
    mine, theirs = (_relative(_squared_distances(side)) for side in (student, teacher))
    return _mean(F.smooth_l1_loss(mine, theirs, reduction="none"))


def _squared_distances(points: Tensor) -> Tensor:
    """‖x_i - x_j‖² of all pairs, by one product; 0, without gradient, where that is rounding."""
    # No gradient through the mean: distances do not depend on it. Centred, they cancel less.
    points = points - points.detach().mean(0)
    norms = points.square().sum(1)
    sums = norms.unsqueeze(1) + norms
    squared = torch.addmm(sums, points, points.T, alpha=-2)
    return squared.masked_fill(squared <= 16 * torch.finfo(points.dtype).eps * sums, 0.0)


def _relative(squared: Tensor) -> Tensor:
    """Distances over the mean of those above zero."""
    apart = squared > 0
    # The gradient of a square root at zero is infinite: what is masked never meets it.
    distances = squared.masked_fill(~apart, 1.0).sqrt().masked_fill(~apart, 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / mean.masked_fill(mean == 0, 1.0)


def relation_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of angles (RKD-A): mean_ijk huber(cos_ijk(s) - cos_ijk(t)).

    cos_ijk is the cosine of the angle at example j between examples i and k, and huber(x) is x² / 2
    up to |x| = 1 and |x| - 1/2 beyond.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar, in [0, 1.5]. It compares the examples of the batch with one another, so the value
    depends on the batch; fewer than three examples give 0. An angle with a side of length zero
    (`relation_distance` says when) is 0, without gradient. Work grows as N³ and memory as N²: it is
    computed in blocks from the pairwise distances, with its gradient. No second derivatives.

    Paper: Park et al., "Relational Knowledge Distillation", CVPR 2019. The official code averages
    over all N³ triples, as here; its weights 50 and 25 (`relation_distance`), or 2 and 1, carry
    over.

    Neighbours: unchanged by rotations, shifts and scale of the features on either side.

    >>> import torch
    >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> relation_angle(student, torch.tensor([[0.0], [1.0], [2.0]]))
    tensor(0.1296)
    """
    student, teacher = flat_pair(student, teacher)
    gap: Tensor = _AngleGap.apply(_squared_distances(student), _squared_distances(teacher))
    return gap


class _AngleGap(torch.autograd.Function):
    """mean_ijk huber(cos - cos) of two tables of squared distances, in blocks of vertices j."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        count = len(student)
        value, slopes = student.new_zeros(()), torch.zeros_like(student)
        near, near_teacher = _inverse_distances(student), _inverse_distances(teacher)
        step = max(1, BLOCK // max(count**2, 1))
        for start in range(0, count, step):
            rows = slice(start, start + step)
            cosines = _cosines(student, near, rows)
            gap = cosines - _cosines(teacher, near_teacher, rows)
            slope = gap.clamp(-1, 1)
            value += (gap - slope / 2).mul_(slope).sum()
            if ctx.needs_input_grad[0]:
                turned = cosines.mul_(slope).sum(2)
                pull = slope.mul_(near[rows, :, None]).mul_(near[rows, None, :] / 2)
                slopes -= pull.sum(0)
                slopes[rows] += 2 * pull.sum(2) - turned * near[rows].square()
        ctx.save_for_backward(slopes / max(count, 1) ** 3)
        return value / max(count, 1) ** 3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient, None


def _inverse_distances(squared: Tensor) -> Tensor:
    return squared.masked_fill(squared == 0, math.inf).rsqrt()


def _cosines(squared: Tensor, near: Tensor, rows: slice) -> Tensor:
    """By the law of cosines, at the vertices `rows`: [rows, N, N]."""
    sides = squared[rows]
    cosines = sides[:, :, None] + sides[:, None, :]
    return cosines.sub_(squared).mul_(near[rows, :, None]).mul_(near[rows, None, :] / 2)


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (PKT): who is near whom, as probabilities.

    mean_i Σ_j P_ij(t) log(P_ij(t) / P_ij(s)), where P_ij is (cos(f_i, f_j) + 1) / 2 divided by the
    sum of its row, and 1e-7 stands beside each P in the logarithm, as in the official code.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar, in nats. It compares the examples of the batch with one another, so the value depends on
    the batch; one example alone gives 0. A zero vector is at cosine 0 from all, without gradient.

    Paper: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    ECCV 2018. The official code averages over j too, which makes it N times smaller:
    weight_ours = weight_theirs / N, so 30000 at a batch of 64 is about 470.

    Neighbours: unchanged by rotations, and by the length of each vector. `similarity_preserving`
    squares differences of products instead.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> probabilistic_transfer(student, torch.tensor([[1.0], [1.0]]))
    tensor(0.0589)
    """
    student, teacher = flat_pair(student, teacher)
    q, p = (_neighbours(unit(side)) for side in (student, teacher))
    gap = (p + PROBABILITY_EPS).log() - (q + PROBABILITY_EPS).log()
    return (p * gap).sum() / max(len(p), 1)


def _neighbours(directions: Tensor) -> Tensor:
    similar = directions @ directions.T + 1
    return similar / similar.sum(1, keepdim=True)


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: Positive = 0.4) -> Tensor:
    """Correlation congruence (CC): mean_ij (k(s_i, s_j) - k(t_i, t_j))².

    k(x, y) = exp(-γ ‖x̂ - ŷ‖²) of the directions x̂ = x / ‖x‖, by its Taylor series to the second
    order: e^(-2γ) (1 + 2γ c + (2γ c)² / 2) with c = x̂ · ŷ.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar. It compares the examples of the batch with one another, so the value depends on the
    batch; one example alone gives 0. A zero vector has c = 0 with all, without gradient.

    Paper: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, with
    γ = 0.4 and order 2. The code the authors shared with RepDistiller (weight 0.02) is another
    function: products of the differences of consecutive rows, which depends on the order of the
    batch. Its weight says nothing here.

    Neighbours: `similarity_preserving` is linear in the products.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> correlation_congruence(student, torch.tensor([[1.0], [1.0]]))
    tensor(0.1266)
    """
    check_positive("gamma", gamma)
    student, teacher = flat_pair(student, teacher)
    mine, theirs = (_congruence(unit(side), gamma) for side in (student, teacher))
    return _mean((mine - theirs).square())


def _congruence(directions: Tensor, gamma: float) -> Tensor:
    scaled = (2 * gamma * directions) @ directions.T
    return (1 + scaled + scaled.square() / 2) * math.exp(-2 * gamma)


def cosine_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines between examples (topology distillation, FTD): mean_ij (c_ij(s) - c_ij(t))².

    c_ij is the cosine of two examples.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar, in [0, 4]. It compares the examples of the batch with one another, so the value depends
    on the batch; one example alone gives 0. A zero vector is at cosine 0 from all, without
    gradient; where that is the teacher's it has no topology and its pairs count 0.

    Paper: Kang et al., "Topology Distillation for Recommender System", KDD 2021, of the users and
    items of a batch together. The official code adds up instead: weight_ours = weight_theirs · N².
    Its hierarchical form (HTD), with trained groups, is not part of it.

    Neighbours: unchanged by rotations, and by the length of each vector. `similarity_preserving`
    normalises rows of products, `probabilistic_transfer` compares them as distributions.

    >>> import torch
    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> cosine_relation(student, torch.tensor([[1.0], [1.0]]))
    tensor(0.5000)
    """
    student, teacher = flat_pair(student, teacher)
    mine, theirs = unit(student), unit(teacher)
    known = (torch.linalg.vector_norm(teacher, dim=1) > 0).to(teacher.dtype)
    gap = mine @ mine.T - theirs @ theirs.T
    return _mean(gap.square() * known * known.unsqueeze(1))


def kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Centred kernel alignment (CKA), linear: 1 - ⟨K(s), K(t)⟩ / (‖K(s)‖ ‖K(t)‖).

    K is the table of products f_i · f_j of the features after each loses its mean over the batch.

    Shapes: student and teacher [N, D] or [N, ...], flattened; sizes but N may differ. Returns a
    scalar, in [0, 1]. It compares the examples of the batch with one another, so the value depends
    on the batch: give it more examples than a few, since with N <= D it is low for any features.
    Where the teacher maps all examples to one point (a batch of one too) it is 0; where the student
    does it is 1, without gradient.

    Paper: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019;
    as a loss Saha et al., "Distilling Representational Similarity using Centered Kernel Alignment",
    BMVC 2022. No weight is established; start at 1.

    Neighbours: unchanged by rotations, shifts and scale. `similarity_preserving` neither centres
    nor forgets the scale between rows.

    >>> import torch
    >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> kernel_alignment(student, torch.tensor([[0.0], [1.0], [2.0]]))
    tensor(0.5257)
    """
    student, teacher = flat_pair(student, teacher)
    mine, theirs = (_centred_products(side) for side in (student, teacher))
    norm, own = torch.linalg.vector_norm(theirs), torch.linalg.vector_norm(mine)
    scale = (own * norm).masked_fill((own == 0) | (norm == 0), math.inf)
    return (1 - torch.dot(mine.flatten(), theirs.flatten()) / scale) * (norm > 0)


def _centred_products(points: Tensor) -> Tensor:
    points = points - points.mean(0) if len(points) else points
    return points @ points.T


def _mean(table: Tensor) -> Tensor:
    """The mean, and zero of an empty batch."""
    return table.mean() if table.numel() else table.sum()
