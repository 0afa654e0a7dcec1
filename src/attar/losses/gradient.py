"""Losses on gradients: how the outputs of both change with what goes in."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.losses._maps import flat_pair
from attar.losses._rows import check_same_shape


def jacobian_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Jacobian matching: ‖J(s) / ‖J(s)‖ - J(t) / ‖J(t)‖‖², which is 2 (1 - cos).

    J is the gradient of one output with respect to the input, or to a feature: the direction in
    which the output grows, whatever its slope.

    Shapes: student and teacher of equal shape, gradients [N, ...], each row flattened. Returns [N],
    in [0, 4]. Where the teacher's gradient is zero it says nothing and counts 0; where the
    student's is, it counts 1, without gradient.

    Papers: Srinivas & Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018, for the
    output of the teacher's arg max (`grad:top/inputs`), next to soft targets. Input-gradient
    alignment (Chan et al., IGAM, "What It Thinks Is Important Is Important", CVPR 2020; Shao et
    al., KDIGA, 2021; `grad:loss/inputs`) in its cosine form is half of it. Gradient knowledge
    distillation (Wang et al., GKD, 2022; `grad:top/embeddings`) is this at every token: rows are
    tokens then. No weight is established; start at 1.

    Neighbours: `sobolev` compares the slopes as well.

    >>> import torch
    >>> jacobian_matching(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1.6000])
    """
    student, teacher = _rows(student, teacher)
    norm = torch.linalg.vector_norm(teacher, dim=1)
    own = torch.linalg.vector_norm(student, dim=1)
    # (|s| / |s|)² is 1 and 0 for a zero row, so only the product carries a gradient.
    scale = (own * norm).masked_fill((own == 0) | (norm == 0), torch.inf)
    apart = 1 + (own > 0).to(own.dtype) - 2 * torch.linalg.vecdot(student, teacher) / scale
    return apart * (norm > 0)


def sobolev(student: Tensor, teacher: Tensor) -> Tensor:
    """Sobolev training, its part on derivatives: ‖J(s) - J(t)‖².

    J is the gradient of an output with respect to the input, or to a feature. With the gradient of
    vᵀz for a random unit vector v, the same for both (stochastic Sobolev; `grad:probe/inputs`), it
    is on average 1 / C of the squared distance of the whole Jacobians of C outputs.

    Shapes: student and teacher of equal shape, gradients [N, ...], each row flattened. Returns [N],
    in the squared unit of the output over that of the input, summed over the row.

    Papers: Czarnecki et al., "Sobolev Training for Neural Networks", NeurIPS 2017, weight 1.
    Gradient-based attention (Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR
    2017; `grad:loss/inputs`) is half of it; no weight is established.

    Neighbours: `jacobian_matching` compares directions alone; `mse` is it over the values of a row.

    >>> import torch
    >>> sobolev(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([8.])
    """
    student, teacher = _rows(student, teacher)
    gap = student - teacher
    return torch.linalg.vecdot(gap, gap)


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(student, teacher)
    return flat_pair(student, teacher)
