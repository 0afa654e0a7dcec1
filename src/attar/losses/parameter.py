"""Losses on weights: how far a student's parameters are from those they are pulled towards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attar.losses._rows import check_same_shape, wide
from attar.losses.types import Tensors


def l2_starting_point(student: Tensors, teacher: Tensors) -> Tensor:
    """L2 to the starting point (L2-SP): ½ Σ (w - w⁰)².

    w are weights of the student and w⁰ those of the teacher, which stay.

    Shapes: student and teacher are one tensor of any shape, or equally long tuples of tensors, of
    equal shapes pair by pair. Returns a scalar, the sum over all values of all pairs. Its gradient
    is w - w⁰, whatever the number of weights.

    Paper: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    ICML 2018: weight α of 0.1 or 0.01, searched for each data set; the head, which has no teacher,
    gets plain weight decay (β = 0.01). As a term, and not as the optimizer's weight decay, it means
    the same under Adam as under SGD. Leave batch statistics and normalisation layers out.

    Neighbours: `l1_starting_point` leaves most weights where they were and lets a few go far.

    >>> import torch
    >>> l2_starting_point(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 1.0]))
    tensor(4.)
    """
    return _sum_of_pairs(student, teacher, lambda gap: gap.square().sum() / 2)


def l1_starting_point(student: Tensors, teacher: Tensors) -> Tensor:
    """L1 to the starting point (L1-SP): Σ |w - w⁰|.

    w are weights of the student and w⁰ those of the teacher, which stay.

    Shapes: student and teacher are one tensor of any shape, or equally long tuples of tensors, of
    equal shapes pair by pair. Returns a scalar, the sum over all values of all pairs. Its gradient
    is the sign of w - w⁰, and 0 where they are equal.

    Paper: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    ICML 2018, which searches the weight for each data set and finds L2-SP as good or better.

    Neighbours: `l2_starting_point` pulls in proportion to the distance.

    >>> import torch
    >>> l1_starting_point(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 1.0]))
    tensor(4.)
    """
    return _sum_of_pairs(student, teacher, lambda gap: gap.abs().sum())


def _sum_of_pairs(student: Tensors, teacher: Tensors, size: Callable[[Tensor], Tensor]) -> Tensor:
    mine, theirs = (side if isinstance(side, tuple) else (side,) for side in (student, teacher))
    if len(mine) != len(theirs) or not mine:
        raise ValueError(
            f"student and teacher must have the same number of tensors, at least one, "
            f"got {len(mine)} and {len(theirs)}."
        )
    for own, other in zip(mine, theirs, strict=True):
        check_same_shape(own, other)
    gaps = (wide(a) - wide(b.detach()) for a, b in zip(mine, theirs, strict=True))
    return torch.stack([size(gap) for gap in gaps]).sum()
