"""What losses on features share: layouts, sizes, directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import wide


def unit(values: Tensor, dim: int = -1) -> Tensor:
    """Values over their norm along `dim`; a zero vector has no direction: zero, without gradient.

    `F.normalize` divides a zero vector by 1e-12, and its gradient there by as much.
    """
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / norm.masked_fill(norm == 0, math.inf)


def mean_square(values: Tensor) -> Tensor:
    """The mean square of each row, [N, ...] to [N]; its backward pass is one product."""
    rows = values.flatten(1)
    return torch.linalg.vecdot(rows, rows) / rows.shape[1]


def flat_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as [N, D] in float32 or wider, the teacher detached; D may differ."""
    if student.ndim < 2 or teacher.ndim < 2 or 0 in (*student.shape[1:], *teacher.shape[1:]):
        raise ValueError(
            f"student and teacher must be features [N, D] or [N, ...] with values in them, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    check_same_examples(student, teacher)
    student, teacher = _wide_pair(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def _wide_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, float32 or float64, which matrix products ask for; the teacher detached."""
    student, teacher = wide(student), wide(teacher.detach())
    common = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(common), teacher.to(common)


def check_same_examples(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of other examples, whatever their sizes."""
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must have the same number of examples, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


def check_same_channels(student: Tensor, teacher: Tensor) -> None:
    """Refuse maps [N, C, P] that cannot be compared channel by channel."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of channels, "
            f"got {student.shape[1]} and {teacher.shape[1]}."
        )


def map_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as [N, C, P], P positions of C channels, wide, the teacher detached.

    From maps [N, C, H, W] or tokens [N, L, D]; channels and positions may differ.
    """
    check_maps(student, teacher)
    student, teacher = _wide_pair(student, teacher)
    return _positions_last(student), _positions_last(teacher)


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Refuse anything but maps [N, C, H, W] or tokens [N, L, D], of the same examples."""
    kinds = {student.ndim, teacher.ndim}
    if kinds not in ({3}, {4}) or 0 in (*student.shape[1:], *teacher.shape[1:]):
        raise ValueError(
            f"student and teacher must both be maps [N, C, H, W] or both tokens [N, L, D], "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    check_same_examples(student, teacher)


def _positions_last(values: Tensor) -> Tensor:
    return values.flatten(2) if values.ndim == 4 else values.transpose(1, 2)


def resized_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """As `map_pair`, with equal positions: the larger map is average-pooled to the smaller one."""
    check_maps(student, teacher)
    student, teacher = _wide_pair(student, teacher)
    if student.ndim == 3 and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of tokens, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        student, teacher = _pooled_to_smaller(student, teacher)
    return _positions_last(student), _positions_last(teacher)


def _pooled_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    (h, w), (height, width) = student.shape[2:], teacher.shape[2:]
    if h >= height and w >= width:
        return F.adaptive_avg_pool2d(student, (height, width)), teacher
    if h <= height and w <= width:
        return student, F.adaptive_avg_pool2d(teacher, (h, w))
    raise ValueError(
        f"one side's maps must be the larger in both height and width, "
        f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
    )
